"""Rows of a task: from a folder of JSON lines, from a Python package, or from the hub; and choosing among them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zotune.cache import Say, silent
from zotune.core.errors import ConfigError, DataError
from zotune.extras import require
from zotune.tasks.task import HubSource, Rows, Task, make_examples

SPLITS = ("train", "validation")
Item = TypeVar("Item")


def load_rows(task: Task, *, data_folder: Path | None = None, say: Say = silent) -> dict[str, Rows]:
    """Load the rows of a task and check every one against its template.

    Args:
        task: what the rows are for.
        data_folder: holds ``train.jsonl`` and ``validation.jsonl``, one JSON object a line; None takes the rows that
            a Python package brings, else those of the hub.
        say: receives progress lines.

    Returns:
        ``{"train": rows, "validation": rows}``, in the order of their source.

    Raises:
        DataError: files missing, empty or malformed; a row that does not fit the task; the hub out of reach.
        MissingExtraError: the hub is asked and ``datasets`` is not installed.
    """
    if data_folder is not None:
        rows = {split: read_jsonl(Path(data_folder) / f"{split}.jsonl") for split in SPLITS}
    elif task.packaged is not None:
        rows = task.packaged(say)
    elif task.hub is not None:
        rows = _load_hub(task.hub, task.name, say)
    else:
        raise DataError(f"task {task.name!r} brings no rows; give a folder with train.jsonl and validation.jsonl.")
    for split in SPLITS:
        where = f"{Path(data_folder) / split}.jsonl" if data_folder is not None else f"the {split} split"
        make_examples(task, rows[split], where=where)
    return rows


def read_jsonl(path: Path) -> Rows:
    """Read a file of JSON objects, one a line; blank lines are passed over.

    Raises:
        DataError: no such file, no rows, or a line that is no JSON object (its number is named).
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; needed are {' and '.join(f'{split}.jsonl' for split in SPLITS)}.")
    rows: Rows = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                rows.append(_parse_line(line, path, number))
    if not rows:
        raise DataError(f"{path} is empty; one JSON object a line is needed.")
    return rows


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # both bad UTF-8 and bad JSON
        raise DataError(f"{path}, line {number}, is not JSON in UTF-8: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}, holds a {type(row).__name__}; a JSON object is needed.")
    return row


def choose_rows(rows: Sequence[Item], count: int | None, *, seed: int) -> list[Item]:
    """Choose ``count`` rows in random order: the head of a permutation, so a larger count contains a smaller one.

    Args:
        rows: what to choose from.
        count: how many; None, or more than there are, gives all. Callers print the number they got.
        seed: of a local generator; global random state is neither read nor moved.

    Raises:
        ConfigError: count is not positive.
        DataError: there are no rows.
    """
    if count is not None and count < 1:
        raise ConfigError(f"the number of rows must be at least 1, got {count}.")
    if not rows:
        raise DataError("there are no rows to choose from; at least one is needed.")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in order[:count].tolist()]


def _load_hub(hub: HubSource, task_name: str, say: Say) -> dict[str, Rows]:
    datasets = require("datasets", extra="hf", purpose=f"load task {task_name!r} from the hub")
    say(f"loading {hub.path} {hub.config or ''} from the hub")
    rows: dict[str, Rows] = {}
    for split, name in zip(SPLITS, (hub.train, hub.validation), strict=True):
        try:
            table = datasets.load_dataset(hub.path, hub.config, split=name)
        except Exception as error:  # connection, missing set, missing split, bad cache: each its own kind
            raise DataError(
                f"task {task_name!r} cannot be loaded from the hub ({hub.path}, split {name!r}): {error}\n"
                "Offline, give a folder with train.jsonl and validation.jsonl, or take the task 'vader_movie', whose "
                "rows come with a Python package."
            ) from error
        rows[split] = [dict(row) for row in table]
    return rows
