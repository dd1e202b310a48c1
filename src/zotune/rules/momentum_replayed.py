"""Momentum without a buffer: the last estimates are recipes, so their weighted sum is one too.

    m_t = sum_{k=0}^{window-1} beta^k g_{t-k},    w <- w - lr * m_t

This is the heavy ball of `momentum` without its terms older than `window` steps. Their weights are beta^window of the sum
of all weights: 3.4 % with beta 0.9 and 32 steps, 0.1 % with 64. The cost is time: an update draws the noise of all `window`
steps again. The memory is kilobytes: the numbers that make the directions. They go into the optimizer's state, so a run
resumes exactly.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.direction import Combination, Direction
from zotune.core.recipe import from_recipe, to_recipe
from zotune.core.site import Site
from zotune.rules.base import BaseRule
from zotune.rules.sgd import SGD

_SGD = SGD()


@dataclass(eq=False)
class MomentumReplayed(BaseRule):
    """w <- (1 - lr * weight_decay) w - lr * sum of beta^k g_{t-k} over the last `window` estimates."""

    beta: float = 0.9
    window: int = 32  # estimates that are remembered

    name: ClassVar[str] = "momentum_replayed"
    needs: ClassVar[frozenset[str]] = frozenset({"recipe"})
    extra_state: ClassVar[str] = "none (the recipes of the last estimates: kilobytes)"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("beta", 0 <= self.beta < 1, "in [0, 1)")
        self.check("window", self.window >= 1, "at least 1 estimate")
        self._past: list[Direction] = []  # oldest first

    def prepare(self, estimate: Estimate) -> Estimate:
        """The estimate with its predecessors: what `momentum` would hold in its buffer.

        Raises:
            ConfigError: a direction that cannot be written down.
        """
        # What is kept is what was written down and read again, so a resumed run cannot differ from this one.
        self._past = [*self._past, from_recipe(to_recipe(estimate.direction))][-self.window :]
        total = Combination()
        for age, direction in zip(range(len(self._past) - 1, -1, -1), self._past, strict=True):
            total += self.beta**age * direction
        return replace(estimate, direction=total)

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        _SGD(weight, site, estimate, group, state)

    def state_dict(self) -> dict[str, Any]:
        """The window, oldest first, in numbers."""
        return {"past": [to_recipe(direction) for direction in self._past]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a window."""
        self._past = [from_recipe(recipe) for recipe in state.get("past", [])][-self.window :]
