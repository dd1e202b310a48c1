"""Peak memory of a step above inference, one process per candidate.

    python benchmarks/memory.py [--model smollm2-135m] [--shape 1x32] [--dtype fp32] [--json FILE]

CPU: the kernel's high-water mark of resident memory, reset before the measured call. CUDA: torch's peak of allocated
memory. Two numbers: what the candidate holds between steps (bf16 weights: their carried bits), and the peak during its
second step above that, beside a forward's peak, as a share of the trained weights.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, SHAPES, load, machine, make_closure, write
from literal_mezo import LiteralMeZO

import zotune

LR = 1e-7  # not 0: bf16 weights then carry low-order bits
LOZO = {"method": "lozo", "method_options": {"rank": 4, "interval": 50}, "fold_every": 50}
OURS: dict[str, dict[str, Any]] = {
    "dense, layerwise": {"engine": "layerwise"},
    "dense, batched": {"engine": "batched"},
    "dense, in place": {"engine": "in_place"},
    "low-rank 4, folded rarely": LOZO,
    "the same, after a fold": LOZO,
}
CANDIDATES = ("forward", *OURS, "literal four-pass loop")


def peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset(device: str) -> int:
    """Start a new peak; returns what is in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def measure(arguments: argparse.Namespace, candidate: str) -> dict[str, float]:
    model = load(arguments.model, DTYPES[arguments.dtype], arguments.device)
    closure = make_closure(model, SHAPES[arguments.shape], arguments.loss)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def forward() -> Any:
        with torch.inference_mode():
            return closure()

    calls = {"forward": forward}
    if candidate in OURS:
        opt = zotune.ZO(model.named_parameters(), lr=LR, eps=1e-2, **OURS[candidate])
        calls[candidate] = lambda: opt.step(closure)
    elif candidate != "forward":
        literal = LiteralMeZO(model, lr=LR, eps=1e-2)
        calls[candidate] = lambda: literal.step(closure)
    forward()  # weights that were mapped from a file become resident
    resident = reset(arguments.device)
    calls[candidate]()
    if "after a fold" in candidate:  # which leaves low-order bits of bf16 weights to carry
        opt.fold()
    held = reset(arguments.device)
    calls[candidate]()
    mib = 2**20
    return {"held": (held - resident) / mib, "peak": (peak(arguments.device) - held) / mib, "weights": weights / mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", default="1x32", choices=list(SHAPES))
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--loss", choices=("last", "all"), default="last")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--candidate", help="measure one, in this process")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.candidate:
        print(json.dumps(measure(arguments, arguments.candidate)))
        return
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "peaks": {}}
    print(f"{arguments.model}, {arguments.shape}, {arguments.dtype}, MiB")
    given = {key: value for key, value in vars(arguments).items() if key not in ("json", "candidate")}
    own = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    for candidate in CANDIDATES:
        command = [sys.executable, __file__, *own, "--candidate", candidate]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers = json.loads(run.stdout.splitlines()[-1])
        result["peaks"][candidate] = numbers
        above = numbers["held"] + numbers["peak"] - result["peaks"]["forward"]["peak"]
        text = f"{candidate:26} held {numbers['held']:6.0f}, peak {numbers['peak']:6.0f}"
        print(f"{text}, together above a forward {above / numbers['weights']:6.1%} of the weights", flush=True)
    write(arguments.json, result)


if __name__ == "__main__":
    main()
