"""Accuracy beside its costs in one table, and what follows from it in one sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from zotune.baselines.meter import Usage
from zotune.errors import DataError
from zotune.evaluation.evaluate import Evaluation

HEADINGS = ("", "{} (1 standard error)", "loss", "forward-equivalents", "seconds", "memory beside the model")
CLEAR = 2.0
"""Standard errors from which on a difference of accuracies counts."""
LEANER = 0.8
"""A share of the memory from which on it is worth a word."""


@dataclass(frozen=True)
class Row:
    """One way of doing the task: how good it is and what it takes to get there (not what it takes to evaluate it)."""

    what: str
    accuracy: float
    standard_error: float
    loss: float
    forwards: float = 0.0
    """Forward-equivalents, in passes over one batch; rows of one table should have batches of one size."""
    seconds: float | None = None
    memory: int | None = None
    """Bytes at the peak, beside the loaded model."""
    correct: Tensor | None = None
    """(N,) bool, by held-out example: differences between rows are then paired."""
    metric: str = "accuracy"
    """What `accuracy` holds, where it is another share: f1."""

    @classmethod
    def of(cls, what: str, evaluation: Evaluation, *, forwards: float = 0.0, usage: Usage | None = None) -> "Row":
        """A row from an evaluation, what was spent, and what was measured."""
        chosen = evaluation.scores.argmax(1)
        right = evaluation.right or tuple((int(label),) for label in evaluation.labels)
        correct = torch.tensor([option in options for option, options in zip(chosen.tolist(), right, strict=True)])
        return cls(
            what,
            evaluation.accuracy,
            evaluation.standard_error,
            evaluation.mean_loss,
            forwards,
            None if usage is None else usage.seconds,
            None if usage is None else usage.memory,
            correct,
        )


def comparison_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(*_headings(rows), caption=verdict(rows), caption_justify="left")
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def comparison_markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown, the sentence below the table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (_headings(rows), *_cells(rows))]
    lines.insert(1, "|" + "---|" * len(HEADINGS))
    return "\n".join(lines) + f"\n\n{verdict(rows)}\n"


def verdict(rows: Sequence[Row]) -> str:
    """Which row to take, in one sentence.

    Rows are as good as the best if their accuracy is within two standard errors of the difference. Of those, the one with
    the fewest forward-equivalents is named, and what to do if its memory is not there.

    Raises:
        DataError: there are no rows, or they were evaluated on different numbers of examples.
    """
    if not rows:
        raise DataError("there are no rows to compare; at least one is needed.")
    if len({len(row.correct) for row in rows if row.correct is not None}) > 1:
        raise DataError("the rows were evaluated on different numbers of held-out examples, so they do not compare.")
    if len(rows) == 1:
        (row,) = rows
        return f"{row.what}: {row.metric} {_share(row)} after {_forwards(row)}. Nothing was run to compare it with."
    best = max(rows, key=lambda row: row.accuracy)
    good = [row for row in rows if best.accuracy - row.accuracy <= CLEAR * _error_of_difference(best, row)]
    pick = min(good, key=lambda row: (row.forwards, _memory(row), -row.accuracy))
    return f"Use {pick.what} here: {_reason(pick, best, good)}{_otherwise(pick, good, rows)}."


def _reason(pick: Row, best: Row, good: Sequence[Row]) -> str:
    text = f"{pick.metric} {_share(pick)} after {_forwards(pick)}"
    if pick is not best:
        return text + f", within two standard errors of the best ({best.what}, {_share(best)}, {_forwards(best)})"
    if len(good) > 1:
        return text + ", the best, and nothing as good is cheaper"
    return text + ", clearly the best"


def _otherwise(pick: Row, good: Sequence[Row], rows: Sequence[Row]) -> str:
    """What to take if the pick's memory is not there: as good if there is such a row, else the most accurate one."""
    if pick.memory is None:
        return ""
    leaner = [row for row in rows if row.memory is not None and row.memory < LEANER * pick.memory]
    if not leaner:
        return ""
    as_good = [row for row in leaner if any(row is other for other in good)]
    other = min(as_good, key=_memory) if as_good else max(leaner, key=lambda row: row.accuracy)
    verb = "is as good" if as_good else "reaches"
    return (
        f"; if its {_bytes(pick.memory)} do not fit beside the model, {other.what} {verb} ({_share(other)}) "
        f"in {_bytes(other.memory)} after {_forwards(other)}"
    )


def _error_of_difference(one: Row, other: Row) -> float:
    """Of the accuracies: paired where both rows say which examples they got right, else as if drawn apart (too large)."""
    if one.correct is None or other.correct is None:
        return math.hypot(one.standard_error, other.standard_error)
    difference = one.correct.double() - other.correct.double()
    return float(difference.std(correction=0)) / math.sqrt(len(difference))


def _headings(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(heading.format(rows[0].metric if rows else "accuracy") for heading in HEADINGS)


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.what,
            _share(row),
            f"{row.loss:.3f}",
            f"{row.forwards:,.0f}",
            "-" if row.seconds is None else f"{row.seconds:,.1f}",
            _bytes(row.memory),
        )
        for row in rows
    ]


def _share(row: Row) -> str:
    return f"{row.accuracy:.3f} ± {row.standard_error:.3f}"


def _forwards(row: Row) -> str:
    return f"{row.forwards:,.0f} forward-equivalents" if row.forwards else "no training"


def _memory(row: Row) -> float:
    return math.inf if row.memory is None else row.memory


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
