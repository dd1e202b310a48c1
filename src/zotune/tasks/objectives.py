"""What a run lowers: a loss of options, a language-model loss, or any score of predictions or of generated text.

A method asks for the loss of a batch and nothing else, so a score needs no gradient: it is negated (a run lowers its
objective) and that is all. Whatever the score is a mean over, micro-batches of one batch give the number of the whole:
each objective says how much a part weighs.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from zotune.core.registry import check_name
from zotune.errors import ConfigError
from zotune.tasks.encoding import Encoded
from zotune.tasks.generation import Generator
from zotune.tasks.metrics import METRICS
from zotune.tasks.rewards import Reward, find_reward, reward_of
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import Task


class Objective(Protocol):
    """The loss of a batch, under whatever weights the model has at the moment."""

    name: ClassVar[str]
    differentiable: ClassVar[bool]
    """Whether a gradient can be asked for."""
    generates: ClassVar[bool]
    """Whether each loss takes up to 50 forwards of one token beside that of the prompt."""
    kinds: ClassVar[frozenset[str]]
    """The kinds of task it is defined for."""

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the loss of a batch, a 0-d tensor of fp32 or better."""
        ...

    def weight(self, batch: Sequence[Encoded]) -> int:
        """How many terms the loss of this batch is the mean of."""
        ...


class _OverExamples:
    def weight(self, batch: Sequence[Encoded]) -> int:
        """See `Objective.weight`: one term per example."""
        return len(batch)


class Classification(_OverExamples):
    """Cross entropy of the right option under softmax of the mean log-probabilities (MeZO's for classification)."""

    name: ClassVar[str] = "classification"
    differentiable: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"classification", "choice"})

    def __init__(self, scorer: OptionScorer) -> None:
        self.scorer = scorer

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """See `Objective.loss`."""
        return self.scorer.loss(batch)


class LanguageModel:
    """Cross entropy of the tokens of the right option, the first one where several are right.

    It is the mean over all option tokens of the batch, so long options count for more, as in MeZO. Other options are not
    fed.
    """

    name: ClassVar[str] = "lm"
    differentiable: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"classification", "choice", "generation"})

    def __init__(self, scorer: OptionScorer) -> None:
        self.scorer = scorer

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """See `Objective.loss`."""
        taught = [Encoded(example.prompt_ids, (example.option_ids[example.label],), 0) for example in batch]
        return -self.scorer.sums(taught).sum() / self.weight(batch)

    def weight(self, batch: Sequence[Encoded]) -> int:
        """See `Objective.weight`: one term per token of a right option."""
        return sum(len(example.option_ids[example.label]) for example in batch)


class Accuracy(_OverExamples):
    """Minus the share of examples for which a right option has the highest score."""

    name: ClassVar[str] = "accuracy"
    differentiable: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"classification", "choice"})

    def __init__(self, scorer: OptionScorer) -> None:
        self.scorer = scorer

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """See `Objective.loss`."""
        chosen = self.scorer.scores(batch).argmax(1).tolist()
        right = sum(option in example.all_right for option, example in zip(chosen, batch, strict=True))
        return _negative_mean([float(right)], len(batch))


class _OfText(_OverExamples):
    differentiable: ClassVar[bool] = False
    generates: ClassVar[bool] = True

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """See `Objective.loss`."""
        written = self.generator.generate([example.prompt_ids for example in batch], batch_size=len(batch))
        scores = [self.score(answer.text, example) for answer, example in zip(written, batch, strict=True)]
        return _negative_mean(scores, len(batch))

    def score(self, text: str, example: Encoded) -> float:
        """The score of one text."""
        raise NotImplementedError


class F1(_OfText):
    """Minus the mean token F1 of greedy answers."""

    name: ClassVar[str] = "f1"
    kinds: ClassVar[frozenset[str]] = frozenset({"generation"})

    def score(self, text: str, example: Encoded) -> float:
        """See `METRICS`."""
        assert example.example is not None
        return METRICS["f1"](text, example.example.answers)


class Exact(_OfText):
    """Minus the share of greedy answers that match exactly, after SQuAD's normalisation."""

    name: ClassVar[str] = "exact"
    kinds: ClassVar[frozenset[str]] = frozenset({"generation"})

    def score(self, text: str, example: Encoded) -> float:
        """See `METRICS`."""
        assert example.example is not None
        return METRICS["exact"](text, example.example.answers)


class OfReward(_OfText):
    """Minus the mean of a function of the greedy text and the row."""

    name: ClassVar[str] = "reward"
    kinds: ClassVar[frozenset[str]] = frozenset({"classification", "choice", "generation"})

    def __init__(self, generator: Generator, function: Reward) -> None:
        super().__init__(generator)
        self.function = function

    def score(self, text: str, example: Encoded) -> float:
        """What the function says, which must be a finite number."""
        assert example.example is not None
        return reward_of(self.function, text, example.example.row)


OBJECTIVES: dict[str, type[Objective]] = {
    "classification": Classification,
    "lm": LanguageModel,
    "accuracy": Accuracy,
    "f1": F1,
    "exact": Exact,
    "reward": OfReward,
}


def check_objective(name: str, task: Task, function: str | Reward | None = None) -> None:
    """Raise a ConfigError unless the objective exists and goes with the task; before any model is loaded."""
    check_name("objective", name, OBJECTIVES)
    if task.kind not in OBJECTIVES[name].kinds:
        fitting = ", ".join(key for key, value in OBJECTIVES.items() if task.kind in value.kinds)
        raise ConfigError(
            f"objective {name!r} is not defined for task {task.name!r}, which is one of {task.kind}: "
            f"{'there is nothing to choose from' if task.kind == 'generation' else 'no answer is generated'}. "
            f"Fitting are {fitting}."
        )
    if name == "reward":
        find_reward(task, function)
    elif function is not None:
        raise ConfigError(f"objective {name!r} takes no function; 'reward' does.")


def make_objective(
    name: str | None,
    task: Task,
    scorer: OptionScorer,
    generator: Callable[[], Generator],
    function: str | Reward | None = None,
) -> Objective:
    """An objective for a task.

    Args:
        name: of `OBJECTIVES`; None takes the task's default.
        task: what the batches are of.
        scorer: holds the model.
        generator: makes what writes answers; called only if the objective needs one.
        function: for "reward".

    Raises:
        ConfigError: as `check_objective`.
    """
    name = name or task.default_objective
    check_objective(name, task, function)
    if name == "reward":
        return OfReward(generator(), find_reward(task, function))
    cls: Callable[..., Objective] = OBJECTIVES[name]
    return cls(generator() if OBJECTIVES[name].generates else scorer)


def closure_for(objective: Objective, batch: Sequence[Encoded], micro_batch: int | None) -> Callable[[], Tensor]:
    """The loss of a batch, as a 0-d tensor; made in micro-batches it is the same mean over the whole.

    Micro-batches are of similar length: what is padded to the longest of them is computed for nothing.
    """
    size = micro_batch or len(batch)
    if size < len(batch):
        batch = sorted(batch, key=lambda example: example.length)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    weights = [objective.weight(part) for part in parts]

    def closure() -> Tensor:
        if len(parts) == 1:
            return objective.loss(parts[0])
        total = objective.loss(parts[0]).double() * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total = total + objective.loss(part).double() * weight
        return total / total.new_tensor(sum(weights))  # by a tensor: CUDA divides by a number as by its reciprocal

    return closure


class SignalWatch:
    """Notices an objective that does not change between the probes of a step, from which nothing can be learned.

    A score that counts (accuracy, exact match) is constant nearly everywhere: if eps does not flip a single prediction,
    all losses of a step are equal, the estimate is exactly zero, and the run goes on at full cost without moving.
    """

    def __init__(self, patience: int = 10) -> None:
        """Take the number of such steps in a row after which to speak up."""
        if patience < 1:
            raise ConfigError(f"patience must be at least 1 step, got {patience}.")
        self.patience = patience
        self.flat_steps = 0
        """Steps so far, in all, whose losses were all equal."""
        self._row, self._told = 0, False

    def step(self, losses: Sequence[float]) -> str | None:
        """Take the losses of one step's queries; return advice, once, after ``patience`` flat steps in a row."""
        flat = len(losses) > 1 and all(loss == losses[0] for loss in losses)
        self.flat_steps += flat
        self._row = self._row + 1 if flat else 0
        if self._told or self._row < self.patience:
            return None
        self._told = True
        return (
            f"no signal: in each of the last {self._row} steps all losses were equal ({losses[0]:g}), so the estimates are "
            "zero and nothing is learned. Take a larger eps (ten times), a larger batch, or a smoother objective "
            "(a loss instead of a score that counts); with bf16 or fp16 weights, fp32 or autocast."
        )


def _negative_mean(scores: Sequence[float], count: int) -> Tensor:
    """Minus the mean, on the CPU in fp64: sums of a batch and of its parts agree to rounding of fp64."""
    return torch.tensor(-math.fsum(scores) / count, dtype=torch.float64)
