"""What people see: the plan, a progress bar, tables."""

import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from zotune.cli.console import console, facts_table
from zotune.methods import METHODS, make_method
from zotune.rules import RULES, make_rule
from zotune.runs.config import TrainConfig
from zotune.runs.job import Listener
from zotune.tasks.catalogue import TASKS

NEEDS = {"slope": "a differentiable closure", "examples": "a loss per example", "trial": "rule sgd or sign"}
EXAMPLES: dict[str, dict[str, Any]] = {  # options that some methods cannot do without
    "pgap": {"horizon": 1000},
    "zo_finetuner": {"networks": "untrained"},
}
FORWARDS = {"blockwise": "2 per block"}  # where it depends on the model
PRIOR_CORRECTED = (
    "Prior-corrected: one bias per option, fitted on training rows. What goes beyond it is not just prior."
)
QUIET_SECONDS = 30.0  # without a terminal, a line this often stands in for the bar


class Display(Listener):
    """Draws a run on the terminal; in a log file, writes a line now and then."""

    def __init__(self, steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not sys.stdout.isatty(),
        )
        self._steps = steps
        self._training: Any = None
        self._evaluation: Any = None
        self._began: tuple[float, int] | None = None
        self._spoke = time.monotonic()
        self._loss = 0.0

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """See `Listener.say`."""
        console.print(message, style="dim", highlight=False, soft_wrap=True)

    def plan(self, facts: dict[str, str]) -> None:
        """See `Listener.plan`."""
        console.print(facts_table(facts))

    def evaluating(self, done: int, total: int, what: str) -> None:
        """See `Listener.evaluating`."""
        if self._evaluation is None:
            self._evaluation = self._progress.add_task(f"evaluating {what}", total=total, note="")
        self._progress.update(self._evaluation, completed=done)
        if done >= total:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def step(self, step: int, loss: float, forwards: int) -> None:
        """See `Listener.step`."""
        now = time.monotonic()
        if self._training is None:
            self._training = self._progress.add_task("training", total=self._steps, note="", completed=step - 1)
            self._began, self._loss = (now, forwards), loss
        assert self._began is not None
        self._loss += 0.05 * (loss - self._loss)
        seconds, done = now - self._began[0], forwards - self._began[1]
        speed = f", {done / seconds:.2f} forwards/s" if done else ""
        note = f"loss {self._loss:.3f}{speed}"
        self._progress.update(self._training, completed=step, note=note)
        if self._progress.disable and now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            left = f", {seconds / done * (self._steps - step) * forwards / step:.0f} s left" if done else ""
            console.print(f"step {step}/{self._steps}, {note}{left}", highlight=False)

    def evaluated(self, line: dict[str, Any]) -> None:
        """See `Listener.evaluated`."""
        text = f"step {line['step']:>5}: held-out {line['metric']} {_share(line)}, loss {line['loss']:.3f}"
        if line.get("empty"):
            text += f", {line['empty']} empty answers"
        if "prior_corrected" in line:
            text += f"; prior-corrected {_share(line['prior_corrected'])}, loss {line['prior_corrected']['loss']:.3f}"
        console.print(text, highlight=False)


def show_results(results: dict[str, Any], folder: Path) -> None:
    """Accuracy before and after, with the baseline that keeps it honest."""
    table = Table(
        title=f"{results['heldout_rows']} held-out examples, {results['forwards']:,} forward passes of training"
    )
    for heading in ("", f"{results['after']['metric']} (1 standard error)", "95 % interval", "loss"):
        table.add_column(heading)
    names = {"before": "before", "prior_corrected": "prior-corrected, weights untouched", "after": "after"}
    for key, name in names.items():
        if (row := results[key]) is not None:
            table.add_row(name, _share(row), _interval(row), f"{row['loss']:.3f}")
    console.print(table)
    if results["prior_corrected"] is not None:
        console.print(PRIOR_CORRECTED, highlight=False, soft_wrap=True)
    if refused := results["refused_steps"]:
        console.print(
            f"{refused:,} of {results['steps']:,} steps were refused: their losses were not finite. Lower lr or eps.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if not math.isfinite(results["after"]["loss"]):
        console.print(
            "The trained model's loss is no number: it is broken, and its accuracy means nothing.", style="bold red",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"Run folder: {folder}  (curves.png, ledger.jsonl, model/)", highlight=False, soft_wrap=True)


def show_evaluation(rows: dict[str, dict[str, Any]], config: TrainConfig, count: int) -> None:
    """Held-out numbers, a row for each way of asking."""
    table = Table(title=f"{config.model} on {config.task}, {count} held-out examples")
    metric = next(iter(rows.values()))["metric"]
    for heading in ("", f"{metric} (1 standard error)", "95 % interval", "loss"):
        table.add_column(heading)
    for name, row in rows.items():
        table.add_row(name, _share(row), _interval(row), f"{row['loss']:.3f}")
    console.print(table)
    for name, row in rows.items():
        if "empty" in row:
            others = ", ".join(f"{key} {row[key]:.3f}" for key in ("f1", "exact") if key in row and key != metric)
            notes = f"{row['empty']} empty answers, {row['unfinished']} cut off by their length"
            console.print(f"{name}: {', '.join(filter(None, (others, notes)))}", highlight=False)


def show_methods() -> None:
    """One row per method, then one per rule."""
    table = Table(title="methods: how a gradient is estimated from losses")
    for heading in ("method", "paper", "forwards per step", "extra memory per trained parameter", "needs"):
        table.add_column(heading, no_wrap=heading == "method")
    for row in method_rows():
        table.add_row(*row)
    console.print(table)
    table = Table(title="rules: how an estimate moves the weights")
    for heading in ("rule", "extra memory per trained parameter"):
        table.add_column(heading)
    for name in RULES:
        table.add_row(name, make_rule(name).extra_state)
    console.print(table)


def method_rows() -> list[tuple[str, str, str, str, str]]:
    """Name, paper, forwards per step with the default options, extra memory, needs: of every method."""
    rows = []
    for name in METHODS:
        made = make_method(name, EXAMPLES.get(name))
        needs = ", ".join(NEEDS[need] for need in sorted(made.needs)) or "nothing"
        rows.append((name, made.paper, FORWARDS.get(name, f"{made.forwards:g}"), made.extra_state, needs))
    return rows


def show_tasks() -> None:
    """One row per task."""
    table = Table()
    for heading in ("task", "kind", "objective", "rows from"):
        table.add_column(heading)
    for name, task in TASKS.items():
        where = "a Python package" if task.packaged else task.hub.path if task.hub else "a folder"
        table.add_row(name, task.kind, task.default_objective, where)
    console.print(table)


def _share(numbers: dict[str, Any]) -> str:
    return f"{numbers[numbers['metric']]:.3f} ± {numbers['standard_error']:.3f}"


def _interval(numbers: dict[str, Any]) -> str:
    low, high = numbers["interval"]
    return f"{low:.3f} to {high:.3f}"
