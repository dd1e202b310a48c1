"""A step against two plain forwards of the same batch and against the literal four-pass loop.

    python benchmarks/speed.py [--model smollm2-135m] [--rounds 7] [--loss last|all] [--json FILE]
    python benchmarks/speed.py --methods            # every method with its defaults, per forward pass

All candidates of a column run interleaved in one process, in rotating order. In its turn each runs `--before` times unclocked
(a training step follows a training step, and not seconds of another program's) and once clocked. A ratio is taken inside
each round, to two `torch.inference_mode` forwards with the same loss code; the table shows the median and the range over
rounds. All candidates have the same allocator settings (`zotune.allocator`), and lr > 0, so that bf16 weights carry
low-order bits.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch
from common import DTYPES, SHAPES, Crossing, load, machine, make_closure, write
from literal_mezo import LiteralMeZO, ReusedBuffers

import zotune
from zotune.allocator import keep_freed_memory
from zotune.kernels.dispatch import using
from zotune.kernels.reference import ReferenceBackend
from zotune.methods import METHODS

Candidate = Callable[[], Any]
LR = 1e-7  # small enough that thirty steps on one batch lead nowhere
LOZO = {"rank": 4, "interval": 50}
OPTIONS: dict[str, dict[str, Any]] = {  # of methods that do not run without any
    "zo_finetuner": {"networks": "untrained"},
    "pgap": {"horizon": 1000},
}
BASE = "two forwards"


@dataclass(frozen=True)
class Ours:
    """A zotune step: what it is made with, and how many directions it evaluates."""

    settings: dict[str, Any]
    directions: int = 1
    pure_torch: bool = False


OURS = {
    "dense, default engine": Ours({}),
    "dense, written by the next query": Ours({"fold_every": 50}),
    "dense, layerwise": Ours({"engine": "layerwise"}),
    "dense, batched": Ours({"engine": "batched"}),
    "dense, in place": Ours({"engine": "in_place"}),
    "dense, pure torch": Ours({}, pure_torch=True),
    "low-rank 4": Ours({"method": "lozo", "method_options": LOZO}),
    "low-rank 4, folded rarely": Ours({"method": "lozo", "method_options": LOZO, "fold_every": 50}),
    "low-rank 4, 4 directions, per direction": Ours(
        {"method": "subzero", "method_options": {"n": 4, "rank": 4}, "fold_every": 50},
        directions=4,
    ),
}


@dataclass
class Column:
    """One dtype and shape: candidates, and what they took."""

    made: dict[str, Candidate]
    directions: dict[str, float] = field(default_factory=dict)
    crossing: list[float] = field(default_factory=list)  # of each round: see `Crossing`

    def measure(self, rounds: int, before: int) -> dict[str, dict[str, float]]:
        for candidate in self.made.values():
            candidate()  # warm up: compile, allocate, look at the model
            candidate()
        seconds: dict[str, list[float]] = {name: [] for name in self.made}
        names, crossing = list(self.made), Crossing()
        for turn in range(rounds):
            self.crossing.append(crossing())
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                for _ in range(before):
                    self.made[name]()
                start = time.perf_counter()
                self.made[name]()
                seconds[name].append((time.perf_counter() - start) / self.directions.get(name, 1.0))
        return {name: _summary(values, seconds[BASE]) for name, values in seconds.items()}


def _summary(values: list[float], base: list[float]) -> dict[str, float]:
    ratios = [value / reference for value, reference in zip(values, base, strict=True)]
    return {"ms": 1e3 * median(values), "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}


def forwards(closure: Candidate, count: int) -> Candidate:
    def run() -> None:
        with torch.inference_mode():
            for _ in range(count):
                closure().item()

    return run


def step(model: Any, closure: Candidate, ours: Ours) -> Candidate:
    opt = zotune.ZO(model.named_parameters(), lr=LR, eps=1e-2, **ours.settings)

    def run() -> None:
        with using(ReferenceBackend()) if ours.pure_torch else nullcontext():
            opt.step(closure)

    return run


def engines_column(model: Any, shape: tuple[int, int], loss: str, only: list[str] | None) -> Column:
    closure = make_closure(model, shape, loss)
    doubled = make_closure(model, (2 * shape[0], shape[1]), loss)
    literal, reused = LiteralMeZO(model, lr=LR, eps=1e-2), ReusedBuffers(model, lr=LR, eps=1e-2)
    made = {
        BASE: forwards(closure, 2),
        "one forward of 2B rows": forwards(doubled, 1),
        "literal four-pass loop": lambda: literal.step(closure),
        "the same, reused buffers": lambda: reused.step(closure),
    }
    chosen = {name: ours for name, ours in OURS.items() if only is None or name in only}
    made |= {name: step(model, closure, ours) for name, ours in chosen.items()}
    return Column(made, {name: ours.directions for name, ours in chosen.items()})


def methods_column(model: Any, shape: tuple[int, int], loss: str, only: list[str] | None) -> Column:
    """Seconds per two forwards that the method asks for (1.0: no more than plain forwards). What a method does only every
    so many steps (new subspaces, pools) is in the first steps, which do not count."""
    closure, counts = make_closure(model, shape, loss), {}
    literal = LiteralMeZO(model, lr=LR, eps=1e-2)
    made = {BASE: forwards(closure, 2), "literal four-pass loop": lambda: literal.step(closure)}
    for name in METHODS:
        if only is not None and name not in only:
            continue
        opt = zotune.ZO(model.named_parameters(), name, lr=LR, eps=1e-2, method_options=OPTIONS.get(name, {}))
        if "examples" in opt.method.needs:
            continue
        made[name] = lambda opt=opt: opt.step(closure)
        counts[name] = opt.method.forwards_for([slot.site for slot in opt.weights]) / 2
    return Column(made, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=int, default=1, help="runs of a candidate before the one that counts")
    parser.add_argument("--loss", choices=("last", "all"), default="last")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", action="store_true", help="every method, instead of every engine")
    parser.add_argument(
        "--only", nargs="+", choices=[*OURS, *METHODS], metavar="NAME", help="of ours, these (the base is always there)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    columns = methods_column if arguments.methods else engines_column
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "columns": {}, "crossing": {}}
    print(f"{'shape':7} {'dtype':5} {'candidate':40} {'ms':>9} {'ratio':>7}  range")
    for dtype, shape in product(arguments.dtypes, arguments.shapes):
        model = load(arguments.model, DTYPES[dtype], arguments.device)
        column = columns(model, SHAPES[shape], arguments.loss, arguments.only)
        measured = column.measure(arguments.rounds, arguments.before)
        for name, c in measured.items():
            print(
                f"{shape:7} {dtype:5} {name:40} {c['ms']:9.1f} {c['ratio']:7.2f}  {c['low']:.2f} .. {c['high']:.2f}",
                flush=True,
            )
        shared = sum(each < Crossing.APART for each in column.crossing)
        print(
            f"{shape:7} {dtype:5} the threads shared a cache when {shared} of {arguments.rounds} rounds began",
            flush=True,
        )
        result["columns"][f"{shape} {dtype}"] = measured
        result["crossing"][f"{shape} {dtype}"] = column.crossing
    write(arguments.json, result)


if __name__ == "__main__":
    main()
