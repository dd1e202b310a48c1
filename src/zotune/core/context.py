"""What a method may see and do in a step, and what it hands back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction, Noise, Scalar, Scaled
from zotune.core.errors import ConfigError
from zotune.core.noise import Stream, stream, uniform
from zotune.core.site import Site

# Answers a wave of queries: the loss at each point, as a (len(points),) float64 tensor.
Ask = Callable[[Sequence[Direction]], Tensor]
Slope = Callable[[Direction], tuple[float, float]]  # the loss here and its exact derivative along a direction
Trial = Callable[[Direction], Direction]  # where the rule would move the weights if this were the estimate


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate: never a tensor, always a combination of directions.

    Attributes:
        direction: the estimated gradient.
        loss: the loss to log: the mean of a pair or of unbiased probes, never a minimum over candidates.
        info: numbers worth logging, such as the projected gradient.
    """

    direction: Direction
    loss: Scalar
    info: Mapping[str, float] = field(default_factory=dict)

    def is_finite(self) -> bool:
        """True if the loss and every coefficient is a finite number."""
        terms = self.direction.terms if isinstance(self.direction, Combination) else ()
        return all(math.isfinite(float(number)) for number in (self.loss, *(c for c, _ in terms)))


class Context:
    """One step as a method sees it: fresh randomness, read-only weights, and the loss at points near them."""

    def __init__(
        self,
        *,
        step: int,
        seed: int,
        hyperparameters: Mapping[str, float],
        sites: Sequence[Site],
        ask: Ask,
        weight: Callable[[Site], Tensor],
        kind: str = "normal",
        factors: Mapping[str, float] | None = None,
        slope: Slope | None = None,
        trial: Trial | None = None,
    ) -> None:
        self.step = step
        self.hyperparameters = hyperparameters
        self.sites = sites
        self.weight = weight
        self.losses: list[float] = []  # every answer of this step, in order: what the ledger writes down
        self.queries = 0  # forward passes asked for
        self._seed, self._ask, self._kind, self._factors = seed, ask, kind, factors
        self._slope, self._trial = slope, trial
        self._drawn = 0

    @property
    def eps(self) -> float:
        """The perturbation scale, after schedulers."""
        return self.hyperparameters["eps"]

    def stream(self, *purpose: int | str) -> Stream:
        """A fresh stream of this step; or, with a purpose, the run's stream of that name, the same in every step.

        `ctx.stream("mask", step // 100)` names a mask that is kept for 100 steps without being stored.
        """
        if purpose:
            return stream(self._seed, "run", *purpose)
        return stream(self._seed, "step", self.step, self._next())

    def gaussian(self) -> Direction:
        """A fresh standard normal direction, of the run's kind of noise."""
        return self.per_group(Noise(self.stream(), self._kind))

    def rademacher(self) -> Direction:
        """A fresh direction of independent signs."""
        return self.per_group(Noise(self.stream(), "rademacher"))

    def per_group(self, direction: Direction) -> Direction:
        """A direction on the scale of the parameter groups: where a group has its own eps, times that over the first's.

        `gaussian` and `rademacher` do this themselves; directions that a method makes of streams must pass through here.
        """
        return Scaled(direction, self._factors) if self._factors else direction

    def uniform(self, low: float, high: float) -> float:
        """A fresh number from [low, high)."""
        return uniform(self.stream(), low, high)

    def loss(self, points: Sequence[Direction]) -> Tensor:
        """The loss at each point, all on the same batch with the same dropout masks.

        Args:
            points: displacements from the current weights; the empty combination means the current weights.

        Returns:
            (len(points),) float64.
        """
        answers = self._ask(points)
        self.losses.extend(answers.tolist())
        self.queries += len(points)
        return answers

    def slope(self, direction: Direction) -> tuple[float, float]:
        """The loss at the current weights and its exact derivative along a direction, by forward-mode differentiation.

        For methods whose `needs` include "slope". Both numbers go into the ledger; it counts as one forward pass.
        """
        if self._slope is None:
            raise ConfigError("This engine computes no slopes; the method must declare needs={'slope'}.")
        loss, derivative = self._slope(direction)
        self.losses += [loss, derivative]
        self.queries += 1
        return loss, derivative

    def trial(self, direction: Direction) -> Direction:
        """Where the rule would move the weights if `direction` were the estimate: a displacement, so it can be asked for.

        For methods whose `needs` include "trial".
        """
        if self._trial is None:
            raise ConfigError("This rule cannot be tried; the method must declare needs={'trial'}.")
        return self._trial(direction)

    def _next(self) -> int:
        self._drawn += 1
        return self._drawn - 1


def as_losses(values: Sequence[float]) -> Tensor:
    """Losses as methods get them: float64."""
    return torch.tensor(values, dtype=torch.float64)
