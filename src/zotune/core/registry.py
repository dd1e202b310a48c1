"""Names and options of methods, rules and sources: checked, with the nearest known one suggested."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from zotune.core.options import check_kinds, options_of
from zotune.errors import ConfigError


def make(kind: str, known: Mapping[str, Any], given: Any, options: Mapping[str, Any] | None = None) -> Any:
    """An object of a registry by its name and options; or the object given, which brings its own options.

    Raises:
        ConfigError: unknown name or option (the nearest known one is suggested), or an option of another kind or out of range.
    """
    if not isinstance(given, str):
        if options:
            raise ConfigError(f"{kind.capitalize()} options go with a {kind}'s name; an object already has its own.")
        if is_dataclass(given):
            check_kinds(f"{kind} {getattr(given, 'name', type(given).__name__)!r}", type(given), options_of(given))
        return given
    check_name(kind, given, known)
    return known[given](**check_options(kind, given, known[given], options or {}))


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise a ConfigError unless the name is known."""
    if name not in (names := list(known)):
        raise ConfigError(f"Unknown {kind} {name!r}.{suggest(name, names)} Known: {', '.join(names)}.")


def check_options(kind: str, name: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if the dataclass has fields of these names and kinds; else a ConfigError."""
    known = [f.name for f in fields(cls)] if is_dataclass(cls) else []
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{kind.capitalize()} {name!r} has no option {option!r}.{suggest(option, known)} "
                f"Known: {', '.join(known) or 'none'}."
            )
    check_kinds(f"{kind} {name!r}", cls, options)
    return dict(options)


def suggest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?", or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
