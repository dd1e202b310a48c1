"""Options of methods, rules, sources and tuning modes: the fields of their dataclasses, of the right kind and in range."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from zotune.errors import ConfigError

# What a field's annotation lets in, and what to call it. A whole number will do where a number is needed.
KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
    bool: (bool, "true or false"),
    dict: (Mapping, "options by name"),
    type(None): (type(None), "none"),
}


class Options:
    """A dataclass whose fields are its options, fixed once it is made. `__post_init__` checks their ranges with `check`.

    It is frozen where nothing is remembered. Where something is, other attributes change and the fields still do not.
    """

    part: ClassVar[str] = ""  # what such a thing is called in messages: "method", "rule", ...
    name: ClassVar[str]

    def __setattr__(self, attribute: str, value: Any) -> None:
        """What is remembered changes, options do not: they are in the ledger's header, and checked only once."""
        if attribute in getattr(self, "__dataclass_fields__", ()) and attribute in vars(self):
            raise FrozenInstanceError(f"{attribute} of {self.part} {self.name!r} is fixed; make another {self.part}.")
        super().__setattr__(attribute, value)

    def check(self, option: str, good: bool, needed: str, why: str = "") -> None:
        """Raise a ConfigError that names the option, what was given, what is needed and why, unless `good`."""
        if not good:
            owner = f"{self.part} {self.name!r}".strip()
            given = getattr(self, option)
            raise ConfigError(f"{option} must be {needed}; got {given!r} ({owner}).{' ' + why if why else ''}")


def check_kinds(owner: str, cls: type, options: Mapping[str, Any]) -> None:
    """Raise a ConfigError unless each value is of the kind that the field of that name is annotated with.

    Args:
        owner: what the options belong to, for the message: "method 'mezo'".
        cls: a dataclass. Fields with other annotations than those of KINDS, as users' own may have, are let through.
        options: values by name; names are checked elsewhere.
    """
    try:
        hints = get_type_hints(cls)
    except NameError:  # names that are imported for the type checker alone
        return
    for option, value in options.items():
        kinds = [KINDS.get(get_origin(kind) or kind) for kind in _alternatives(hints[option])]
        known = [kind for kind in kinds if kind is not None]
        if len(known) == len(kinds) and not any(_is(value, kind) for kind, _ in known):
            needed = " or ".join(words for _, words in known)
            raise ConfigError(f"{option} must be {needed}; got {value!r} ({owner}).")


def options_of(made: Any) -> dict[str, Any]:
    """Options and their values: the fields of the dataclass."""
    return {f.name: getattr(made, f.name) for f in fields(made)} if is_dataclass(made) else {}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # True is no number here
