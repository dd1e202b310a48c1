"""MeZO: two forward passes and a seed.

Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023,
arXiv 2305.17333. The estimator is SPSA (Spall 1992) with Gaussian directions:

    z_i ~ N(0, I)
    rho_i = [ L(theta + eps z_i) - L(theta - eps z_i) ] / (2 eps)        two-sided
    rho_i = [ L(theta + eps z_i) - L(theta) ] / eps                      one-sided
    g = (1/n) sum_i rho_i z_i

Forwards per step: 2n, or n + 1 one-sided. Extra memory: none.

E[g] = grad L, exactly on quadratics and to O(eps^2) otherwise; E|g|^2 = (d + n + 1)/n |grad L|^2 for Gaussian z.
The released code uses n = 1; its paper finds no gain from more directions at equal forwards. Here the loss that is
logged is the mean of the probes; the released code logs L(theta + eps z).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE, Combination, Direction
from zotune.methods.base import Base


@dataclass(frozen=True)
class MeZO(Base):
    """Average of n central (or forward) differences along random directions."""

    n: int = 1  # directions per step; 1 in the released code
    sides: int = 2  # 2: central differences; 1: forward differences against the current weights

    name: ClassVar[str] = "mezo"
    paper: ClassVar[str] = "Malladi et al. 2023, arXiv 2305.17333"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("n", self.n >= 1, "at least 1 direction per step")
        self.check("sides", self.sides in (1, 2), "1 (forward) or 2 (central differences)")

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2 * self.n if self.sides == 2 else self.n + 1

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of n projected gradients times their directions."""
        return self._central(ctx) if self.sides == 2 else self._forward(ctx)

    def _central(self, ctx: Context) -> Estimate:
        return central(ctx, [ctx.gaussian() for _ in range(self.n)])

    def _forward(self, ctx: Context) -> Estimate:
        return forward(ctx, [ctx.gaussian() for _ in range(self.n)])


def central(ctx: Context, z: Sequence[Direction]) -> Estimate:
    """Central differences along n directions of any source; all 2n points are asked for at once."""
    eps = ctx.eps
    losses = ctx.loss([point for each in z for point in (+eps * each, -eps * each)])
    rho = (losses[0::2] - losses[1::2]) / (2 * eps)  # (n,)
    g = Combination()
    for slope, each in zip(rho, z, strict=True):
        g += (slope / len(z)) * each
    return Estimate(g, losses.mean(), {"rho": rho[-1]})


def forward(ctx: Context, z: Sequence[Direction]) -> Estimate:
    """Forward differences along n directions against the current weights; all n + 1 points are asked for at once."""
    eps = ctx.eps
    here, *plus = ctx.loss([HERE, *(+eps * each for each in z)])
    rho = [(there - here) / eps for there in plus]
    g = Combination()
    for slope, each in zip(rho, z, strict=True):
        g += (slope / len(z)) * each
    return Estimate(g, here, {"rho": rho[-1]})
