"""What a method may see and do in a step, and what it hands back.

Losses that were computed on a GPU stay there, as 0-d tensors, through the method's arithmetic. They are read on the host
once, at the end of the step, together with everything else that is logged (`Context.read`): a method that looks at the
value of a loss in between, by `float`, `if` or `tolist`, makes the host wait for the GPU.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction, Noise, Scalar, Scaled
from zotune.core.noise import Stream, stream, uniform
from zotune.core.site import Site
from zotune.errors import ConfigError

# Answers a wave of queries: the loss at each point, as a (len(points),) float64 tensor.
Ask = Callable[[Sequence[Direction]], Tensor]
AskExamples = Callable[[Sequence[Direction]], Tensor]  # the same for each example: (len(points), B) float64
Slope = Callable[[Direction], tuple[float, float]]  # the loss here and its exact derivative along a direction
Trial = Callable[[Direction], Direction]  # where the rule would move the weights if this were the estimate


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate: never a tensor, always a combination of directions.

    Attributes:
        direction: the estimated gradient.
        loss: the loss to log: the mean of a pair or of unbiased probes, never a minimum over candidates.
        info: numbers worth logging, such as the projected gradient. Best left as they are: `Context.read` makes numbers
            of tensors.
    """

    direction: Direction
    loss: Scalar
    info: Mapping[str, Any] = field(default_factory=dict)

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
        ask_examples: AskExamples | None = None,
    ) -> None:
        self.step = step
        self.hyperparameters = hyperparameters
        self.sites = sites
        self.weight = weight
        self._losses: list[float] = []  # those that are known on the host
        self._unread: list[Tensor] = []  # those after them, on a device
        self.queries = 0  # forward passes asked for
        self._seed, self._ask, self._kind, self._factors = seed, ask, kind, factors
        self._slope, self._trial, self._ask_examples = slope, trial, ask_examples
        self._drawn = 0

    @property
    def eps(self) -> float:
        """The perturbation scale, after schedulers."""
        return self.hyperparameters["eps"]

    @property
    def kind(self) -> str:
        """The run's kind of noise."""
        return self._kind

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
        if answers.device.type == "cpu":
            self._losses = self.losses + answers.tolist()
        else:
            self._unread.append(answers.clone())  # the method may write to its own
        self.queries += len(points)
        return answers

    @property
    def losses(self) -> list[float]:
        """Every answer of this step, in order: what the ledger writes down. Reads those that lie on a device."""
        if self._unread:
            self._losses, self._unread = self._losses + on_host(self._unread), []
        return self._losses

    def read(self, estimate: Estimate) -> Estimate:
        """The estimate with numbers in the place of 0-d tensors: its loss, its coefficients and what it says beside.

        What lies on a device comes to the host in one copy, the losses of this step with it.
        """
        terms = estimate.direction.terms if isinstance(estimate.direction, Combination) else ()
        scalars: list[Any] = [estimate.loss, *estimate.info.values(), *(coefficient for coefficient, _ in terms)]
        waiting = self._unread + [scalar for scalar in scalars if isinstance(scalar, Tensor)]
        if not waiting:
            return estimate
        known = iter(on_host(waiting))
        self._losses = self._losses + [next(known) for answers in self._unread for _ in range(len(answers))]
        self._unread = []
        loss, *rest = (next(known) if isinstance(scalar, Tensor) else scalar for scalar in scalars)
        info = dict(zip(estimate.info, rest, strict=False))
        numbers = rest[len(info) :]
        direction = estimate.direction
        if isinstance(direction, Combination):
            direction = Combination(tuple((c, inner) for c, (_, inner) in zip(numbers, direction.terms, strict=True)))
        return Estimate(direction, loss, info)

    def example_losses(self, points: Sequence[Direction]) -> Tensor:
        """The loss of each example of the batch at each point, with the same dropout masks.

        For methods whose `needs` include "examples", and then the closure returns one loss per example. All numbers go
        into the ledger, point by point; each point counts as one forward pass.

        Args:
            points: displacements from the current weights; a `core.signed.PerExample` in them is another one for each
                example.

        Returns:
            (len(points), B) float64.
        """
        if self._ask_examples is None:
            raise ConfigError("This engine tells no losses of examples; the method must declare needs={'examples'}.")
        answers = self._ask_examples(points)
        self._losses = self.losses + on_host([answers])
        self.queries += len(points)
        return answers

    def slope(self, direction: Direction) -> tuple[float, float]:
        """The loss at the current weights and its exact derivative along a direction, by forward-mode differentiation.

        For methods whose `needs` include "slope". Both numbers go into the ledger; it counts as one forward pass.
        """
        if self._slope is None:
            raise ConfigError("This engine computes no slopes; the method must declare needs={'slope'}.")
        loss, derivative = self._slope(direction)
        self._losses = [*self.losses, loss, derivative]
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


def as_losses(values: Sequence[Scalar]) -> Tensor:
    """Losses as methods get them: float64, on the device where all of them lie, else on the CPU."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == len(values) and len({tensor.device for tensor in tensors}) == 1:
        return torch.stack([tensor.to(torch.float64) for tensor in tensors])
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def on_host(tensors: Iterable[Tensor]) -> list[float]:
    """The numbers that tensors hold, one tensor after the other, in one copy from each device."""
    flat = [tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors]
    read = {
        device: iter(torch.cat([t for t in flat if t.device == device]).tolist()) for device in {t.device for t in flat}
    }
    return [next(read[tensor.device]) for tensor in flat for _ in range(len(tensor))]
