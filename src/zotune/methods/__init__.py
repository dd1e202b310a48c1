"""Methods: one paper per file. The registry is a plain dict; add a line for a new method."""

from dataclasses import MISSING, fields
from typing import Any

from zotune.core.errors import ConfigError
from zotune.core.registry import check_name, check_options
from zotune.core.step import Method
from zotune.methods.mezo import MeZO

METHODS: dict[str, type] = {
    "mezo": MeZO,
}


def make_method(method: "str | Method", options: dict[str, Any] | None = None) -> Method:
    """A method from its name and options, or the method itself.

    Raises:
        ConfigError: unknown name or option (the nearest known one is suggested), or an option out of range.
    """
    if not isinstance(method, str):
        if options:
            raise ConfigError("Method options go with a method's name; a method object already has its own.")
        return method
    check_name("method", method, METHODS)
    made: Method = METHODS[method](**check_options("method", method, METHODS[method], options or {}))
    return made


def defaults(method: str) -> dict[str, Any]:
    """A method's options and their default values."""
    return {f.name: f.default for f in fields(METHODS[method]) if f.default is not MISSING}
