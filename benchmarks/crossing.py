"""A dense step by which thread writes what, where two threads share a cache and where they do not.

    python benchmarks/crossing.py [--seconds 180] [--dtype fp32] [--shape 1x32] [--fold-every 1] [--json FILE]

Each of two threads writes half of both matrices of a pair, or one of them whole, or (the default) what a look at the caches
says. All three run interleaved beside two forwards, each once unclocked before the run that counts. Rounds are sorted by
whether the threads shared a cache as they began and as they ended (`common.Crossing`; others are left out), which changes by
itself on some virtual machines; on most machines all rounds are of one kind.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import DTYPES, SHAPES, Crossing, load, machine, make_closure, write

import zotune
from zotune.allocator import keep_freed_memory
from zotune.kernels.dispatch import backend_for
from zotune.kernels.native import NativeBackend

WAYS = {"halves of both": 0, "one each": 1, "chosen": -1}
BASE = "two forwards"
Round = dict[str, float]  # seconds


def clocked(run: Callable[[], Any]) -> float:
    """Seconds of the second of two runs."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(args: argparse.Namespace, backend: NativeBackend) -> dict[str, list[Round]]:
    """Rounds for so many seconds, by what the threads shared."""
    model = load(args.model, DTYPES[args.dtype], "cpu")
    closure, crossing = make_closure(model, SHAPES[args.shape], "last"), Crossing()
    options = {"lr": 1e-7, "eps": 1e-2, "fold_every": args.fold_every}
    opts = {way: zotune.ZO(model.named_parameters(), **options) for way in WAYS}
    found: dict[str, list[Round]] = {"a cache": [], "none": []}

    def forwards() -> None:
        with torch.inference_mode():
            closure().item(), closure().item()

    def step(way: str) -> float:
        backend.apart(WAYS[way])
        try:
            return clocked(lambda: opts[way].step(closure))
        finally:
            opts[way].fold()  # the others perturb the same tensors
            backend.apart()

    end, number = time.monotonic() + args.seconds, 0
    while time.monotonic() < end:
        before = crossing() < Crossing.APART
        made = {BASE: clocked(forwards)}
        names = list(WAYS)
        for name in names[number % 3 :] + names[: number % 3]:
            made[name] = step(name)
        number += 1
        if before == (crossing() < Crossing.APART):
            found["a cache" if before else "none"].append(made)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--shape", choices=SHAPES, default="1x32")
    parser.add_argument("--fold-every", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    backend = backend_for(torch.device("cpu"))
    if not isinstance(backend, NativeBackend) or torch.get_num_threads() != 2:
        sys.exit("This is about two threads of the compiled kernels: OMP_NUM_THREADS=2, and see zotune doctor.")
    keep_freed_memory()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "shared": {}}
    for shared, made in rounds(args, backend).items():
        table = {}
        for name in (BASE, *WAYS) if made else ():
            ratios = [each[name] / each[BASE] for each in made]
            ms = 1e3 * median(each[name] for each in made)
            table[name] = {"ms": ms, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
            print(f"{shared:8} {len(made):4} rounds  {name:16} {ms:8.1f} ms  {median(ratios):.2f}"
                  f"  {min(ratios):.2f} .. {max(ratios):.2f}", flush=True)  # fmt: skip
        result["shared"][shared] = {"rounds": len(made), "ways": table}
    write(args.json, result)


if __name__ == "__main__":
    main()
