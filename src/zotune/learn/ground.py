"""What is learned on: the base model once, and for each task its rows and what is lowered."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zotune.core.noise import stream, uniform
from zotune.core.site import canonical_name
from zotune.errors import ConfigError
from zotune.learn.config import LearnConfig
from zotune.runs.config import TrainConfig
from zotune.runs.job import Job, Listener, Loaded, draw_rows, load, seat
from zotune.runs.run_folder import RunFolder
from zotune.runs.training import batch_at
from zotune.tasks.catalogue import find_task
from zotune.tasks.objectives import OBJECTIVES
from zotune.tasks.task import Task
from zotune.tuning import Mode, make_mode


@dataclass
class Ground:
    """Model and tasks, loaded and checked."""

    config: LearnConfig
    model: Any
    mode: Mode
    jobs: dict[str, Job]

    @property
    def named(self) -> Any:
        """(canonical name, tensor) pairs, or groups, of what is trained."""
        named = [(canonical_name(name), tensor) for name, tensor in self.model.named_parameters()]
        return self.mode.groups(named, self.config.eps) or named

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which the first task's rows are seen once."""
        return -(-len(next(iter(self.jobs.values())).train) // self.config.batch_size)

    @property
    def rounds(self) -> int:
        """Rounds in all."""
        return self.config.epochs * self.rounds_per_epoch

    def batch(self, task: str, round_number: int) -> list[Any]:
        """The batch of a task in a round; shorter tasks begin again on their own."""
        job = self.jobs[task]
        chosen = batch_at(round_number, len(job.train), self.config.batch_size, self.config.data_seed)
        return [job.train[i] for i in chosen]

    def order(self, round_number: int) -> list[str]:
        """The tasks in the order of this round."""
        names = list(self.jobs)
        if not self.config.shuffle:
            return names
        return sorted(
            names, key=lambda name: uniform(stream(self.config.seed, "order of tasks", round_number, name), 0.0, 1.0)
        )


def prepare(config: LearnConfig, listener: Listener) -> Ground:
    """Load and check everything.

    Raises:
        ZotuneError: anything wrong with settings, tasks, model or data, before any work.
    """
    mode = make_mode(config.mode, config.mode_options)
    for name in config.task_names:  # before the model is loaded
        _check_differentiable(find_task(name))
    settings = {name: _settings(config, name) for name in config.task_names}
    first, *others = config.task_names
    loaded = load(settings[first], find_task(first), listener)
    model = mode.attach(loaded.model, config.seed)
    jobs = {first: _seat(loaded, model, settings[first], listener)}
    for name in others:
        task = find_task(name)
        rows = draw_rows(settings[name], task, listener)
        jobs[name] = _seat(replace(loaded, task=task, rows=rows), model, settings[name], listener)
    return Ground(config, next(iter(jobs.values())).model, mode, jobs)


def _settings(config: LearnConfig, task: str) -> TrainConfig:
    """A task's settings as of a run, all weights trained: the mode is attached once, for all tasks."""
    data = None if config.data is None else Path(config.data) / find_task(task).name
    if data is not None and not data.is_dir():
        raise ConfigError(
            f"There is no folder {data}: --data needs a folder for each task, with train.jsonl and validation.jsonl."
        )
    same = (
        "model",
        "batch_size",
        "micro_batch",
        "train_rows",
        "seed",
        "data_seed",
        "precision",
        "max_length",
        "device",
    )
    return TrainConfig(
        out=config.out,
        task=task,
        data=None if data is None else str(data),
        eval_rows=1,
        **{key: getattr(config, key) for key in same},
    )


def _seat(loaded: Loaded, model: Any, settings: TrainConfig, listener: Listener) -> Job:
    return seat(loaded, model, settings, RunFolder(settings.out), listener)


def _check_differentiable(task: Task) -> None:
    if not OBJECTIVES[task.default_objective].differentiable:
        raise ConfigError(
            f"Task {task.name!r} lowers {task.default_objective!r}, which has no gradient; learning passes backward. "
            "Learn on tasks of options or of texts with right answers."
        )
