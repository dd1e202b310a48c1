"""The run folder: what a run leaves behind, written so that a kill or a full disk loses nothing acknowledged.

run.json           settings and versions
ledger.jsonl       every loss: with the base weights, the run itself
metrics.jsonl      held-out accuracy and loss as training went on
snapshot.safetensors  weights and optimizer state of some step, to resume from quickly (removed at the end)
results.json       accuracy before and after, beside the prior-corrected baseline
curves.png         loss and accuracy against forward passes
model/             the trained model and its tokenizer
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zotune.errors import ConfigError, DataError
from zotune.extras import require
from zotune.optim.optimizer import ZO
from zotune.packaged import without_bars
from zotune.runs.alone import alone_in
from zotune.runs.state_file import read_state, write_state


def write_json(path: Path, value: Any) -> None:
    """Write under a temporary name, then rename."""
    _write(path, json.dumps(_finite(value), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf: they become text, as in a ledger."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    """The inverse of `_finite`."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else value


def is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing, or what a write left behind that was cut short."""
    return all(path.name.startswith(".") and path.name.endswith(".tmp") for path in folder.iterdir())


def changed(before: Mapping[str, Any], asked: Mapping[str, Any], leaving: Collection[str] = ()) -> str:
    """In words, which of the settings asked for are others than before, those left out; "" if none is."""
    different = [key for key in asked if key not in leaving and before.get(key) != asked[key]]
    return "; ".join(f"{key} was {before.get(key)!r}, now {asked[key]!r}" for key in different)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; a DataError if it is damaged."""
    try:
        return _entries(path.read_text(encoding="utf-8"))
    except ValueError as error:
        kept = "; the ledger beside it may still be good" if path.with_name("ledger.jsonl").is_file() else ""
        raise DataError(f"{path} is damaged ({error}). Name another folder with --out{kept}.") from error


def _entries(text: str) -> dict[str, Any]:
    made = _numbers(json.loads(text))
    if not isinstance(made, dict):
        raise ValueError(f"it holds a {type(made).__name__} where names and values should be")
    return made


ROWS = "rows"  # beside the settings: the digest of the rows that they draw


class RunFolder:
    """Paths and safe reads and writes of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ledger = self.path / "ledger.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.snapshot = self.path / "snapshot.safetensors"
        self.results = self.path / "results.json"
        self.curves = self.path / "curves.png"
        self.model = self.path / "model"
        self._settings = self.path / "run.json"

    def begun(self, settings: dict[str, Any]) -> bool:
        """Whether a run with these settings was begun here. Writes nothing.

        Raises:
            ConfigError: the folder holds a run with other settings, or something else.
            DataError: it holds one on other rows (of which an older zotune wrote down nothing).
        """
        if not self._settings.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"{self.path} is a file, not a folder. Name another folder with --out.")
            if self.path.is_dir() and not is_unused(self.path):
                raise ConfigError(f"{self.path} is not empty and holds no run. Name another folder with --out.")
            return False
        if not (self.metrics.exists() or self.ledger.exists()):
            return False  # it ended before it had anything to lose
        before = read_json(self._settings)
        if before.get(ROWS, settings.get(ROWS)) != settings.get(ROWS, before.get(ROWS)):
            raise DataError(
                f"{self.path} holds a run on other rows: the data or the task has changed since it began, so that its first "
                "evaluation and its last would not be of the same. Put the rows back, or name another folder with --out."
            )
        if changes := changed(before, settings, leaving=("out", ROWS)):
            raise ConfigError(
                f"{self.path} holds a run with other settings ({changes}). "
                "Name another folder with --out, or give the same settings to resume it."
            )
        return True

    @contextmanager
    def claimed(self, settings: dict[str, Any]) -> Iterator[bool]:
        """Make the folder, and hold it for these settings: no other process runs here meanwhile.

        Yields:
            What `begun` says.

        Raises:
            ConfigError: as `begun`, or another process is at work here.
            DataError: as `begun`.
        """
        with alone_in(self.path):
            resumed = self.begun(settings)
            if not resumed:
                write_json(self._settings, settings)
            yield resumed

    def save_snapshot(self, opt: ZO) -> None:
        """Weights and optimizer state of this step, whole or not at all."""
        weights = {name: slot.tensor for name, slot in opt.weights.slots.items()}
        write_state(self.snapshot, {"weights": weights, "optimizer": opt.state_dict()})

    def load_snapshot(self, opt: ZO) -> None:
        """Take up the snapshot, if there is one."""
        if not self.snapshot.is_file():
            return
        state = read_state(self.snapshot)
        with torch.no_grad():
            for name, slot in opt.weights.slots.items():
                slot.tensor.copy_(state["weights"][name])
        opt.load_state_dict(state["optimizer"])

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """The model in the standard format, whole or not at all."""
        save_model(self.model, model, tokenizer)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Evaluations so far; a torn last line is left out.

        Raises:
            DataError: a line is damaged.
        """
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        try:
            made = [_entries(line.decode("utf-8")) for line in lines if line.endswith(b"\n")]
            if any(not isinstance(line.get("step"), int) for line in made):
                raise ValueError("a line does not say of which step it is")
        except ValueError as error:
            raise DataError(
                f"{self.metrics} is damaged ({error}). Start again in another folder with --out; `zotune replay` rebuilds the "
                "weights from the ledger beside it."
            ) from error
        return made

    def write_metrics(self, metrics: list[dict[str, Any]]) -> None:
        """All evaluations, under a temporary name first."""
        _write(self.metrics, "".join(json.dumps(_finite(line)) + "\n" for line in metrics))


def trained_folder(model: str) -> str:
    """The model inside a run folder, if that is what was named."""
    inside = Path(model) / "model"
    return str(inside) if (Path(model) / "run.json").is_file() and inside.is_dir() else model


def trained_on(model: str) -> str | None:
    """The task that a model in a run folder was trained on; None for any other model, also beside somebody's run.json."""
    settings = Path(model).parent / "run.json"
    if not (Path(model).is_dir() and settings.is_file()):
        return None
    try:
        task = _entries(settings.read_text(encoding="utf-8")).get("task")
    except (OSError, ValueError):
        return None
    return task if isinstance(task, str) else None


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """`save_pretrained` of model and tokenizer into a new folder, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with without_bars(require("transformers", extra="hf", purpose="save language models")):
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it is in the way of everything else
        if type(error).__name__ == "SafetensorError":  # what the library makes of an OSError
            raise OSError(f"{folder} could not be written: {error}") from error
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
