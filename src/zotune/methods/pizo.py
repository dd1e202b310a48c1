"""PIZO: a small pool of random directions, ranked by their losses, makes the direction of an ordinary two-point step.

Jin, Cen, Tan, "Prior-Informed Zeroth-Order Optimization with Adaptive Direction Alignment for Memory-Efficient LLM
Fine-Tuning", 2026, arXiv 2601.04710 (MeZO-GV, SubZero-GV and MeZO-Greedy; "PIZO" is what lists call them). The guiding
vector comes from Li, Zheng, Tan, "guiding spark", IEEE TEVC 2017.

    z_i ~ N(0, I),  l_i = L(theta + eps z_i)                                     i = 1 .. M, one forward each
    guiding:  v = (1/s) sum of the z_i with the s smallest l_i  -  (1/(M-s)) sum of the others,   s = floor(alpha M)
    greedy:   v = the z_i with the smallest l_i
    rho = [ L(theta + eps v) - L(theta - eps v) ] / (2 eps)
    g = rho v                                                                    v is not normalised

Forwards per step: M + 2. Greedy has its plus side from the pool: M + 1, the same number, as all queries of a step see the
same batch, masks and weights. Extra memory: none beside what the source keeps; v is rebuilt from its M streams (6 M draws
of noise a step for the guiding vector, against 4 of MeZO). Only the ranks of the pool's losses matter, and neither v's
sign nor the loss's scale nor its offset.

A pool of two has no effect: v = +-(z_1 - z_2) whatever the ranking, which is MeZO along (z_1 - z_2)/sqrt(2) with
sqrt(2) eps and 2 lr, exactly. The shipped trainers use M = 2; the paper's table says 4, which is the default here.
In the linear regime the step along the gradient is E y^2 = 2.104 times MeZO's for M = 4 (between 2 and 8/pi = 2.55 for every
M), so a comparison at equal lr is one at twice the lr.

Open in the paper: the elite is alpha's share and the rest is its opposite, as in Algorithm 1 (Lemma 4 takes equal groups;
they agree for alpha = 1/2 and even M). One eps serves pool and pair. SubZero-GV has no formulas: here the pool is drawn
from the source, so v is U Z_v V^T. Defects of the released code: two of its trainers rank one noise and build v from
another on every tensor but the first (the seed is set again for each tensor), and log L(theta + eps v), which lies
1.33 eps |grad| low; here the mean of the pair is logged. The one its entry point runs keeps the best seed between steps,
a variant outside the paper that is not offered.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination, Direction
from zotune.methods.sources import FromSource


def ranked(losses: Tensor) -> list[int]:
    """Places of the losses, best first: smallest first, equals in order, what is not a finite number last."""
    values = losses.tolist()
    return sorted(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)


def elite_size(alpha: float, pool: int) -> int:
    """s = floor(alpha M), of the number that alpha is meant to be: 0.29 * 100 is 28.999... in floating point."""
    return math.floor(alpha * pool + 1e-9)


def guiding(z: Sequence[Direction], order: Sequence[int], elite: int) -> Direction:
    """The mean of the elite minus the mean of the others."""
    weights = dict.fromkeys(order[:elite], 1 / elite) | dict.fromkeys(order[elite:], -1 / (len(z) - elite))
    return Combination(tuple((weights[i], one) for i, one in enumerate(z)))


def greedy(z: Sequence[Direction], order: Sequence[int], elite: int) -> Direction:
    """The winner."""
    return z[order[0]]


VARIANTS: dict[str, Callable[[Sequence[Direction], Sequence[int], int], Direction]] = {
    "guiding": guiding,
    "greedy": greedy,
}


@dataclass(eq=False)
class Pizo(FromSource):
    """A central difference along the contrast between the good and the bad of a pool, or along its best."""

    variant: str = "guiding"  # or "greedy"
    pool: int = 4  # M: directions ranked per step
    alpha: float = 0.5  # share of the pool that is the elite; greedy does not use it
    reuse: bool = (
        True  # greedy takes the winner's loss from the pool as its plus side: one forward less, the same number
    )
    source: str = "gaussian"  # where directions come from: a name in `sources.SOURCES`
    source_options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "pizo"
    paper: ClassVar[str] = "Jin, Cen, Tan 2026, arXiv 2601.04710"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        self.take_source()
        if self.variant == "greedy":
            self.check("pool", self.pool >= 1, "at least 1 direction")
            return
        self.check("pool", self.pool >= 2, "at least 2 directions", "A contrast needs an elite and a rest.")
        self.check(
            "alpha",
            self.alpha < 1 and 1 <= elite_size(self.alpha, self.pool) <= self.pool - 1,
            f"at least 1/pool = {1 / self.pool:.4g} and below 1",
            f"The elite has floor(alpha * pool) members, here {elite_size(self.alpha, self.pool)} of {self.pool}; neither it "
            "nor the rest may be empty.",
        )
        if self.pool == 2:
            warnings.warn(
                "pizo with the guiding vector of a pool of 2 is exactly MeZO with sqrt(2) * eps and 2 * lr: the ranking "
                "decides only the sign of v, which cancels, and two of the four forwards are wasted. Use pool=3 or more.",
                stacklevel=3,
            )

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return self.pool + (1 if self._winner_is_known else 2)

    @property
    def _winner_is_known(self) -> bool:
        return self.variant == "greedy" and self.reuse

    def estimate(self, ctx: Context) -> Estimate:
        """Rank the pool, then the pair along v."""
        eps = ctx.eps
        z = [self._source.draw(ctx) for _ in range(self.pool)]
        losses = ctx.loss([+eps * one for one in z])
        order = ranked(losses)
        v = VARIANTS[self.variant](z, order, elite_size(self.alpha, self.pool))
        if self._winner_is_known:
            plus, (minus,) = losses[order[0]], ctx.loss([-eps * v])
        else:
            plus, minus = ctx.loss([+eps * v, -eps * v])
        rho = (plus - minus) / (2 * eps)
        return Estimate(rho * v, (plus + minus) / 2, {"rho": rho})
