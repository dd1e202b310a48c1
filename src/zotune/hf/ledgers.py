"""The ledger of a trainer's run: begun, cut back to a checkpoint, and laid beside every model that is saved."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from zotune.core.ledger import has_header, read_ledger
from zotune.errors import ConfigError

NAME = "ledger.jsonl"  # beside a saved model
RECORD = "zotune.json"  # what was done, in numbers, beside a saved model
logger = logging.getLogger(__name__)


def ledger_path(arguments: Any) -> Path | None:
    """Where the run writes its ledger: a relative path is meant within the output folder. None: nowhere."""
    return None if arguments.ledger is None else Path(arguments.output_dir) / arguments.ledger


def begin(path: Path) -> None:
    """Make room for a new run's ledger; that of an earlier run in this folder is moved aside, never written over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if has_header(path):
        _move_aside(path)


def go_back(path: Path, checkpoint: Path) -> Any:
    """Bring the ledger to where a checkpoint stands; returns what its header says of the base weights.

    The steps after the checkpoint are taken again, and give the same lines.

    Raises:
        ConfigError: the checkpoint has no ledger.
    """
    kept = checkpoint / NAME
    if not has_header(kept):
        raise ConfigError(
            f"{checkpoint} holds no {NAME}: its run wrote no ledger, so none can go on. Resume it with ledger=None."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.read_bytes()
    if has_header(path) and not path.read_bytes().startswith(whole):
        _move_aside(path)
    shutil.copyfile(kept, path)
    return read_ledger(path).header.get("base")


def lay_beside(folder: Path, path: Path | None, record: dict[str, Any]) -> None:
    """Put the ledger as it stands, and what was done, beside a saved model."""
    if path is not None and path.is_file() and path.resolve() != (folder / NAME).resolve():
        shutil.copyfile(path, folder / NAME)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `lay_beside` wrote there; empty if nothing."""
    path = checkpoint / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    logger.warning("%s is the ledger of another run; it was moved to %s", path, aside.name)
