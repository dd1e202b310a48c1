"""Rows of a task: from a folder of JSON lines, from a Python package, or from the hub; and choosing among them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zotune.cache import Say, silent
from zotune.errors import ConfigError, DataError
from zotune.extras import require
from zotune.tasks.task import HubSource, Rows, Task, make_examples

SPLITS = ("train", "validation")
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a set's rows as plain files, for sets that are distributed as a script."""
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
    if task.unfold is not None:
        rows = {split: _unfolded(task, rows[split], split) for split in SPLITS}
    for split in SPLITS:
        where = f"{Path(data_folder) / split}.jsonl" if data_folder is not None else f"the {split} split"
        make_examples(task, rows[split], where=where)
    return rows


def _unfolded(task: Task, rows: Rows, split: str) -> Rows:
    assert task.unfold is not None
    unfolded: Rows = []
    for index, row in enumerate(rows):
        try:
            unfolded.extend(task.unfold(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"row {index} of {split} (task {task.name!r}) has none of the forms in which this set is distributed: "
                f"{type(error).__name__}: {error}."
            ) from error
    return unfolded


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
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if b"\\ud" in line.lower():  # an escape may be half of a pair, which is no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, half of a surrogate pair, brackets without end
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
            table = _ask_hub(datasets, hub, name)
        except Exception as error:  # connection, missing set, missing split, bad cache: each its own kind
            raise DataError(
                f"task {task_name!r} cannot be loaded from the hub ({hub.path}, split {name!r}): {error}\n"
                "Offline, give a folder with train.jsonl and validation.jsonl, or take the task 'vader_movie', whose "
                "rows come with a Python package."
            ) from error
        rows[split] = [dict(row) for row in table]
    return rows


def _ask_hub(datasets: Any, hub: HubSource, split: str) -> Any:
    try:
        return datasets.load_dataset(hub.path, hub.config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    return datasets.load_dataset(hub.path, hub.config, split=split, revision=CONVERTED)


@dataclass(frozen=True)
class ProtocolSplit:
    """The rows of one run of MeZO's protocol."""

    train: Rows
    dev: Rows
    """For choosing a checkpoint; from the training split, and not in ``train``."""
    eval: Rows
    """From the validation split; what is reported."""
    shrunk: bool
    """Whether there were fewer training rows than asked for."""

    @property
    def counts(self) -> str:
        """How many rows of each, in words."""
        note = " (the training split is small: its rows go to dev first)" if self.shrunk else ""
        return f"{len(self.train)} train, {len(self.dev)} dev, {len(self.eval)} eval rows{note}"


def protocol_split(
    task: Task,
    rows: Mapping[str, Rows],
    *,
    seed: int,
    num_train: int = 1000,
    num_dev: int | None = None,
    num_eval: int = 1000,
) -> ProtocolSplit:
    """Draw rows as MeZO does: 1000 for training, 500 for choosing a checkpoint, 1000 for evaluation.

    The first ``num_train + num_dev`` of a permutation of the training split are taken; the last ``num_dev`` of them are
    dev. So a small split shrinks the training part (COPA 300, CB 150, WSC 54 rows). The evaluation rows are the first of
    a permutation of the validation split. The permutations are numpy's of the same seed, made by a generator of their
    own: with rows in the hub's order they are the rows that MeZO's code draws.

    Args:
        task: whose ``dev_rows`` are taken where ``num_dev`` is None.
        rows: as ``load_rows`` gives them.
        seed: the data seed.
        num_train: rows for training.
        num_dev: rows for choosing a checkpoint.
        num_eval: rows for evaluation.

    Raises:
        ConfigError: a number is not positive.
        DataError: no training row would be left.
    """
    num_dev = task.dev_rows if num_dev is None else num_dev
    if min(num_train, num_dev, num_eval) < 1:
        raise ConfigError(f"the numbers of rows must be at least 1, got {num_train}, {num_dev} and {num_eval}.")
    pool = _permuted(rows["train"], seed)[: num_train + num_dev]
    if len(pool) <= num_dev:
        raise DataError(
            f"task {task.name!r} has {len(rows['train'])} training rows, and {num_dev} of them are for choosing a "
            "checkpoint, so none is left to train on. Ask for fewer of those."
        )
    evaluation = _permuted(rows["validation"], seed)[:num_eval]
    shrunk = len(pool) < num_train + num_dev
    return ProtocolSplit(pool[:-num_dev], pool[-num_dev:], evaluation, shrunk)


def _permuted(rows: Rows, seed: int) -> Rows:
    return [rows[index] for index in np.random.RandomState(seed).permutation(len(rows)).tolist()]
