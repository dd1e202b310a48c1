"""What it costs to add noise: nanoseconds per parameter, and ratios to adding a number in place (the floor of memory).

    python benchmarks/noise.py                     # wall time, 1 thread and all threads
    python benchmarks/noise.py --clock cpu --threads 1 --json noise.json

All rows of one dtype and thread count run interleaved, round after round; a ratio is taken inside its round, and the median
over the rounds is printed. `add` changes a tensor in place; `perturb` writes one perturbed copy, `both` two, from one draw;
`update` changes bf16 values in place with their carried bits. `normal_` is torch's generator alone, nothing added.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, write
from torch import Tensor

from zotune.kernels.contract import Backend, Run, Term
from zotune.kernels.dispatch import choice_for
from zotune.kernels.reference import ReferenceBackend

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
KINDS = ("normal", "rademacher")
Row = tuple[str, Callable[[], Any]]


def backend_rows(backend: Backend, kind: str, stored: Tensor, outs: list[Tensor], low: Tensor) -> list[Row]:
    """Every operation of one back end on one tensor."""
    run, terms = Run(1 << 40, 0, stored.numel()), [Term((1, 2), kind, 1e-6)]
    four = [Term((key, 2), kind, 1e-6) for key in range(4)]
    pair = [(outs[0], 1.0), (outs[1], -1.0)]
    name = f"{backend.name} {kind}"
    rows: list[Row] = [
        (f"{name}: perturb", lambda: backend.perturb(pair[:1], stored, None, run, terms)),
        (f"{name}: both", lambda: backend.perturb(pair, stored, None, run, terms)),
    ]
    if stored.dtype == torch.float32:
        rows.append((f"{name}: add", lambda: backend.add(stored, run, terms)))
        rows.append((f"{name}: add 4 streams", lambda: backend.add(stored, run, four)))
    else:
        rows.append((f"{name}: perturb, carried", lambda: backend.perturb(pair[:1], stored, low, run, terms)))
        rows.append((f"{name}: both, carried", lambda: backend.perturb(pair, stored, low, run, terms)))
        rows.append((f"{name}: update, carried", lambda: backend.update(stored, low, run, terms)))
    return rows


def all_rows(dtype: torch.dtype, numel: int) -> list[Row]:
    """The floor first."""
    stored = torch.randn(numel).to(dtype)
    low = torch.zeros(numel if dtype == torch.bfloat16 else 0, dtype=torch.int16)
    outs = [torch.empty_like(stored) for _ in range(2)]
    rows: list[Row] = [
        ("add_ in place (floor)", lambda: stored.add_(0.0)),
        ("add to another tensor", lambda: torch.add(stored, 0.0, out=outs[0])),
        ("normal_ alone", lambda: outs[0].normal_()),
    ]
    backends: list[Backend] = [choice_for("cpu").backend]
    if backends[0].name != "reference":
        backends.append(ReferenceBackend())
    for backend in backends:
        for kind in KINDS:
            rows += backend_rows(backend, kind, stored, outs, low)
    return rows


def measure(rows: list[Row], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each row in each round; the first row moves by one place from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in rows}
    for _, run in rows:
        run()
    for number in range(rounds):
        shift = number % len(rows)
        for name, run in rows[shift:] + rows[:shift]:
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: robust to neighbours, for one thread")
    parser.add_argument("--json")
    settings = parser.parse_args()
    print(f"noise on the CPU: {choice_for('cpu').reason}\n{settings.numel:,} parameters, {settings.clock} time\n")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for threads in settings.threads:
            torch.set_num_threads(threads)
            seconds = measure(all_rows(dtype, settings.numel), settings.rounds, CLOCKS[settings.clock])
            floor = next(iter(seconds.values()))
            print(f"{str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}")
            for name, taken in seconds.items():
                cost = 1e9 * median(taken) / settings.numel
                ratios = sorted(one / other for one, other in zip(taken, floor, strict=True))
                ratio = median(ratios)
                print(f"    {name:36}{cost:8.3f} ns{ratio:8.2f} x floor   ({ratios[0]:.2f} to {ratios[-1]:.2f})")
                results.append(
                    {"dtype": str(dtype), "threads": threads, "row": name, "ns": cost, "ratio": ratio, "ratios": ratios}
                )
            print()
    write(settings.json, {"machine": machine(), "settings": vars(settings), "rows": results})


if __name__ == "__main__":
    main()
