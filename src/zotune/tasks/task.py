"""What a task is: a prompt built from a row, options in words for the labels, and where the rows come from."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zotune.core.errors import ConfigError, DataError

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
Label = int | str | bool


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows lie on the Hugging Face hub, for ``datasets.load_dataset(path, config, split=...)``."""

    path: str
    config: str | None = None
    train: str = "train"
    validation: str = "validation"


@dataclass(frozen=True)
class Task:
    """A prompted classification task, answered by the option that the model finds most likely.

    The template is data: read it in ``catalogue.py`` and add another entry to add a task.
    """

    name: str
    prompt: str | Callable[[Row], str]
    """A format string over the row's fields (text fields lose outer spaces), or a function of the row."""
    options: Mapping[Label, str]
    """From label to the text that follows the prompt, in the order of the scores; a leading space counts."""
    source: str
    """Who made the rows, in a line."""
    licence: str
    note: str = ""
    calibration: str = ""
    """The prompt without its content, for methods that calibrate on it."""
    label_field: str = "label"
    fields: tuple[str, ...] = ()
    """Fields that a prompt function reads; a format string names its own."""
    hub: HubSource | None = None
    packaged: Callable[[Callable[[str], None]], dict[str, Rows]] | None = None
    """Loads rows that a Python package brings, reporting progress to its argument."""
    overlaps: frozenset[str] = field(default_factory=frozenset)
    """Names of tasks that share sentences with this one: training here and evaluating there proves nothing."""

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise ConfigError(f"task {self.name!r} has {len(self.options)} option(s); a choice needs at least 2.")
        if empty := [label for label, text in self.options.items() if not text.strip()]:
            raise ConfigError(f"task {self.name!r} has an empty option for label {empty[0]!r}; words are needed.")

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """The fields a row must have beside the label."""
        if isinstance(self.prompt, str):
            return tuple(name for _, name, _, _ in string.Formatter().parse(self.prompt) if name)
        return self.fields


@dataclass(frozen=True)
class Example:
    """One question in words: the prompt, the texts that may follow it, and the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    label: int


def make_example(task: Task, row: Row, *, index: int | None = None, where: str = "") -> Example:
    """Put one row into words.

    Args:
        task: the template.
        row: field name to value; extra fields are ignored.
        index: the row's number from 0, for the error message.
        where: the split or file the row is from, for the error message.

    Raises:
        DataError: a field is missing or no text, or the label is not one of the task's.
    """
    place = f"row {'?' if index is None else index}{f' of {where}' if where else ''} (task {task.name!r})"
    for name in (*task.needed_fields, task.label_field):
        if name not in row:
            have = ", ".join(map(str, row)) or "no field at all"
            raise DataError(f"{place} has no field {name!r}; it has {have}. Rename the field or choose another task.")
    label = row[task.label_field]
    labels = list(task.options)
    if not isinstance(label, (int, str)) or label not in labels:
        hint = " Labels of -1 mark rows whose label is withheld; use a labelled split." if label == -1 else ""
        raise DataError(f"{place} has label {label!r}; allowed are {', '.join(map(repr, labels))}.{hint}")
    return Example(_prompt(task, row, place), tuple(task.options.values()), labels.index(label))


def make_examples(task: Task, rows: Sequence[Row], *, where: str = "") -> list[Example]:
    """Put rows into words; see ``make_example``.

    Raises:
        DataError: there are no rows, or one of them does not fit the task.
    """
    if not rows:
        raise DataError(
            f"there are no rows{f' in {where}' if where else ''} for task {task.name!r}; one or more are needed."
        )
    return [make_example(task, row, index=index, where=where) for index, row in enumerate(rows)]


def _prompt(task: Task, row: Row, place: str) -> str:
    if not isinstance(task.prompt, str):
        return task.prompt(row)
    values = {}
    for name in task.needed_fields:
        value = row[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{place} has {value!r} as {name!r}; a text that is not empty is needed.")
        values[name] = value.strip()
    return task.prompt.format(**values)


def refuse_overlap(trained_on: Task, evaluated_on: Task) -> None:
    """Refuse to report on a task whose held-out sentences were in the training rows of another.

    Raises:
        DataError: the two tasks share sentences.
    """
    if evaluated_on.name in trained_on.overlaps or trained_on.name in evaluated_on.overlaps:
        raise DataError(
            f"a model trained on {trained_on.name!r} cannot be evaluated on {evaluated_on.name!r}: their rows are cut "
            "from the same corpus, so held-out sentences of one are training sentences of the other and the accuracy "
            f"would be too good. Evaluate on the validation rows of {trained_on.name!r}, or train on another task."
        )
