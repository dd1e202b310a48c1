"""Every method on four quadratics at equal forwards, learning rates tuned: what an estimator is worth without a model.

    python benchmarks/quadratic.py [--quick] [--rows NAME ...] [--problems NAME ...] [--json docs/quadratic.json]

Each cell: the learning rate is searched on a grid of factor sqrt(1.8) with the first start (large strides first), then the
best and its better neighbour run from three starts. Methods with a second rate to tune walk a grid of tens as well. Finished
cells stay in the JSON and are not run again; methods and rules that are not there yet are left out. The table goes
next to the JSON, as .md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import machine
from quadratic_runs import PROBLEMS, D, Problem, Setup, run

from zotune.errors import ConfigError
from zotune.methods import METHODS
from zotune.rules import RULES

BUDGET, STARTS, FACTOR = 12_000, 3, 1.8**0.5
STRIDES = (16, 8, 4, 2, 1)  # of the walk to the best learning rate, in steps of the grid
AGREES = 0.25  # relative difference from the reference value that, with two standard errors, still agrees
Values = tuple[float | None, ...]  # reference values, in the order of PROBLEMS
NONE: Values = (None, None, None, None)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    setup: Setup
    reference: Values = NONE
    rate: float = 1.0  # first learning rate tried, times 1/(tr A + 2), MeZO's best at a fixed gradient
    absolute: bool = False  # for rules and methods that do not see the loss's scale: the rate as it is
    grid: tuple[str, tuple[float, ...]] | None = None  # an option to tune besides, and its values


def _row(name: str, method: str, reference: Values = NONE, rate: float = 1.0, **more: Any) -> Row:
    setup = Setup(
        method, **{key: more.pop(key) for key in ("options", "rule", "rule_options", "layout") if key in more}
    )
    return Row(name, setup, reference, rate, **more)


LR_MU = ("lr_mu", (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0))
GUARDED = {"normalise": True}
ROWS = [
    _row("MeZO", "mezo", (1.30, 0.121, 41.4, 1.585)),
    _row("MeZO n=3", "mezo", (1.26, 0.130, 42.5, 1.570), 3.0, options={"n": 3}),
    _row("ES n=5", "es", (0.065, 0.046, 26.5, 1.465), 4.0, options={"n": 5}),
    _row("PIZO guiding M=2", "pizo", (24.9, 0.401, 88.0, None), options={"pool": 2}, rate=0.5),
    _row("PIZO guiding M=4", "pizo", (7.8, 0.257, 66.0, None), options={"pool": 4}),
    _row("PIZO guiding M=8", "pizo", (2.4, 0.169, 52.0, None), options={"pool": 8}, rate=2.0),
    _row("PIZO greedy M=2", "pizo", (8.7, 0.247, None, None), options={"variant": "greedy", "pool": 2}),
    _row("PIZO greedy M=5", "pizo", (13.1, 0.300, 71.0, 1.692), options={"variant": "greedy", "pool": 5}),
    _row("LDSD lr_mu=0", "ldsd", (13.1, 0.300, 71.0, 1.692), options={"lr_mu": 0.0}),
    _row("LDSD released", "ldsd", (13.3, 0.305, 77.1, 1.731), options={"variant": "released"}, grid=LR_MU),
    _row("LDSD", "ldsd", (10.8, 0.290, 51.8, 1.568), grid=LR_MU),
    _row(
        "LDSD normalised, decay 0.01", "ldsd", (0.465, 0.157, 25.3, 1.502),
        options={**GUARDED, "decay": 0.01}, grid=LR_MU,
    ),
    _row(
        "LDSD normalised, decay 0.1", "ldsd", (0.212, 0.230, 23.1, 1.484),
        options={**GUARDED, "decay": 0.1}, grid=LR_MU,
    ),
    _row("MeZO one-sided n=1", "mezo", options={"sides": 1}),
    _row("MeZO one-sided n=5", "mezo", rate=5.0, options={"n": 5, "sides": 1}),
    _row("forward gradient (dual forwards)", "forward_grad"),
    _row("ES n=5, centred ranks", "es", rate=1e-2, absolute=True, options={"n": 5, "shaping": "centered_ranks"}),
    _row("FZOO n=8", "fzoo", rate=3e-4, absolute=True),
    _row("KerZOO order 3", "kerzoo", rate=0.5),
    _row("KerZOO released", "kerzoo", rate=0.5, options={"variant": "released"}),
    _row("SubZero rank 8", "subzero"),
    _row("LOZO rank 2", "lozo", rate=0.5),
    _row("P-GAP rank 8, matched scale", "pgap", rate=0.5, options={"scale": "matched", "horizon": 5000}),
    _row("sparse, density 0.25", "sparse", rate=4.0),
    _row("block-wise", "blockwise", rate=10.0, layout="ten"),
    _row("ZO Fine-tuner, equal scales", "zo_finetuner", options={"networks": "constant"}, layout="ten"),
    _row("JAGUAR directions", "jaguar", layout="ten"),
    _row("conservative", "conservative"),
    _row("MeZO + momentum 0.9", "mezo", rule="momentum", rate=0.1),
    _row("MeZO + momentum replayed", "mezo", rule="momentum_replayed", rate=0.1),
    _row("MeZO + sign", "mezo", rule="sign", rate=3e-4, absolute=True),
    _row("MeZO + Adam", "mezo", rule="adam", rate=1e-3, absolute=True),
    _row("MeZO + AdaMM", "mezo", rule="adamm", rate=1e-3, absolute=True),
    _row("JAGUAR directions and rule", "jaguar", rule="jaguar", layout="ten", rate=1e-4, absolute=True),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Tuning


@dataclass
class Tuner:
    """Runs of one row on one problem, each made once."""

    problem: Problem
    row: Row
    budget: int
    runs: dict[tuple[float | None, int, int], float] = field(default_factory=dict)
    forwards: int = 0

    def lr(self, k: int) -> float:
        """The k-th rate of the grid."""
        base = 1.0 if self.row.absolute else 1.0 / (float(self.problem.eigenvalues().sum()) + 2.0)
        return base * self.row.rate * FACTOR**k

    def f(self, value: float | None, k: int, start: int = 0) -> float:
        """Final f with a value of the grid's option, the k-th rate, from one start."""
        if (value, k, start) not in self.runs:
            setup = self.row.setup
            if self.row.grid is not None:
                setup = replace(setup, options={**setup.options, self.row.grid[0]: value})
            made = run(self.problem, setup, self.lr(k), start, self.budget)
            self.runs[value, k, start], self.forwards = made.f, max(self.forwards, made.forwards)
        return self.runs[value, k, start]

    def climb(self, value: float | None, k: int, strides: Iterable[int]) -> int:
        """Walk to the best rate from the k-th, with the first start; where all diverge, downwards."""

        def cost(k: int) -> tuple[float, int]:
            return self.f(value, k), k

        for stride in strides:
            while (best := min((k - stride, k, k + stride), key=cost)) != k and abs(best) <= 80:
                k = best
        return k

    def tune(self) -> tuple[float | None, int]:
        """The best value of the grid's option, if there is one, and the best rate."""
        if self.row.grid is None:
            return None, self.climb(None, 0, STRIDES)
        values = self.row.grid[1]
        middle = len(values) // 2
        found = {middle: self.climb(values[middle], 0, STRIDES)}
        for way in (-1, 1):
            at = middle
            while 0 <= at + way < len(values):
                found[at + way] = self.climb(values[at + way], found[at], (4, 2, 1))
                if self.f(values[at + way], found[at + way]) > self.f(values[at], found[at]):
                    break
                at += way
        best = min(found, key=lambda i: self.f(values[i], found[i]))
        return values[best], found[best]

    def finish(self, starts: int) -> dict[str, Any]:
        """Tune, then run the best rate and its better neighbour from all starts; the smaller mean counts."""
        began = time.perf_counter()
        value, k = self.tune()
        near = min((k - 1, k + 1), key=lambda n: self.f(value, n))
        results = {c: [self.f(value, c, start) for start in range(starts)] for c in (k, near)}
        k = min(results, key=lambda c: mean(results[c]))
        f = results[k]
        return {
            "row": self.row.name,
            "problem": self.problem.name,
            "f": mean(f),
            "standard_error": stdev(f) / len(f) ** 0.5 if len(f) > 1 and math.isfinite(mean(f)) else 0.0,
            "starts": f,
            "lr": self.lr(k),
            "tuned": {} if self.row.grid is None else {self.row.grid[0]: value},
            "setup": vars(self.row.setup),
            "forwards": self.forwards,
            "runs": len(self.runs),
            "seconds": round(time.perf_counter() - began, 1),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def verdict(cell: dict[str, Any], reference: float | None) -> str:
    """Whether a value agrees with the reference: within 25 % and two standard errors."""
    if reference is None:
        return ""
    return "agrees" if abs(cell["f"] - reference) <= AGREES * reference + 2 * cell["standard_error"] else "differs"


def available(row: Row) -> bool:
    """Whether the row's method and rule are registered."""
    return row.setup.method in METHODS and row.setup.rule in RULES


def cells_of(path: Path) -> dict[str, Any]:
    """The cells that are finished, by row and problem."""
    return json.loads(path.read_text())["cells"] if path.is_file() else {}


def keep(path: Path, key: str, cell: dict[str, Any], command: str) -> dict[str, Any]:
    """Add a cell to the file, which another process may be writing its own cells to."""
    cells = {**cells_of(path), key: cell}
    draft = path.with_suffix(".tmp")
    what = {"budget": BUDGET, "starts": STARTS, "d": D, "command": command, "machine": machine(), "cells": cells}
    draft.write_text(json.dumps(what, indent=1) + "\n")
    draft.replace(path)
    path.with_suffix(".md").write_text(page(cells, command))
    return cells


def exact(moment: float, forwards: int) -> float:
    """f on the sphere after the budget, in expectation, at the best fixed learning rate 1/moment."""
    return 500.0 * (1.0 - 1.0 / moment) ** (BUDGET // forwards)


READING = """
What it says, per forward pass and with tuned rates: one-sided estimates along several directions (ES, one-sided MeZO with
n = 5, FZOO) beat the central pair wherever they were run but for FZOO on the sphere, since they spend one forward a direction.
Pools (PIZO) and best-of-K (LDSD) lose to MeZO until the pool is large; step normalisation with decay changes that for LDSD
on the sphere, and on 1/i brings it near (decay 0.01; 0.1 forgets too fast there). KerZOO pays its variance and has no bias
to remove here: central differences are exact on quadratics. Methods that look into one subspace or one mask for 1,000 steps
(SubZero, sparse) see a part of the 1,000 numbers within the budget, and are at a disadvantage by construction. Forward
gradient is counted by dual forwards, each of which costs several plain ones on a language model. A quadratic has none of a
language model's structure: this is about estimators, not about which method to take.
"""


def page(cells: dict[str, Any], command: str) -> str:
    """The table in Markdown."""
    problems = list(PROBLEMS)
    lines = [
        "# Quadratics at equal forwards",
        "",
        f"f after {BUDGET:,} forward passes, d = {D}, mean of {STARTS} starts (standard error); learning rates tuned on a",
        "grid of factor 1.34. It starts at 500 (isotropic) and 3.74 (eigenvalues 1/i). Gradient noise is that of a batch: the",
        "same for all queries of a step. In brackets what an independent implementation gave on grids of factor 1.8 (3.2 for",
        f"the two normalised rows); bold where it differs by more than {AGREES:.0%} and two standard errors. A dual forward",
        "counts as one.",
        "",
        "On the sphere without noise the expectation is exact at the best fixed rate: an estimate with E|g|^2 = m |grad|^2",
        f"leaves 500 (1 - 1/m)^steps. MeZO (m = d + 2): {exact(D + 2, 2):.3g}; three directions (m = (d + 4)/3): "
        f"{exact((D + 4) / 3, 6):.3g};",
        f"forward gradient (m = d + 2): {exact(D + 2, 1):.2g}; ES with n = 5 (m = (d + 5)/4): {exact((D + 5) / 4, 5):.2g}.",
        "",
        f"Made by `{command}`.",
        "",
        "| | " + " | ".join(problems) + " |",
        "|---" * (len(problems) + 1) + "|",
    ]
    for row in ROWS:
        texts = [
            _text(cells.get(f"{row.name} / {p}"), reference)
            for p, reference in zip(problems, row.reference, strict=True)
        ]
        if any(texts):
            lines.append(f"| {row.name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n" + READING


def _text(cell: dict[str, Any] | None, reference: float | None) -> str:
    if cell is None:
        return ""
    if not math.isfinite(cell["f"]):
        return "diverges"
    text = f"{cell['f']:.3g} ({cell['standard_error']:.1g})"
    if reference is None:
        return text
    return f"{text} [{reference:g}]" if verdict(cell, reference) == "agrees" else f"**{text}** [{reference:g}]"


def chosen(rows: list[str] | None, problems: list[str] | None) -> list[tuple[Row, Problem, float | None]]:
    """The cells asked for, in the table's order."""

    def wanted(name: str, asked: list[str] | None) -> bool:
        return asked is None or name in asked

    return [
        (row, PROBLEMS[p], reference)
        for row in ROWS
        if wanted(row.name, rows)
        for p, reference in zip(PROBLEMS, row.reference, strict=True)
        if wanted(p, problems)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the budget, one start, nothing is written")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"of: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--json", default="docs/quadratic.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    path, command = Path(a.json), "python benchmarks/quadratic.py"
    if unknown := set(a.rows or ()) - {row.name for row in ROWS}:
        sys.exit(f"No row {sorted(unknown)}; there are: {', '.join(row.name for row in ROWS)}.")
    began = time.perf_counter()
    for row, problem, reference in chosen(a.rows, a.problems):
        key = f"{row.name} / {problem.name}"
        if not available(row):
            print(f"{key}: left out, {row.setup.method!r} with rule {row.setup.rule!r} is not there", flush=True)
            continue
        if not a.quick and key in cells_of(path):
            continue
        try:
            cell = Tuner(problem, row, BUDGET // 10 if a.quick else BUDGET).finish(1 if a.quick else STARTS)
        except ConfigError as error:
            print(f"{key}: left out, {error}", flush=True)
            continue
        _report(key, cell, None if a.quick else reference)
        if not a.quick:
            keep(path, key, cell, command)
    print(f"{time.perf_counter() - began:.0f} s")


def _report(key: str, cell: dict[str, Any], reference: float | None) -> None:
    tuned = "".join(f", {name} {value:g}" for name, value in cell["tuned"].items())
    against = "" if reference is None else f", reference {reference:g}: {verdict(cell, reference)}"
    print(
        f"{key}: f {cell['f']:.4g} +- {cell['standard_error']:.2g} at lr {cell['lr']:.3g}{tuned}{against} "
        f"({cell['runs']} runs, {cell['seconds']:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
