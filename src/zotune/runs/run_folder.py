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
import os
import shutil
from collections.abc import Iterator
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
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; a DataError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}). Name another folder with --out; the ledger beside it may still be good."
        ) from error


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
        """
        if not self._settings.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"{self.path} is a file, not a folder. Name another folder with --out.")
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and holds no run. Name another folder with --out.")
            return False
        if not (self.metrics.exists() or self.ledger.exists()):
            return False  # it ended before it had anything to lose
        before = read_json(self._settings)
        different = [key for key in settings if key != "out" and before.get(key) != settings[key]]
        if different:
            changes = "; ".join(f"{key} was {before.get(key)!r}, now {settings[key]!r}" for key in different)
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
        """Evaluations so far; a torn last line is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def write_metrics(self, metrics: list[dict[str, Any]]) -> None:
        """All evaluations, under a temporary name first."""
        temporary = self.metrics.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
        os.replace(temporary, self.metrics)


def trained_on(model: str) -> str | None:
    """The task that a model in a run folder was trained on; None for any other model."""
    settings = Path(model).parent / "run.json"
    if not (Path(model).is_dir() and settings.is_file()):
        return None
    task: str = read_json(settings)["task"]
    return task


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """`save_pretrained` of model and tokenizer into a new folder, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with without_bars(require("transformers", extra="hf", purpose="save language models")):
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
