"""FZOO: signs as directions, one-sided differences, and a step divided by the spread of the losses.

Dang, Guo, Zhao, Ye, Zheng, Dai, Tsang, "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards
Adam-Scale Speed", ICLR 2026, arXiv 2506.09034.

    u_i in {-1, +1}^d,   l_i = L(theta + eps u_i),   l_0 = L(theta)
    g = 1/(eps n) sum_i (l_i - l_0) u_i
    sigma^2 = 1/(n - 1) sum_i (l_i - mean l)^2
    theta <- theta - lr g / sigma

Forwards per step: n + 1. Extra memory: none. The logged loss is l_0.

E g = grad on quadratics and E|g|^2 = (d + n - 1)/n |grad|^2 on linear losses (d + n + 1 with Gaussian directions). There
E sigma^2 = eps^2 |grad|^2: a step is about lr/eps along the unit gradient, whatever the scale of the loss, and moves every
weight by about lr / (eps sqrt(n)). It changes neither with a factor nor with a constant on the loss. With few directions
sigma is near 0 too often: below n = 4 the step has no second moment (for near-Gaussian slopes), at n = 2 not even a mean.

Units: the released code leaves out the 1/eps and divides by the spread with 1/n, so its step is
lr/(n sigma) sum_i (l_i - l_0) u_i. Published rates (5e-5 at eps 1e-4) are in those units, `variant="released"`: in those of
the formula above they would be 5e-9. If all l_i are equal there is no scale to divide by, and the estimate is zero; the
released code divides by zero there. Its reuse of losses of the step before, which would halve the forwards, is never switched
on; it is not built here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE, Combination
from zotune.methods.sources import FromSource

# What (1/n) sum (l_i - l_0) u_i is divided by, from the spread with 1/(n - 1), eps and n.
SCALES: dict[str, Callable[[float, float, int], float]] = {
    "theory": lambda sigma, eps, n: eps * sigma,
    "released": lambda sigma, eps, n: sigma * sqrt((n - 1) / n),
}


@dataclass(eq=False)
class FZOO(FromSource):
    """Mean of n forward differences along random signs, over the standard deviation of the losses."""

    n: int = 8  # directions per step
    normalise: bool = True  # False: the plain estimator, in MeZO's units
    variant: str = "theory"  # "released": the spread has 1/n and eps is left out
    source: str = "rademacher"  # where directions come from
    source_options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "fzoo"
    paper: ClassVar[str] = "Dang et al. 2025, arXiv 2506.09034"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("n", self.n >= 1, "at least 1 direction per step")
        self.check("n", self.n >= 2 or not self.normalise, "at least 2", "One loss has no standard deviation.")
        self.check("variant", self.variant in SCALES, " or ".join(SCALES))
        plain = self.variant == "released" and not self.normalise
        self.check("variant", not plain, "'theory' without normalise", "The released code always normalises.")
        self.take_source()

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return self.n + 1

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of n differences times their signs, over eps and the spread of the losses."""
        u = [self._source.draw(ctx) for _ in range(self.n)]
        answers = ctx.loss([HERE, *(ctx.eps * u_i for u_i in u)])
        here, probes = answers[0], answers[1:]
        scale, info = ctx.eps, {}
        if self.normalise:
            sigma = float((probes - probes[0]).std())  # of differences: exactly 0 if all are equal
            if sigma == 0.0:
                return Estimate(HERE, here, {"sigma": 0.0})  # no scale to divide by: no step
            scale, info = SCALES[self.variant](sigma, ctx.eps, self.n), {"sigma": sigma}
        g = Combination()
        for rho_i, u_i in zip((probes - here) / scale, u, strict=True):
            g += (rho_i / self.n) * u_i
        return Estimate(g, here, info)
