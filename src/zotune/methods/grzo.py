"""GRZO: a direction of its own for each example of the batch, in two forward passes.

Tan, Zhao, Yang, Zhang, Yu, Zhang, "GRZO: Group-Relative Zeroth-Order Optimization for Large Language Model Fine-Tuning",
2026, arXiv 2606.02857. For example i of a batch of B, with one shared u ~ N(0, I) and random signs r_i, s_i:

    z_i = u * (r_i s_i^T)                                       elementwise on every matrix
    delta_i = L_i(theta + eps z_i) - L_i(theta - eps z_i)       L_i: the loss of example i
    a_i = delta_i / std(delta)                                  with 1/B; without normalising a_i = delta_i
    g = 1/(2 eps B) sum_i a_i z_i

Forwards per step: 2 over the batch, each with one matrix product more per layer. Extra memory: none.

Without normalising E[g] is the gradient G of the batch's mean loss on quadratics, and on linear losses with slopes G_i
E|g|^2 = 1/B^2 [ (d + 2) sum_i |G_i|^2 + 3 sum_{i != j} <G_i, G_j> ], where MeZO has (d + 2) |mean_i G_i|^2 (derived
here): less by about B if the examples' gradients agree, the same if they are orthogonal. Dividing by the spread makes a
step of the same length whatever the scale of the loss; like FZOO's its learning rates are in other units: the released
1/(2 eps) stays, so a step is about lr |z| / (2 eps sqrt(B)), and a rate is eps times that of a plain normalised method.

The paper centres nothing: a_i keeps the sign of delta_i. It adds a small number of unstated size to the spread; here nothing
is added, so that the scale of the loss has no part in the step. If all delta_i are equal there is no spread and the
estimate is zero. Vectors (norms, biases) get a sign per element; the paper speaks of matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE
from zotune.core.signed import PerExample
from zotune.errors import ConfigError
from zotune.methods.base import Base


@dataclass(frozen=True)
class GRZO(Base):
    """One central difference per example, along that example's own direction."""

    normalise: bool = True  # False: the plain estimator, in MeZO's units

    name: ClassVar[str] = "grzo"
    paper: ClassVar[str] = "Tan et al. 2026, arXiv 2606.02857"

    @property
    def needs(self) -> frozenset[str]:
        """A loss for each example, under a direction for each."""
        return frozenset({"examples"})

    @property
    def has_recipe(self) -> bool:
        """No: the signs of a direction for each example."""
        return False

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2

    def estimate(self, ctx: Context) -> Estimate:
        """sum_i a_i z_i / (2 eps B)"""
        z = PerExample(ctx.gaussian(), ctx.stream())
        losses = ctx.example_losses([+ctx.eps * z, -ctx.eps * z])  # (2, B)
        loss, (plus, minus) = losses.mean(), losses.tolist()
        self._check(len(plus))
        delta = [a - b for a, b in zip(plus, minus, strict=True)]
        if not all(map(math.isfinite, delta)):
            return Estimate(HERE, math.nan)
        count, spread = len(delta), spread_of(delta)
        info = {"spread": spread, "rho": math.fsum(delta) / (2 * ctx.eps * count)}
        if self.normalise:
            if spread == 0.0:
                return Estimate(HERE, loss, info)
            delta = [d / spread for d in delta]
        return Estimate(1.0 * z.weighted([d / (2 * ctx.eps * count) for d in delta]), loss, info)

    def _check(self, examples: int) -> None:
        if self.normalise and examples == 1:
            raise ConfigError(
                "GRZO divides by the spread over the examples of the batch, and a batch of 1 has none. Take at least 2 "
                "examples (4 or more are better), or normalise=False."
            )


def spread_of(numbers: Sequence[float]) -> float:
    """Their standard deviation, with 1/n: the same bits on every machine, and exactly 0 if all are equal."""
    apart = [number - numbers[0] for number in numbers]
    mean = math.fsum(apart) / len(apart)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in apart) / len(apart))
