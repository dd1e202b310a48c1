"""JAGUAR: a central difference on a few of the tensors, another few in every step.

Veprikov, Bogdanov, Minashkin, Beznosikov, "New Aspects of Black Box Conditional Gradient: Variance Reduction and One Point
Feedback", 2024, arXiv 2409.10442 (one coordinate a step, the others remembered); Petrov, Evseev, Antonov, Veprikov,
Plyusnin, Bushkov, Moiseev, Beznosikov, "Leveraging Coordinate Momentum in SignSGD and Muon: Memory-Optimized Zero-Order",
2025, arXiv 2506.04430 (JAGUAR SignSGD). For language models the unit is the tensor: a share `ratio` of them is chosen
anew in every step, and

    S = ceil(ratio * tensors) of the tensors, at least one, each set equally likely
    z_i ~ N(0, I) on the tensors of S, 0 elsewhere
    rho_i = [ L(theta + eps z_i) - L(theta - eps z_i) ] / (2 eps)
    g = (1/n) sum_i rho_i z_i                    times tensors / |S| if `unbiased`

Forwards per step: 2n. Extra memory: none; the memory of JAGUAR is the rule's. With the rule "jaguar" the accumulator
a <- beta a + (1 - beta) g changes on S alone and theta <- theta - lr sign(a) moves all tensors.

E g = (|S| / tensors) grad L, as in the released code, which does not divide; `unbiased` divides by that share. A sign
of an accumulator does not see the factor; SGD does. Given S, E|g|^2 = (d_S + n + 1)/n |grad_S|^2, where d_S counts the
numbers in S: this is block coordinate descent with random blocks.

The set is ranked by a number that each tensor draws under its own name, so it does not depend on the order of tensors.
n > 1 (several pairs on one set) is not in the papers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination, Direction, Scaled
from zotune.core.noise import uniform
from zotune.methods.base import Base


def subset(ctx: Context, ratio: float) -> tuple[str, ...]:
    """Names of the tensors of this step: ceil(ratio * number of tensors) of them, every such set equally likely.

    Each tensor draws a number under its own name, and the smallest are taken: a tensor more or less among the trained ones
    does not change the numbers of the others.
    """
    drawn = {site.name: uniform(ctx.stream("subset", ctx.step, site.name), 0.0, 1.0) for site in ctx.sites}
    count = math.ceil(ratio * len(drawn) - 1e-9)  # 0.1 * 30 is a little more than 3 in floating point
    return tuple(sorted(drawn, key=lambda name: (drawn[name], name))[: max(count, 1)])


def restricted(direction: Direction, names: tuple[str, ...]) -> Direction:
    """The direction on the named tensors, zero elsewhere: engines and rules leave the rest alone."""
    return Scaled(direction, dict.fromkeys(names, 1.0), otherwise=0.0)


@dataclass(frozen=True)
class Jaguar(Base):
    """Central differences on a random share of the tensors."""

    ratio: float = 0.1  # share of the tensors that a step perturbs; `params_ratio` in the released code
    n: int = 1  # directions per step, all on the step's tensors
    unbiased: bool = False  # divide by the share, so that the mean of the estimates is the gradient

    name: ClassVar[str] = "jaguar"
    paper: ClassVar[str] = "Veprikov et al. 2024, arXiv 2409.10442; Petrov et al. 2025, arXiv 2506.04430"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("ratio", 0 < self.ratio <= 1, "above 0 and at most 1", "It is a share of the tensors.")
        self.check("n", self.n >= 1, "at least 1 direction per step")

    @property
    def forwards(self) -> int:
        """Queries per step."""
        return 2 * self.n

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of n projected gradients times their directions, all on the tensors of this step."""
        names, eps = subset(ctx, self.ratio), ctx.eps
        share = len(names) / len(ctx.sites) if self.unbiased else 1.0
        g, loss = Combination(), 0.0
        drawn = [restricted(ctx.gaussian(), names) for _ in range(self.n)]
        losses = ctx.loss([point for z in drawn for point in (+eps * z, -eps * z)])
        for z, (plus, minus) in zip(drawn, losses.view(-1, 2), strict=True):
            rho = (plus - minus) / (2 * eps)
            g += (rho / (self.n * share)) * z
            loss += (plus + minus) / (2 * self.n)
        return Estimate(g, loss, {"rho": rho})
