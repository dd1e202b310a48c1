"""What a task is: a prompt built from a row, what may follow it, which of that is right, and where the rows come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zotune.errors import ConfigError, DataError
from zotune.tasks.template import Words, fields_of, parse, render

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
Label = int | str | bool
NEW_TOKENS = 50
"""Most tokens of a generated answer, as in MeZO."""


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows lie on the Hugging Face hub, for ``datasets.load_dataset(path, config, split=...)``."""

    path: str
    config: str | None = None
    train: str = "train"
    validation: str = "validation"


@dataclass(frozen=True)
class Task:
    """A prompted task. What its ``options`` are says of which kind it is:

    * classification: a mapping from label to text, the same for every row;
    * choice: templates or a function of the row; several options may be right;
    * generation: none; the model writes, and is compared with the row's ``answers``.

    The template is data: read it in ``catalogue.py`` and add another entry, or write a file, to add a task.
    """

    name: str
    prompt: str | Callable[[Row], str]
    """A template over the row's fields (see ``template.py``), or a function of the row."""
    options: Mapping[Any, str] | tuple[str, ...] | Callable[[Row], Sequence[str]]
    """What may follow the prompt, in the order of the scores; a leading space counts."""
    source: str
    """Who made the rows, in a line."""
    licence: str
    note: str = ""
    calibration: str = ""
    """Template of the prompt without its content, for surface-form calibration."""
    label_field: str = "label"
    label_names: Mapping[Any, Label] = field(default_factory=dict)
    """Other ways in which rows write labels, and what they mean: a label of ``options``, or an option's number."""
    right: Callable[[Row], Sequence[int]] | None = None
    """Numbers of the right options of a row, the one to teach first, where ``label_field`` does not say it."""
    answers: str | Callable[[Row], Sequence[str]] | None = None
    """Generation: the right answers, any of which counts and the first of which is taught; a field or a function."""
    words: Words = field(default_factory=dict)
    """For some fields, the words that stand for their values in templates."""
    unfold: Callable[[Row], Sequence[dict[str, Any]]] | None = None
    """From a row in any form in which the set is distributed to rows with the fields of the templates."""
    fields: tuple[str, ...] = ()
    """Fields that functions read; templates name their own."""
    objective: str | None = None
    """What is trained on unless something else is asked for; None takes the kind's."""
    reward: Callable[[str, Row], float] | None = None
    """Generation: the score of a text, where comparing with answers is not the point."""
    dev_rows: int = 500
    """Rows of the training split that the protocol keeps for choosing a checkpoint."""
    hub: HubSource | None = None
    packaged: Callable[[Callable[[str], None]], dict[str, Rows]] | None = None
    """Loads rows that a Python package brings, reporting progress to its argument."""
    overlaps: frozenset[str] = field(default_factory=frozenset)
    """Names of tasks that share sentences with this one: training here and evaluating there proves nothing."""

    def __post_init__(self) -> None:
        if not callable(self.options):
            texts = list(self.options.values() if isinstance(self.options, Mapping) else self.options)
            if self.answers is None and len(texts) < 2:
                raise ConfigError(f"task {self.name!r} has {len(texts)} option(s); a choice needs at least 2.")
            labels = list(self.options) if isinstance(self.options, Mapping) else list(range(len(texts)))
            for label, text in zip(labels, texts, strict=True):
                if not isinstance(text, str) or not text.strip():
                    raise ConfigError(
                        f"task {self.name!r} has {text!r} as the option for label {label!r}; words are needed."
                        + ("" if isinstance(text, str) else ' In YAML, put quotes around it: "Yes".')
                    )
            if len(set(texts)) < len(texts):
                raise ConfigError(
                    f"task {self.name!r} has the same words for two of its options: {', '.join(map(repr, texts))}."
                )
        if self.answers is not None and self.options != ():
            raise ConfigError(f"task {self.name!r} has both options and answers; a task is answered by one of them.")
        for template in self._templates():
            parse(template)

    @property
    def kind(self) -> str:
        """One of "classification", "choice" and "generation"."""
        if self.answers is not None:
            return "generation"
        return "classification" if isinstance(self.options, Mapping) else "choice"

    @property
    def default_objective(self) -> str:
        """The name of what is trained on unless something else is asked for (MeZO's choice per kind)."""
        return self.objective or ("classification" if self.kind == "classification" else "lm")

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """The fields a row must have beside the label."""
        named = [name for template in self._templates() for name in fields_of(template)]
        if isinstance(self.answers, str):
            named.append(self.answers)
        return tuple(dict.fromkeys([*named, *self.fields]))

    def _templates(self) -> list[str]:
        options = self.options if isinstance(self.options, tuple) else ()
        return [text for text in (self.prompt, *options, self.calibration) if isinstance(text, str)]


@dataclass(frozen=True)
class Example:
    """One question in words."""

    prompt: str
    options: tuple[str, ...]
    """The texts that may follow the prompt; for generation one, the answer to teach."""
    label: int
    """The option to teach."""
    right: tuple[int, ...] = ()
    """All right options, where there are more than ``label``."""
    answers: tuple[str, ...] = ()
    """Generation: the texts that count as right."""
    row: Row | None = field(default=None, compare=False, repr=False)
    """What it was made from."""


def make_example(task: Task, row: Row, *, index: int | None = None, where: str = "") -> Example:
    """Put one row into words.

    Args:
        task: the template.
        row: field name to value, as ``task.unfold`` leaves them; extra fields are ignored.
        index: the row's number from 0, for the error message.
        where: the split or file the row is from, for the error message.

    Raises:
        DataError: a field is missing or no text, or the label is not one of the task's.
    """
    place = f"row {'?' if index is None else index}{f' of {where}' if where else ''} (task {task.name!r})"
    labelled = task.kind != "generation" and task.right is None
    for name in (*task.needed_fields, *((task.label_field,) if labelled else ())):
        if name not in row:
            have = ", ".join(map(str, row)) or "no field at all"
            raise DataError(f"{place} has no field {name!r}; it has {have}. Rename the field or choose another task.")
    prompt = task.prompt(row) if callable(task.prompt) else render(task.prompt, row, task.words, place)
    prompt = prompt.lstrip()
    if task.kind == "generation":
        answers = _answers(task, row, place)
        return Example(prompt, (f" {answers[0]}\n",), 0, answers=answers, row=row)
    options = _options(task, row, place)
    right = _right(task, row, len(options), place)
    return Example(prompt, options, right[0], right if len(right) > 1 else (), row=row)


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


def calibration_example(task: Task, example: Example) -> Example:
    """The example with its content taken out of the prompt; the options stay.

    Raises:
        ConfigError: the task has no options to calibrate.
    """
    if task.kind == "generation":
        raise ConfigError(f"task {task.name!r} is one of generation; only options can be calibrated.")
    prompt = render(task.calibration, example.row or {}, task.words, f"a row (task {task.name!r})").strip(" ")
    # the bare prompt may be empty; what then stands at the front is the option, which loses its space, as in MeZO
    options = example.options if prompt else tuple(option.lstrip(" ") for option in example.options)
    if prompt and not prompt.endswith("\n") and example.prompt.endswith(" "):
        prompt += " "  # the options come without the space that parts them from the prompt
    return Example(prompt, options, example.label, example.right, row=example.row)


def _options(task: Task, row: Row, place: str) -> tuple[str, ...]:
    if isinstance(task.options, Mapping):
        return tuple(task.options.values())
    if callable(task.options):
        return tuple(task.options(row))
    return tuple(render(option, row, task.words, place) for option in task.options)


def _right(task: Task, row: Row, count: int, place: str) -> tuple[int, ...]:
    if task.right is not None:
        right = tuple(task.right(row))
        if not right or not all(0 <= number < count for number in right):
            raise DataError(
                f"{place} has {count} option(s), and of these {list(right)} are right; one or more must be."
            )
        return right
    label = row[task.label_field]
    labels: list[Label] = list(task.options) if isinstance(task.options, Mapping) else list(range(count))
    if isinstance(label, (int, str)) and label in task.label_names:
        label = task.label_names[label]
    if not isinstance(label, (int, str)) or label not in labels:
        hint = " Labels of -1 mark rows whose label is withheld; use a labelled split." if label in (-1, "") else ""
        allowed = ", ".join(map(repr, [*labels, *task.label_names]))
        raise DataError(f"{place} has label {label!r}; allowed are {allowed}.{hint}")
    return (labels.index(label),)


def _answers(task: Task, row: Row, place: str) -> tuple[str, ...]:
    found = row[task.answers] if isinstance(task.answers, str) else task.answers(row) if task.answers else ()
    answers = [found] if isinstance(found, str) else list(found)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(f"{place} has the answers {answers!r}; one or more texts that are not empty are needed.")
    return tuple(answers)


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
