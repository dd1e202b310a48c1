"""Masked templates as data, and how a row fills them. Add an entry to add a task.

Templates and words are MeZO's for RoBERTa-large (arXiv 2305.17333, its appendix), which are LM-BFF's (Gao et al. 2021): of
a pair of sentences the first loses its final punctuation and the second begins in lower case.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import Formatter

from zotune.errors import ConfigError, DataError
from zotune.tasks.task import Label, Row

MASK = "{mask}"
FORMS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "open": lambda text: text[:-1].rstrip() if text[-1] in ".?!" else text,
    "lower": lambda text: text[:1].lower() + text[1:],
}


@dataclass(frozen=True)
class MaskedTemplate:
    """How a row becomes a text with one mask, and what stands there for each label."""

    text: str
    """With `{mask}` once, and fields of the row: `{name}`; `{name:open}` without its final punctuation mark;
    `{name:lower}` with a lower-case first letter."""
    words: Mapping[int, str]
    """From label to word, in the order of the scores. A space is put before it when it is encoded."""
    label_field: str = "label"
    aliases: Mapping[str, int] = field(default_factory=dict)
    """Other spellings of labels in rows."""

    def __post_init__(self) -> None:
        """Check that there is a choice, and one place for it."""
        if self.text.count(MASK) != 1 or len(self.words) < 2:
            raise ConfigError(
                f"a masked template needs {MASK} once and two words or more; got {self.text!r}, {self.words}."
            )
        for _, name, form, _ in Formatter().parse(self.text):
            if name is not None and form not in FORMS:
                raise ConfigError(
                    f"{{{name}:{form}}} names no form of a field: there are {', '.join(filter(None, FORMS))}, or none at all."
                )


_REVIEW = "{sentence} It was {mask}."
_SENTIMENT = {0: "terrible", 1: "great"}
_PAIR = "{premise:open}? {mask}, {hypothesis:lower}"
_THREE = {0: "Yes", 1: "Maybe", 2: "No"}
_THREE_NAMES = {"entailment": 0, "neutral": 1, "contradiction": 2}

MASKED_TEMPLATES: dict[str, MaskedTemplate] = {
    "sst2": MaskedTemplate(_REVIEW, _SENTIMENT),
    "vader_movie": MaskedTemplate(_REVIEW, _SENTIMENT),
    "sst5": MaskedTemplate(_REVIEW, {0: "terrible", 1: "bad", 2: "okay", 3: "good", 4: "great"}),
    "snli": MaskedTemplate(_PAIR, _THREE, aliases=_THREE_NAMES),
    "mnli": MaskedTemplate(_PAIR, _THREE, aliases=_THREE_NAMES),
    "rte": MaskedTemplate(_PAIR, {0: "Yes", 1: "No"}, aliases={"entailment": 0, "not_entailment": 1}),
    "trec": MaskedTemplate(
        "{mask}: {text}",
        {0: "Expression", 1: "Entity", 2: "Description", 3: "Human", 4: "Location", 5: "Number"},
        label_field="coarse_label",
    ),
}


def find_masked_template(task: str) -> MaskedTemplate:
    """The masked template of a task.

    Raises:
        ConfigError: there is none.
    """
    if task not in MASKED_TEMPLATES:
        raise ConfigError(
            f"there is no masked template for task {task!r}; there are {', '.join(sorted(MASKED_TEMPLATES))}. "
            "Add one to MASKED_TEMPLATES, or use a causal model."
        )
    return MASKED_TEMPLATES[task]


def fill(template: MaskedTemplate, row: Row) -> tuple[str, str]:
    """The texts before the mask (without the space that would be a token of its own) and after it.

    Raises:
        DataError: a field is missing or holds no words.
    """
    before, after = (part.format_map(_Fields(row)) for part in template.text.split(MASK))
    return before.rstrip(" "), after


class _Text:
    """A row's field in a format string; the format's specification names what is done to it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __format__(self, how: str) -> str:
        return FORMS[how](self.text)


class _Fields(dict[str, _Text]):
    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row

    def __missing__(self, name: str) -> _Text:
        value = self.row.get(name)
        if not isinstance(value, str) or not value.strip(" .?!"):
            have = (
                f"it is {value!r}" if name in self.row else f"the row has {', '.join(map(str, self.row)) or 'no field'}"
            )
            raise DataError(f"the field {name!r} must hold words; {have}.")
        return _Text(value.strip())


def label_index(template: MaskedTemplate, row: Row) -> int:
    """The place of the row's label among the template's words.

    Raises:
        DataError: it is none of them.
    """
    value = row.get(template.label_field)
    label = template.aliases.get(value, value) if isinstance(value, str) else value
    labels = list(template.words)
    if isinstance(label, bool) or not isinstance(label, int) or label not in labels:
        hint = " Labels of -1 mark rows whose label is withheld; leave those rows out." if label == -1 else ""
        known: list[Label] = [*labels, *template.aliases]
        raise DataError(
            f"the label {value!r} in {template.label_field!r} is none of {', '.join(map(repr, known))}.{hint}"
        )
    return labels.index(label)
