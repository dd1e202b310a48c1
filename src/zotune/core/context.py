"""What a method may see and do in a step, and what it hands back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction, Noise, Scalar, Scaled
from zotune.core.noise import stream, uniform
from zotune.core.site import Site

# Answers a wave of queries: the loss at each point, as a (len(points),) float64 tensor.
Ask = Callable[[Sequence[Direction]], Tensor]


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
    ) -> None:
        self.step = step
        self.hyperparameters = hyperparameters
        self.sites = sites
        self.weight = weight
        self.losses: list[float] = []  # every answer of this step, in order: what the ledger writes down
        self._seed, self._ask, self._kind, self._factors = seed, ask, kind, factors
        self._drawn = 0

    @property
    def eps(self) -> float:
        """The perturbation scale, after schedulers."""
        return self.hyperparameters["eps"]

    def gaussian(self) -> Direction:
        """A fresh standard normal direction, of the run's kind of noise."""
        return self._noise(self._kind)

    def rademacher(self) -> Direction:
        """A fresh direction of independent signs."""
        return self._noise("rademacher")

    def uniform(self, low: float, high: float) -> float:
        """A fresh number from [low, high)."""
        return uniform(stream(self._seed, "step", self.step, self._next()), low, high)

    def loss(self, points: Sequence[Direction]) -> Tensor:
        """The loss at each point, all on the same batch with the same dropout masks.

        Args:
            points: displacements from the current weights; the empty combination means the current weights.

        Returns:
            (len(points),) float64.
        """
        answers = self._ask(points)
        self.losses.extend(answers.tolist())
        return answers

    def _noise(self, kind: str) -> Direction:
        noise = Noise(stream(self._seed, "step", self.step, self._next()), kind)
        return Scaled(noise, self._factors) if self._factors else noise

    def _next(self) -> int:
        self._drawn += 1
        return self._drawn - 1


def as_losses(values: Sequence[float]) -> Tensor:
    """Losses as methods get them: float64."""
    return torch.tensor(values, dtype=torch.float64)
