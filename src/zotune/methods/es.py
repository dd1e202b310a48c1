"""Evolution strategies: many one-sided probes, each compared with the others.

Wierstra et al., "Natural Evolution Strategies", 2008 and 2014, arXiv 1106.4487; Salimans, Ho, Chen, Sidor, Sutskever,
"Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017, arXiv 1703.03864; the leave-one-out baseline
is that of Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.

    z_i ~ N(0, I),   l_i = L(theta + eps z_i),   i = 1 ... n
    c_i = ( l_i - mean_{j != i} l_j ) / eps
    g = (1/n) sum_i c_i z_i

which is the sample covariance of losses and directions, over eps. Forwards per step: n. Extra memory: none.

E[g] is the gradient of the smoothed loss E L(theta + eps z), exactly, for any loss: each baseline is independent of its
direction. On linear losses E|g|^2 = (d + n)/(n - 1) |grad|^2 and cos^2 with the gradient is Beta((n-1)/2, (d-1)/2): n
forwards are worth n - 1 directions of MeZO, which cost 2n - 2. Curvature H takes that back at large eps, because even terms do
not cancel: the variance of c_i grows from |grad|^2 to |grad|^2 + eps^2 |H|_F^2 / 2.

Options: the baseline may be the mean of all losses, as in most code; the estimate is then (n-1)/n times as long. Shaping
by centred ranks (Salimans et al.), c_i = rank_i/(n-1) - 1/2, keeps no unit of the loss and is not divided by eps:
E[g] = grad/(2 sqrt(pi) |grad|) on linear losses, and learning rates are those of a normalised step. Losses that are not
numbers rank worst. The logged loss is the mean of the l_i, which estimates the smoothed loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination
from zotune.methods.sources import FromSource

BASELINES: dict[str, Callable[[int], float]] = {  # l_i - mean of the others = n/(n-1) (l_i - mean)
    "leave_one_out": lambda n: n / (n - 1),
    "mean": lambda n: 1.0,
}


def centred_ranks(losses: Tensor) -> Tensor:
    """(n,) losses -> (n,) ranks from -1/2 (lowest) to 1/2; equal losses share theirs, and NaN counts as infinite."""
    losses = torch.where(losses.isnan(), torch.inf, losses)
    one, other = losses[:, None], losses[None, :]
    lower = (other < one).sum(dim=1) + ((other == one).sum(dim=1) - 1) / 2
    return lower.to(torch.float64) / (len(losses) - 1) - 0.5


@dataclass(eq=False)
class ES(FromSource):
    """One-sided evolution strategy with a leave-one-out baseline."""

    n: int = 5  # directions and forwards per step
    baseline: str = "leave_one_out"  # or "mean": of all losses, the own one included
    shaping: str = "none"  # or "centered_ranks"
    source: str = "gaussian"  # where directions come from
    source_options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "es"
    paper: ClassVar[str] = "Salimans et al. 2017, arXiv 1703.03864; Kool et al. 2019"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("n", self.n >= 2, "at least 2 directions per step", "Losses are compared with each other.")
        self.check("baseline", self.baseline in BASELINES, " or ".join(BASELINES))
        self.check("shaping", self.shaping in SHAPINGS, " or ".join(SHAPINGS))
        ranked = self.shaping != "none"
        self.check("baseline", self.baseline == "leave_one_out" or not ranked, "left alone", "Ranks need no baseline.")
        self.take_source()

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return self.n

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of directions times how much worse each was than the others."""
        z = [self._source.draw(ctx) for _ in range(self.n)]
        losses = ctx.loss([ctx.eps * z_i for z_i in z])
        c, logged = SHAPINGS[self.shaping](self, losses, ctx.eps)
        g = sum(((c_i / self.n) * z_i for c_i, z_i in zip(c, z, strict=True)), Combination())
        return Estimate(g, logged, {"spread": losses.std()})

    def _compared(self, losses: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Coefficients that are differences of losses over eps, and the mean loss."""
        mean = losses.mean()
        return BASELINES[self.baseline](self.n) * (losses - mean) / eps, mean

    def _ranked(self, losses: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Centred ranks, and the mean of the losses that are finite: the others are ranked, not averaged."""
        return centred_ranks(losses), losses[losses.isfinite()].mean()


SHAPINGS: dict[str, Callable[[ES, Tensor, float], tuple[Tensor, Tensor]]] = {
    "none": ES._compared,
    "centered_ranks": ES._ranked,
}
