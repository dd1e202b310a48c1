"""The run: visit the tasks round by round, restart the model, keep what was learned; killed runs resume to the same bits.

While it runs its files are in OUT.learning; when it is finished OUT holds the fine-tuner and history.jsonl, a line a
visit, and OUT.learning is gone:

learn.json            settings
start.safetensors     the base model's weights, for restarts (only if there are any)
snapshot.safetensors  everything at some visit
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from zotune.errors import ConfigError
from zotune.finetuner.folder import load_folder, save_folder
from zotune.finetuner.names import assign
from zotune.finetuner.networks import NUMBERS, from_flat
from zotune.finetuner.profile import TOKENS
from zotune.learn.config import LearnConfig
from zotune.learn.cost import plan
from zotune.learn.ground import Ground, prepare
from zotune.learn.learner import Learner
from zotune.learn.start import learned, profile
from zotune.learn.trajectory import file_start
from zotune.runs.alone import alone_in
from zotune.runs.job import Listener
from zotune.runs.run_folder import changed, read_json, write_json
from zotune.runs.state_file import read_state, write_state

FORWARDS = 2 + 3 + 3  # of a visit: two probes, and twice forward and backward (a backward pass is worth two forwards)


def learn(config: LearnConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Learn, or resume, and return the facts that are saved beside the networks.

    Raises:
        ZotuneError: anything wrong with settings, tasks, model or data, before any work starts.
    """
    listener = listener or Listener()
    if (finished := _finished(config)) is not None:
        listener.say(f"{config.out} holds this fine-tuner already; nothing to do. Name another folder with --out.")
        return finished
    folder = _Folder(config)
    folder.check()
    ground = prepare(config, listener)
    window = ground.rounds_per_epoch * config.epochs_per_restart * len(ground.jobs)
    learner = Learner(ground.model, ground.named, config, window)
    listener.plan(plan(ground, learner))
    with alone_in(folder.path):
        folder.check()  # what another process may have begun meanwhile
        history = folder.begin(learner, restarts=config.epochs > config.epochs_per_restart)
        if history:
            listener.say(f"resuming at visit {len(history)}")
        _visits(ground, learner, history, folder, listener)
        facts = _facts(ground, learner, history)
        text = "".join(json.dumps(line) + "\n" for line in history)
        save_folder(config.out, learner.networks, facts, {"history.jsonl": text})
        shutil.rmtree(folder.path)
    return facts


def _visits(
    ground: Ground, learner: Learner, history: list[dict[str, Any]], folder: "_Folder", listener: Listener
) -> None:
    config, tasks = ground.config, len(ground.jobs)
    total = ground.rounds * tasks
    while len(history) < total:
        number = len(history)
        turn, place = divmod(number, tasks)
        if place == 0:
            _round_begins(ground, learner, turn, folder)
        task = ground.order(turn)[place]
        rate = config.rate * (1.0 - number / total if learner.corrected else 1.0)
        visit = learner.visit(task, ground.jobs[task].objective, ground.batch(task, turn), rate)
        line = {"visit": number, "task": task, "loss": visit.loss, "rho": visit.rho, "nf": visit.nf}
        history.append({**line, "moved": learner.moved, "kept": visit.kept, "accepted": visit.accepted})
        listener.step(number + 1, visit.loss, (number + 1) * FORWARDS)
        if (number + 1) % config.snapshot_every == 0 and number + 1 < total:
            folder.snapshot(learner, history)


def _round_begins(ground: Ground, learner: Learner, turn: int, folder: "_Folder") -> None:
    """What happens between rounds: the end of an epoch, and of a window."""
    epoch, inside = divmod(turn, ground.rounds_per_epoch)
    if inside or not epoch:
        return
    if len(ground.jobs) > 1:
        learner.forget_losses()  # as published, where several tasks are visited
    if epoch % ground.config.epochs_per_restart == 0:
        learner.trajectory.restart(folder.start)
        learner.restart()


def _facts(ground: Ground, learner: Learner, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the folder says beside the networks; every trained tensor must have its network."""
    config = ground.config
    names = [slot.site.name for slot in learner.opt.weights]
    networks = learner.networks
    assign(networks.names, names)
    now = from_flat(learner.start.names, learner.flat)
    return {
        "base_model": config.model,
        "eps": config.eps,
        "batch": config.batch_size,
        "world_size": 1,
        "tokens_per_example": TOKENS,
        "networks": "trained",
        "shapes": {slot.site.name: list(slot.site.shape) for slot in learner.opt.weights},
        "recipe": {**config.as_dict(), "lr_mlp": config.rate, "visits": len(history), "averaged": learner.averaged},
        "learned": {
            **learned(now, learner.start),
            "numbers": NUMBERS * len(names),
            **profile(learner.probe.factors_now, [int(count) for count in learner.counts]),
        },
        "refused": sum(not line["accepted"] for line in history),
    }


def _finished(config: LearnConfig) -> dict[str, Any] | None:
    """The facts of the folder, if it was made with these settings; None if there is no such folder."""
    if not Path(config.out).exists():
        return None
    recipe = load_folder(config.out)[1].get("recipe", {})
    asked = json.loads(json.dumps({**config.as_dict(), "lr_mlp": config.rate}))
    different = [key for key in asked if key != "out" and recipe.get(key) != asked[key]]
    if different:
        raise ConfigError(
            f"{config.out} holds a fine-tuner that was made otherwise ({', '.join(different)}). Name a new folder with --out."
        )
    return load_folder(config.out)[1]


class _Folder:
    """OUT.learning: files of a run that is under way."""

    def __init__(self, config: LearnConfig) -> None:
        self.path = Path(f"{config.out}.learning")
        self.start, self._snapshot = self.path / "start.safetensors", self.path / "snapshot.safetensors"
        self._settings, self._asked = self.path / "learn.json", json.loads(json.dumps(config.as_dict()))

    def check(self) -> None:
        """Raise a ConfigError if another run is under way here."""
        if not self._settings.is_file():
            return
        if changes := changed(read_json(self._settings), self._asked):
            raise ConfigError(
                f"{self.path} holds a run with other settings ({changes}). Give the same ones to resume it, name another "
                "folder with --out, or delete that folder."
            )

    def begin(self, learner: Learner, restarts: bool) -> list[dict[str, Any]]:
        """Begin, or take up the snapshot; returns the history so far.

        Raises:
            DataError: the snapshot is damaged.
        """
        if restarts and not self.start.is_file():
            file_start(learner.opt.weights, self.start)
        write_json(self._settings, self._asked)
        if not self._snapshot.is_file():
            return []
        state = read_state(self._snapshot, remedy="Remove it to begin again at the first visit.")
        with torch.no_grad():
            for name, slot in learner.opt.weights.slots.items():
                slot.tensor.copy_(state["weights"][name])
        learner.load_state_dict(state["learner"])
        history: list[dict[str, Any]] = state["history"]
        return history

    def snapshot(self, learner: Learner, history: list[dict[str, Any]]) -> None:
        """Everything, whole or not at all."""
        weights = {name: slot.tensor for name, slot in learner.opt.weights.slots.items()}
        write_state(self._snapshot, {"weights": weights, "learner": learner.state_dict(), "history": history})
