"""A task from a file: YAML or JSON with the fields of ``Task``, or a Python file that makes one."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from zotune.core.registry import suggest
from zotune.errors import ConfigError
from zotune.tasks.importing import find_object
from zotune.tasks.task import HubSource, Task

READERS: dict[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
CODE = ("right", "unfold", "packaged", "fields", "overlaps")
"""Settings of a task that need Python."""
SETTINGS = tuple(item.name for item in fields(Task) if item.name not in CODE)
TEXTS = ("name", "prompt", "source", "licence", "note", "calibration", "label_field", "objective", "answers")


def names_a_file(name: str) -> bool:
    """Whether a task's name is the path of a file."""
    return Path(name).suffix in READERS or name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def load_task(name: str) -> Task:
    """Load a task: from ``path.yaml``, ``path.yml``, ``path.json``, or ``path.py:NAME`` (``path.py``: its ``TASK``).

    Raises:
        ConfigError: no such file, or it does not describe a task; the message names the setting.
    """
    if Path(name).suffix in READERS:
        return _from_settings(Path(name).expanduser())
    reference = f"{name}:TASK" if name.endswith(".py") else name
    made = find_object(reference, "the task")
    if not isinstance(made, Task):
        raise ConfigError(f"{reference} is a {type(made).__name__}; a zotune.tasks.task.Task is needed.")
    return made


def _from_settings(path: Path) -> Task:
    if not path.is_file():
        raise ConfigError(f"there is no task file {path}.")
    try:
        settings = READERS[path.suffix](path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path} holds a {type(settings).__name__}; settings of a task are needed, at least a prompt."
        )
    settings = {"name": path.stem, "options": (), "source": str(path), "licence": "not stated", **settings}
    for key in settings:
        if key not in SETTINGS:
            hint = " It needs Python: see docs/tasks.md." if key in CODE else suggest(str(key), SETTINGS)
            raise ConfigError(f"{path} sets {key!r}, which a task file cannot.{hint} Known: {', '.join(SETTINGS)}.")
    if "prompt" not in settings:
        raise ConfigError(f"{path} has no prompt; a template such as '{{text}} It was' is needed.")
    for key in TEXTS:
        if key in settings and not isinstance(settings[key], str):
            raise ConfigError(f"{path} has {settings[key]!r} as {key!r}; a text is needed.")
    return Task(**{key: CONVERTED[key](value, path) if key in CONVERTED else value for key, value in settings.items()})


def _options(value: Any, path: Path) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, dict):
        return value
    raise ConfigError(
        f"{path} has {value!r} as options; a mapping from label to text, or a list of templates, is needed."
    )


def _hub(value: Any, path: Path) -> HubSource:
    known = [item.name for item in fields(HubSource)]
    if not isinstance(value, dict) or "path" not in value or not set(value) <= set(known):
        raise ConfigError(f"{path} has {value!r} as hub; a mapping with {', '.join(known)} is needed, path at least.")
    return HubSource(**value)


def _count(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path} has {value!r} as dev_rows; a whole number from 1 on is needed.")
    return value


def _mapping(value: Any, path: Path) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} has {value!r} as words or label_names; a mapping is needed.")
    return value


def _function(value: Any, path: Path) -> Any:
    """A function by name; a file is looked for beside the task's own."""
    place, _, name = str(value).rpartition(":")
    if place.endswith(".py"):
        value = f"{path.parent / place}:{name}"
    return find_object(str(value), "the reward")


CONVERTED: dict[str, Callable[[Any, Path], Any]] = {
    "options": _options,
    "hub": _hub,
    "dev_rows": _count,
    "words": _mapping,
    "label_names": _mapping,
    "reward": _function,
}
