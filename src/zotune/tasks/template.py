"""Format strings over the fields of a row: ``{sentence}``, or with changes to its text, ``{sentence:strip|lower}``.

A field's value must be a text that is not empty, except for ``number`` and ``list``. It is taken as it is, outer spaces
included, unless a change says otherwise; braces in it are text.
"""

import string
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from zotune.errors import ConfigError, DataError

Words = Mapping[str, Mapping[str, str]]
"""For a field, the words that stand for its values: ``{"question": {"cause": "because", "effect": "so"}}``."""


def _question(text: str) -> str:
    """First letter upper case, a question mark at the end."""
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else "?")


def _no_period(text: str) -> str:
    """No spaces at the end, and no final period."""
    return text.rstrip().removesuffix(".")


def _first_lower(text: str) -> str:
    """First word lower case, unless it is "I"."""
    first, space, rest = text.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _before_blank(text: str) -> str:
    return _around_blank(text)[0]


def _after_blank(text: str) -> str:
    return _around_blank(text)[1]


def _around_blank(text: str) -> tuple[str, str]:
    if text.count("_") != 1:
        raise ValueError(f"a text with one blank '_' is needed; it has {text.count('_')}")
    before, _, after = text.partition("_")
    return before, after


def _highlights(text: str) -> str:
    """ReCoRD's summary lines as a list."""
    return text.replace("@highlight\n", "- ")


CHANGES: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "question": _question,
    "no_period": _no_period,
    "first_lower": _first_lower,
    "before_blank": _before_blank,
    "after_blank": _after_blank,
    "highlights": _highlights,
}
"""Changes of a text, by their names in a template."""


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number is needed")
    return str(value)


def _list(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("a list that is not empty is needed")
    return ", ".join(str(item) for item in value)


VALUES: dict[str, Callable[[Any], str]] = {"number": _number, "list": _list}
"""What makes a text of another value; comes first: ``{nums:list}``."""


@lru_cache(maxsize=256)
def parse(template: str) -> tuple[tuple[str, str | None, tuple[str, ...]], ...]:
    """Take a template apart: (text before, field or None, changes) for each piece.

    Raises:
        ConfigError: braces do not match, a field is not a plain name, or a change is unknown.
    """
    pieces = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            if field is not None and (not field.isidentifier() or conversion):
                raise ConfigError(f"the template {template!r} asks for {field!r}; a plain field name is needed.")
            changes = tuple(part for part in (spec or "").split("|") if part)
            for place, change in enumerate(changes):
                if change not in CHANGES and (change not in VALUES or place):
                    known = ", ".join([*CHANGES, *VALUES])
                    raise ConfigError(f"the template {template!r} asks for {change!r}; there are {known}.")
            pieces.append((literal, field, changes))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the template {template!r} cannot be read: {error}. Write {{{{ for a brace.") from error
    return tuple(pieces)


def fields_of(template: str) -> tuple[str, ...]:
    """The fields that a template names, each once, in their order."""
    return tuple(dict.fromkeys(field for _, field, _ in parse(template) if field is not None))


def render(template: str, row: Mapping[str, Any], words: Words, place: str) -> str:
    """Fill in a row.

    Args:
        template: the format string.
        row: has every field that the template names.
        words: stand for values of some fields.
        place: which row this is, for the error message.

    Raises:
        DataError: a value is no text, is empty, or has no word for it.
    """
    written = []
    for literal, field, changes in parse(template):
        written.append(literal)
        if field is not None:
            written.append(_filled(row[field], field, changes, words, place))
    return "".join(written)


def _filled(value: Any, field: str, changes: tuple[str, ...], words: Words, place: str) -> str:
    if field in words:
        if value not in words[field]:
            raise DataError(f"{place} has {value!r} as {field!r}; allowed are {', '.join(map(repr, words[field]))}.")
        value = words[field][value]
    try:
        if changes and changes[0] in VALUES:
            text, changes = VALUES[changes[0]](value), changes[1:]
        elif not isinstance(value, str) or not value.strip():
            raise ValueError("a text that is not empty is needed")
        else:
            text = value
        for change in changes:
            text = CHANGES[change](text)
    except ValueError as error:
        raise DataError(f"{place} has {value!r} as {field!r}; {error}.") from error
    return text
