"""Python objects that a user names: ``package.module:name``, or ``path/to/file.py:name``."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from zotune.errors import ConfigError


def find_object(reference: str, what: str) -> Any:
    """Import the object that a reference names. This runs the module's code.

    Args:
        reference: ``module:name`` or ``file.py:name``.
        what: what it is to be, for the error message.

    Raises:
        ConfigError: the reference has another form, or its module or the name in it cannot be found or run.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"{what} is named by module:name or path/to/file.py:name; got {reference!r}.")
    try:
        module = _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"{what} {reference!r} cannot be imported: {type(error).__name__}: {error}. "
            "A module is looked for where Python looks (PYTHONPATH), a file by its path."
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{place} has no {name!r}, which was to be {what}.")
    return getattr(module, name)


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"zotune_user_{path.stem}", path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
