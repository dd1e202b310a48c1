"""Where the time of a step goes: forward, loss, noise, update, and the rest (Python between them). A table and a picture.

    python benchmarks/breakdown.py [--model smollm2-135m] [--rounds 7] [--json FILE] [--picture FILE]

Parts are timed where they begin and end, in one run, candidates interleaved; shown is the median over rounds, divided by
two plain forwards of the same batch. Noise is what writes perturbed weights during queries (and the updates that wait for
that); in the literal loop, the three perturbation passes. Forward holds the Python that puts perturbed weights in their
places. Loss is the output layer and the cross entropy, with the noise for that layer left out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Any

import torch
from common import DTYPES, SHAPES, load, machine, make_closure, write
from literal_mezo import LiteralMeZO

import zotune
from zotune.allocator import keep_freed_memory

PARTS = ("forward", "loss", "noise", "update", "rest")
LR = 1e-7
WIDEST = 5.0  # of the picture, in units of two forwards
LOZO = {"method": "lozo", "method_options": {"rank": 4, "interval": 50}, "fold_every": 50}
OURS: dict[str, dict[str, Any]] = {
    "zotune, dense": {},
    "zotune, dense, written by the query": {"fold_every": 50},
    "zotune, low-rank 4": LOZO,
}


class Clock:
    """Seconds by part; a part inside another is taken out of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[list[float]] = []  # seconds that inner parts took

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._open.append([0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            (inner,) = self._open.pop()
            self.seconds[name] += whole - inner
            if self._open:
                self._open[-1][0] += whole

    def around(self, owner: Any, method: str, name: str) -> None:
        """Time every call of a method from now on."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)


def timed_closure(model: Any, shape: tuple[int, int], clock: Clock) -> Callable[[], torch.Tensor]:
    """The closure of the other benchmarks; what is not the model's body is the loss."""
    plain = make_closure(model, shape, "last")
    body = model.model

    def closure() -> torch.Tensor:
        called = type(body).__call__

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if module is not body:
                return called(module, *args, **kwargs)
            with clock.part("forward"):
                return called(module, *args, **kwargs)

        type(body).__call__ = forward
        try:
            with clock.part("loss"):
                return plain()
        finally:
            type(body).__call__ = called

    return closure


def column(name: str, dtype: str, shape: str, rounds: int) -> dict[str, dict[str, float]]:
    """Each candidate's parts over two plain forwards."""
    model, clock = load(name, DTYPES[dtype], "cpu"), Clock()
    closure, plain = timed_closure(model, SHAPES[shape], clock), make_closure(model, SHAPES[shape], "last")
    literal = LiteralMeZO(model, lr=LR, eps=1e-2)
    clock.around(literal, "_perturb", "noise")
    made: dict[str, Callable[[], Any]] = {"literal four-pass loop": lambda: literal.step(closure)}
    for label, settings in OURS.items():
        opt = zotune.ZO(model.named_parameters(), lr=LR, eps=1e-2, **settings)
        clock.around(opt, "_move", "update")
        clock.around(opt.weights, "perturb", "noise")
        clock.around(opt.weights, "perturb_many", "noise")
        made[label] = lambda opt=opt: opt.step(closure)
    for run in made.values():
        run()
        run()
    bases, found = [], {label: {part: [] for part in PARTS} for label in made}
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(2):
                plain().item()
        bases.append(time.perf_counter() - start)
        for label, run in made.items():
            clock.seconds = dict.fromkeys(PARTS, 0.0)
            with clock.part("update" if label.startswith("literal") else "rest"):  # the literal loop's last pass
                run()
            for part in PARTS:
                found[label][part].append(clock.seconds[part] / bases[-1])
    return {label: {part: median(values) for part, values in parts.items()} for label, parts in found.items()}


def picture(columns: dict[str, dict[str, dict[str, float]]], path: str) -> None:
    """Stacked bars: one panel a column."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(4.2 * len(columns), 3.4), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        left = [0.0] * len(rows)
        for part in PARTS:
            widths = [row[part] for row in rows.values()]
            axes.barh([label.replace(", ", ",\n") for label in rows], widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.axvline(1.0, color="black", linewidth=1, linestyle=":")
        axes.set_xlim(0, WIDEST)
        for place, total in enumerate(left):
            if total > WIDEST:
                axes.text(0.98 * WIDEST, place, f"{total:.0f} in all", ha="right", va="center", color="white")
        axes.set_title(f"{title}: step / two forwards")
        axes.invert_yaxis()
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json")
    parser.add_argument("--picture")
    arguments = parser.parse_args()
    keep_freed_memory()
    columns = {}
    for dtype, shape in product(arguments.dtypes, arguments.shapes):
        columns[f"{shape} {dtype}"] = found = column(arguments.model, dtype, shape, arguments.rounds)
        for label, parts in found.items():
            text = "  ".join(f"{part} {value:6.2f}" for part, value in parts.items())
            print(f"{shape} {dtype}  {label:24} {text}  all {sum(parts.values()):6.2f}", flush=True)
    write(arguments.json, {"command": " ".join(sys.argv), "machine": machine(), "columns": columns})
    if arguments.picture:
        picture(columns, arguments.picture)


if __name__ == "__main__":
    main()
