"""Contestants of a comparison: what their names mean, and the job of each, on a fresh copy of one model."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zotune.baselines.first_order import FIRST_ORDER
from zotune.core.registry import check_name
from zotune.errors import ConfigError
from zotune.evaluation.evaluate import Evaluation
from zotune.methods import METHODS, make_method
from zotune.rules import make_rule
from zotune.runs.config import TrainConfig
from zotune.runs.job import Job, Listener, Loaded, method_options, refuse_examples, seat
from zotune.runs.run_folder import RunFolder
from zotune.tasks.catalogue import find_task
from zotune.tasks.objectives import OBJECTIVES, check_objective
from zotune.tasks.task import Task
from zotune.tuning import MODES, make_mode

UNTRAINED: dict[str, frozenset[str]] = {
    "zero-shot": frozenset({"classification", "choice", "generation"}),
    "prior-corrected": frozenset({"classification"}),
    "in-context": frozenset({"classification", "choice", "generation"}),
    "probe": frozenset({"classification"}),
}
"""Contestants that leave the weights alone, and the kinds of task they are defined for."""
FIRST_ORDER_NAMES: dict[str, str | None] = {"adamw": None, "adamw-lora": "lora"}
"""First-order contestants and their mode; None: the one given."""
USUAL = ("zero-shot", "prior-corrected", "in-context", "probe", "mezo", "es", "adamw", "adamw-lora")


@dataclass(frozen=True)
class Contestant:
    """One way of doing the task."""

    name: str
    mode: str = "full"
    lr: float | None = None
    """At the start of the schedule; None if nothing is trained."""

    @property
    def label(self) -> str:
        """What its row is called; no two rows of a comparison share it."""
        if self.lr is None:
            return self.name
        plain = self.mode == "full" or FIRST_ORDER_NAMES.get(self.name) == self.mode
        return f"{self.name if plain else f'{self.name}:{self.mode}'} (lr {self.lr:.12g})"

    @property
    def slug(self) -> str:
        """A folder's name."""
        return self.name if self.lr is None else f"{self.name}-{self.mode}-{self.lr:.12g}"

    @property
    def first_order(self) -> bool:
        """Whether it is trained with gradients."""
        return self.name in FIRST_ORDER_NAMES

    def settings(self, config: TrainConfig, steps: int) -> TrainConfig:
        """The settings of its run; options of the method and the mode that were given go to those who run them."""
        if self.lr is None:
            return replace(config, mode="full", mode_options={}, steps=steps)
        ours = self.mode == config.mode
        return replace(
            config,
            method=config.method if self.first_order else self.name,
            method_options=config.method_options if self.name == config.method else {},
            mode=self.mode,
            mode_options=config.mode_options if ours else {},
            lr=self.lr,
            eps=config.eps if ours else None,
            steps=steps,
        )


def usual(kind: str) -> list[str]:
    """The contestants that a comparison on this kind of task has if none are named."""
    return [name for name in USUAL if kind in UNTRAINED.get(name, {kind})]


def parse(texts: Sequence[str], config: TrainConfig, task: Task) -> list[Contestant]:
    """Contestants from their names, `name[:mode][@lr]`.

    Names without a mode take the config's. The config's lr and eps belong to its mode: zeroth-order contestants in another
    mode, and all first-order ones, take the defaults of theirs.

    Raises:
        ConfigError: an unknown name, mode or rate, one that does not go with the task, or a name given twice.
    """
    found = [_parse(text.strip(), config) for text in texts]
    if not found:
        raise ConfigError("there are no contestants; name at least one, for example --with zero-shot,mezo,adamw.")
    labels = [contestant.label for contestant in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"{twice[0]} is named twice; name every contestant once.")
    _refuse_lost_options(found, config)
    objective = config.objective or task.default_objective
    check_objective(objective, task, config.reward)
    make_rule(config.rule, config.rule_options)
    for contestant in found:
        _check_fits(contestant, task, objective)
        settings = contestant.settings(config, config.steps)
        make_mode(settings.mode, settings.mode_options)
        if contestant.name in METHODS:
            refuse_examples(make_method(contestant.name, method_options(settings)))
    return found


def _refuse_lost_options(found: Sequence[Contestant], config: TrainConfig) -> None:
    """Options of a method, or of a mode, that no contestant has."""
    trained = [contestant for contestant in found if contestant.lr is not None]
    if config.method_options and config.method not in {contestant.name for contestant in trained}:
        raise ConfigError(
            f"--method-option goes to the contestant that --method names, {config.method!r}, and it is not among them. Give "
            "--method as well, or leave the options out."
        )
    if config.mode_options and config.mode not in {contestant.mode for contestant in trained}:
        raise ConfigError(
            f"--mode-option goes to contestants in the mode that --mode names, {config.mode!r}, and there is none. Give --mode "
            "as well, or leave the options out."
        )


def _parse(text: str, config: TrainConfig) -> Contestant:
    before, at, rate = text.partition("@")
    name, colon, mode = before.partition(":")
    check_name("contestant", name, [*UNTRAINED, *METHODS, *FIRST_ORDER_NAMES])
    if name in UNTRAINED:
        if at or colon:
            raise ConfigError(f"{text!r}: {name} trains nothing, so it has neither a mode nor a learning rate.")
        return Contestant(name)
    fixed = FIRST_ORDER_NAMES.get(name)
    if fixed and colon:
        raise ConfigError(f"{text!r}: {name} has its mode already, {fixed}; write adamw:{mode} for another.")
    mode = fixed or (mode if colon else config.mode)
    check_name("mode", mode, MODES)
    if at:
        return Contestant(name, mode, _rate(text, rate))
    if name in FIRST_ORDER_NAMES:
        return Contestant(name, mode, FIRST_ORDER[mode][0])
    return Contestant(name, mode, config.lr if mode == config.mode and config.lr is not None else MODES[mode].lr)


def _rate(text: str, rate: str) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{text!r}: after @ stands the learning rate, a number of at least 0, as in mezo@1e-5.")
    return value


def _check_fits(contestant: Contestant, task: Task, objective: str) -> None:
    kinds = UNTRAINED.get(contestant.name)
    if kinds is not None and task.kind not in kinds:
        raise ConfigError(
            f"contestant {contestant.name!r} needs options that are the same for every row, and task {task.name!r} is one "
            f"of {task.kind}: leave it out (fitting here: {', '.join(usual(task.kind))})."
        )
    if contestant.first_order and not OBJECTIVES[objective].differentiable:
        raise ConfigError(
            f"contestant {contestant.name!r} needs a gradient, and objective {objective!r} has none. Leave it out, or "
            "compare on an objective with a gradient (--objective lm)."
        )


@dataclass
class Ground:
    """What all contestants share: rows and an untouched model, on the CPU, of which each gets a copy."""

    config: TrainConfig
    loaded: Loaded
    plain: Evaluation | None = None
    """Of the untouched model on the held-out rows, once it is known."""

    def seat(self, config: TrainConfig, folder: RunFolder) -> Job:
        """The job of one contestant, on a copy of the model."""
        return seat(self.loaded, copy.deepcopy(self.loaded.model), config, folder, Listener())


def find_contestants(texts: Sequence[str] | None, config: TrainConfig) -> tuple[Task, list[Contestant]]:
    """The task and its contestants, the usual ones if none are named."""
    task = find_task(config.task)
    return task, parse(usual(task.kind) if texts is None else texts, config, task)
