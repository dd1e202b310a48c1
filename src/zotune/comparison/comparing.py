"""Compare: ways of doing one task, each from the same model on the same rows, with the same budget of forward passes.

Finished contestants are in `comparison.json`, so a killed comparison goes on with the next one. Their costs are those of
training (or of what stands for it), evaluations left out.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from zotune.baselines import Row, comparison_markdown, draw_comparison
from zotune.baselines.first_order import can_checkpoint, check_trainable, forward_equivalents
from zotune.comparison.contestants import UNTRAINED, Contestant, Ground, find_contestants
from zotune.comparison.turns import Asked, CompareListener, Entry, runner
from zotune.errors import ConfigError, DataError, ZotuneError
from zotune.extras import require
from zotune.optim.parameters import check_choices
from zotune.runs.alone import alone_in
from zotune.runs.config import TrainConfig
from zotune.runs.job import Job, load, make_optimizer
from zotune.runs.run_folder import ROWS, RunFolder, changed, is_unused, read_json, write_json
from zotune.tasks.scoring import OptionScorer
from zotune.version import __version__

IRRELEVANT = ("out", "steps", "eval_every", "snapshot_every")
"""Settings that change no row: each contestant has its own steps (and method: it only says whose the options are)."""


def compare(
    config: TrainConfig,
    contestants: Sequence[str] | None = None,
    *,
    forwards: float = 400,
    demonstrations: int = 8,
    listener: CompareListener | None = None,
) -> list[Entry]:
    """Run all contestants that are not in `config.out` yet, and return all entries, in the order asked for.

    Args:
        config: settings of all; its method, steps and evaluations in between do not matter.
        contestants: `name[:mode][@lr]` of `contestants.UNTRAINED`, a method, `adamw` or `adamw-lora`; None takes the usual
            ones for this kind of task.
        forwards: forward passes over a batch (or their equivalents) that each trained contestant may spend; it takes as
            many whole steps as go into them.
        demonstrations: solved rows before each question of `in-context`.
        listener: is told of progress.

    Raises:
        ZotuneError: anything wrong with settings, contestants, model or data, before any of them starts.
    """
    listener = listener or CompareListener()
    if not 1 <= forwards < math.inf:
        raise ConfigError(
            f"forwards must be at least 1 and finite, got {forwards:g}: the budget of each trained contestant."
        )
    if demonstrations < 1:
        raise ConfigError(f"demonstrations must be at least 1, got {demonstrations}; or leave in-context out.")
    check_choices(config.noise, config.low_precision, config.engine)
    task, wanted = find_contestants(contestants, config)
    require("matplotlib", extra="plot", purpose="draw the comparison")
    store = Store(Path(config.out), _settings(config, forwards, demonstrations))
    left = [contestant for contestant in wanted if contestant.label not in store.entries]
    if left:
        ground = Ground(config, load(config, task, listener))
        steps = {contestant.label: _rehearse(ground, contestant, forwards, demonstrations) for contestant in left}
        with store.claimed(ground.loaded.digest):
            for contestant in left:
                if contestant.label in store.entries:  # another process has finished it meanwhile
                    continue
                listener.contestant(contestant.label, steps[contestant.label])
                entry = _run(ground, contestant, steps[contestant.label], demonstrations, store, listener)
                store.add(entry)
                listener.finished(entry)
            _report([store.entries[contestant.label] for contestant in wanted], config, forwards)
    else:
        _report([store.entries[contestant.label] for contestant in wanted], config, forwards)
    return [store.entries[contestant.label] for contestant in wanted]


def rows_of(entries: Sequence[Entry]) -> list[Row]:
    """Rows of the table: of all entries that did not fail."""
    return [
        Row(
            entry["what"],
            entry[entry["metric"]],
            entry["standard_error"],
            entry["loss"],
            entry["forwards"],
            entry["seconds"],
            entry["memory"],
            None if entry["correct"] is None else torch.tensor([one == "1" for one in entry["correct"]]),
            entry["metric"],
        )
        for entry in entries
        if "failed" not in entry
    ]


def failures(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each contestant that broke off."""
    return [f"{entry['what']} broke off: {entry['failed']}" for entry in entries if "failed" in entry]


def _run(
    ground: Ground, contestant: Contestant, steps: int, demonstrations: int, store: "Store", listener: CompareListener
) -> Entry:
    """An entry of `comparison.json`; a run that breaks off (its loss is no number any more) says so in its own."""
    entry: Entry = {
        "what": contestant.label, "name": contestant.name, "mode": contestant.mode, "lr": contestant.lr, "steps": steps,
    }  # fmt: skip
    if contestant.name == "in-context":
        entry["demonstrations"] = demonstrations
    folder = RunFolder(store.folder / contestant.slug)
    settings = replace(contestant.settings(ground.config, max(steps, 1)), out=str(folder.path))
    job = ground.seat(settings, folder)
    try:
        outcome = runner(contestant)(Asked(job, ground, contestant, demonstrations, listener))
    except ZotuneError as error:
        return {**entry, "failed": str(error)}
    if not math.isfinite(outcome.line["loss"]):
        return {**entry, "failed": f"its held-out loss is {outcome.line['loss']}; lower its learning rate."}
    usage, bits = outcome.usage, outcome.correct
    return {
        **entry,
        **outcome.line,
        "forwards": outcome.forwards,
        "check_forwards": outcome.check_forwards,
        "seconds": None if usage is None else usage.seconds,
        "memory": None if usage is None else usage.memory,
        "memory_how": None if usage is None else usage.how,
        "correct": None if bits is None else "".join("01"[bit] for bit in bits.tolist()),
    }


def _rehearse(ground: Ground, contestant: Contestant, forwards: float, demonstrations: int) -> int:
    """Put everything together once, so that whatever does not fit is said before any work; return the steps to take."""
    settings = contestant.settings(ground.config, max(1, int(forwards)))
    job = ground.seat(settings, RunFolder(ground.config.out))
    if contestant.name in UNTRAINED:
        _check_untrained(job, contestant, demonstrations)
        return 0
    if contestant.first_order:
        check_trainable(job.model)
        each = forward_equivalents(job.model, can_checkpoint(job.model))
    else:
        opt = make_optimizer(job)
        each = opt.method.forwards_for([slot.site for slot in opt.weights])
    if (steps := int(forwards // each)) < 1:
        raise ConfigError(
            f"{contestant.label} spends {each:g} forwards a step, and the budget is {forwards:g}: give --forwards {each:.0f} "
            "or more, or leave it out."
        )
    return steps


def _check_untrained(job: Job, contestant: Contestant, demonstrations: int) -> None:
    if contestant.name != "in-context":
        return
    if not isinstance(job.scorer, OptionScorer):
        raise ConfigError("contestant 'in-context' is for causal models, and this one fills in masks; leave it out.")
    if demonstrations > len(job.train):
        raise DataError(f"there are {len(job.train)} training rows to show and {demonstrations} are asked for.")


class Store:
    """`comparison.json`: the settings that all rows share, and an entry for each contestant that has finished."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Read what is there.

        Raises:
            ConfigError: the folder holds a comparison with other settings, or something else.
        """
        self.folder, self.settings = folder, settings
        self.path = folder / "comparison.json"
        self.entries: dict[str, Entry] = {}
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            before = {"settings": {}, "contestants": [], **read_json(self.path)}
            rows = before["settings"].get(ROWS)
            if before["contestants"] and self.settings.get(ROWS, rows) != rows and rows is not None:
                raise DataError(
                    f"{self.folder} holds a comparison on other rows: the data or the task has changed since. Put the rows "
                    "back, or name another folder with --out."
                )
            changes = changed(before["settings"], self.settings, leaving=(ROWS,))
            if changes and before["contestants"]:
                raise ConfigError(
                    f"{self.folder} holds a comparison with other settings ({changes}). Name another folder with --out, or "
                    "give the same settings to go on with it; other contestants may be added."
                )
            self.entries = {entry["what"]: entry for entry in before["contestants"]}
        elif self.folder.is_dir() and not is_unused(self.folder):
            raise ConfigError(f"{self.folder} is not empty and holds no comparison. Name another folder with --out.")

    @contextmanager
    def claimed(self, rows: str) -> Iterator[None]:
        """Make the folder, and hold it, for these rows; what other processes did meanwhile is read again.

        Raises:
            ConfigError: another process is at work here, or began a comparison with other settings.
            DataError: what is there was compared on other rows.
        """
        with alone_in(self.folder):
            self.settings = {**self.settings, ROWS: rows}
            self._read()
            self._write()
            yield

    def add(self, entry: Entry) -> None:
        """Write down one more contestant, whole or not at all."""
        self.entries[entry["what"]] = entry
        self._write()

    def _write(self) -> None:
        versions = {"zotune": __version__, "torch": torch.__version__, "numpy": np.__version__}
        held = {"settings": self.settings, "versions": versions, "contestants": list(self.entries.values())}
        write_json(self.path, held)


def _settings(config: TrainConfig, forwards: float, demonstrations: int) -> dict[str, Any]:
    passed = IRRELEVANT if config.method_options else (*IRRELEVANT, "method")
    shared = {key: value for key, value in config.as_dict().items() if key not in passed}
    # as JSON has them: keys are text there, tuples are lists
    return cast(
        dict[str, Any], json.loads(json.dumps({**shared, "forwards": forwards, "demonstrations": demonstrations}))
    )


def _report(entries: Sequence[Entry], config: TrainConfig, forwards: float) -> None:
    rows, broken = rows_of(entries), failures(entries)
    if not rows:
        raise DataError("no contestant came to an end: " + " ".join(broken))
    folder, title = (
        Path(config.out),
        f"{config.model} on {config.task}, {forwards:g} forward passes of {config.batch_size}",
    )
    text = "\n".join([f"# {title}\n", comparison_markdown(rows), *(f"{line}\n" for line in broken)])
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    draw_comparison(rows, folder / "comparison.png", title)
