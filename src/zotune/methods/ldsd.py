"""LDSD: directions come from N(mu, sigma^2 I), and the mean mu is learned from the losses of the candidates.

Parfenov, Evseev, Veprikov, Bushkov, Moiseev, Beznosikov, "Zero-Order Optimization for LLM Fine-Tuning via Learnable
Direction Sampling", 2026, arXiv 2602.13659. With u_k ~ N(0, I), v_k = mu + sigma u_k, k = 1 .. K, and tau = eps:

    f_k = L(theta + eps v_k)                                      one forward each, all on one batch
    v   = v_{k*},  k* = argmin_k f_k
    rho = [ L(theta + eps v) - L(theta - eps v) ] / (2 eps)       the plus side is f_{k*}
    g   = rho v                                                   the rule takes it from here
    c_k = f_k - mean of the other f_j
    mu <- (1 - decay) mu - lr_mu / (K sigma) sum_k c_k u_k        after theta, which saw the old mu

Forwards per step: K + 1 (K + 2 without `reuse`, as the released code). Extra memory: mu, one number per parameter.

sum_k c_k u_k / (K sigma) is the leave-one-out REINFORCE gradient of E L(theta + eps v) in mu: its mean is eps times
grad L, smoothed, for K >= 2; with the plain mean for a baseline it would be (K-1)/K of that. Hence lr_mu has units
1/(eps |grad|): ten times the eps wants a tenth of the lr_mu. While the gradient stays, cos(mu, -grad) =
1/sqrt(1 + d/(T(K-1))) after T steps. The learning rate along mu is effectively lr |mu|^2 and mu has no bound: `normalise`
scales the step by sigma^2 d/|v|^2, `decay` forgets. Neither is in the source.

Reconstructed from the released code, its authors' later correction of it and summaries; the paper's text was not
available. Ambiguous: the default of lr_mu. The code falls back on lr, about 1e-8 for full tuning, which never moves mu; the
authors' scripts give 1e-3, as here. mu starts at 0 (the sparse class starts it at a random unit vector per tensor). Defects
of the released code: ZO-SGD and ZO-AdaMM multiply c_k with noise that was never evaluated, so E of mu's step is 0 for
any loss (variant="released"); the sparse class gives equal shapes equal noise and credits candidates that never touched
a tensor (here one set of tensors serves a step's candidates); the logged loss is the smallest of the K.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination, Direction, Stored
from zotune.core.noise import CHUNK, Stream
from zotune.core.site import Site
from zotune.methods.base import Base
from zotune.methods.jaguar import restricted, subset
from zotune.methods.pizo import ranked
from zotune.methods.policy_mean import FORMS, PolicyMean

Draw = Callable[[], Direction]

# What the mean's step is made of: the candidates' noise, or (as released) noise that was never evaluated.
VARIANTS: dict[str, Callable[[list[Direction], Draw], list[Direction]]] = {
    "corrected": lambda u, draw: u,
    "released": lambda u, draw: [draw() for _ in u],
}


def leave_one_out(losses: Tensor) -> list[float]:
    """c_k = f_k minus the mean of the others, and 0 for losses that are not finite, which nobody's mean contains."""
    values = losses.tolist()
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return [0.0] * len(values)
    mean, factor = math.fsum(finite) / len(finite), len(finite) / (len(finite) - 1)
    return [(value - mean) * factor if math.isfinite(value) else 0.0 for value in values]


@dataclass(eq=False)
class LDSD(Base):
    """A central difference along the best of K draws from a normal distribution whose mean is learned."""

    k: int = 5  # K: candidates per step
    sigma: float = 1.0  # standard deviation of the candidates, called `variance` in the released code
    lr_mu: float = 1e-3  # the mean's learning rate; 0: the mean stays 0 and is not kept
    normalise: bool = False  # scale the step by sigma^2 d/|v|^2
    decay: float = 0.0  # share of the mean that a step forgets
    mean: str = "fp32"  # how the mean is kept: "fp32", "bf16" or "int8" (4, 2, 1.06 bytes a parameter)
    reuse: bool = True  # the winner's loss is its plus side: one forward less, the same number
    variant: str = "corrected"  # or "released": the mean is taught with other noise, and learns nothing
    ratio: float = 1.0  # share of the tensors that a step perturbs; 0.1 with the rule "jaguar"

    name: ClassVar[str] = "ldsd"
    paper: ClassVar[str] = "Parfenov et al. 2026, arXiv 2602.13659"
    extra_state: ClassVar[str] = "one number per parameter, the policy mean (none with lr_mu 0)"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("lr_mu", math.isfinite(self.lr_mu) and self.lr_mu >= 0, "at least 0; 1e-3 in the authors' scripts")
        least = 2 if self.lr_mu else 1
        why = "The mean learns from a candidate against the others; with lr_mu=0, k=1 is MeZO." if self.lr_mu else ""
        self.check("k", self.k >= least, f"at least {least}", why)
        self.check("sigma", math.isfinite(self.sigma) and self.sigma > 0, "positive", "It is a standard deviation.")
        self.check("decay", 0 <= self.decay < 1, "at least 0 and below 1")
        self.check("mean", self.mean in FORMS, f"one of {', '.join(FORMS)}")
        self.check("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        self.check("ratio", 0 < self.ratio <= 1, "above 0 and at most 1", "It is a share of the tensors.")
        self._mu = PolicyMean(self.mean) if self.lr_mu else None
        self._lesson = Combination()  # how the step under way would move the mean
        self._pending: tuple[Combination, Stream] | None = None  # how the last accepted step moves it

    @property
    def has_recipe(self) -> bool:
        """Not with a mean, which is a number per parameter."""
        return self._mu is None

    @property
    def forwards(self) -> int:
        """Queries per step."""
        return self.k + (1 if self.reuse else 2)

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """The mean."""
        return self._mu.extra_bytes(sites) if self._mu else 0

    def estimate(self, ctx: Context) -> Estimate:
        """Candidates, the pair along the best of them, and what they teach the mean."""
        if self._mu:
            self._learn()
            self._mu.place(ctx)
        eps = ctx.eps
        names = subset(ctx, self.ratio) if self.ratio < 1 else ()

        def draw() -> Direction:
            return restricted(ctx.gaussian(), names) if names else ctx.gaussian()

        u = [draw() for _ in range(self.k)]
        v = [self._around_mean(one, names) for one in u]
        losses = ctx.loss([+eps * one for one in v])
        best = ranked(losses)[0]
        if self.reuse:
            plus, (minus,) = losses[best], ctx.loss([-eps * v[best]])
        else:
            plus, minus = ctx.loss([+eps * v[best], -eps * v[best]])
        rho = (plus - minus) / (2 * eps)
        self._lesson = self._step_of_mean(losses, VARIANTS[self.variant](u, draw)) if self._mu else Combination()
        length = self._shortening(ctx, v[best]) if self.normalise else 1.0
        return Estimate((rho * length) * v[best], (plus + minus) / 2, {"rho": rho})

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """Remember how the mean is to move. It moves later: the weights are about to go along v with the old mean."""
        if self._mu:
            self._pending = (self._lesson, ctx.stream())

    def _around_mean(self, u: Direction, names: tuple[str, ...]) -> Combination:
        """v = mu + sigma u on the step's tensors.

        u comes scaled by the eps of its group. So does mu, being a sum of such u: both are a standard normal policy seen
        through the same scales, and the formulas hold in either space.
        """
        if self._mu is None:
            return self.sigma * u
        return (restricted(self._mu, names) if names else self._mu) + self.sigma * u

    def _step_of_mean(self, losses: Tensor, noise: list[Direction]) -> Combination:
        """-lr_mu / (K sigma) sum_k c_k u_k, over the candidates that have a loss."""
        found = sum(math.isfinite(value) for value in losses.tolist())
        if found < 2:
            return Combination()
        factor = -self.lr_mu / (found * self.sigma)
        pairs = zip(losses.tolist(), leave_one_out(losses), noise, strict=True)
        return Combination(tuple((factor * c, u) for value, c, u in pairs if math.isfinite(value)))

    def _learn(self) -> None:
        """Move the mean as the last accepted step taught it. Nothing reads the old mean any more."""
        if self._mu and self._pending:
            change, source = self._pending
            self._mu.move(change, 1.0 - self.decay, source)
        self._pending = None

    def _shortening(self, ctx: Context, v: Direction) -> float:
        """sigma^2 d / |v|^2, d the numbers that v touches, |v| in units of each group's eps as the policy is.

        The norm is rounded to fp32: sums of other threads, orders and devices differ far behind its last digit.
        """
        squares, d = [], 0
        for site in (site for site in ctx.sites if v.touches(site)):
            one = ctx.per_group(Stored({site.name: torch.ones(1, dtype=torch.float64)}))
            unit = float(one.realise(Site(site.name, (1,)), torch.float64))
            device = self._mu.device_of(site) if self._mu else torch.device("cpu")
            for _, part in site.chunks(CHUNK):
                squares.append(float(v.realise(part, torch.float64, device).square().sum()) / unit**2)
            d += site.numel
        return self.sigma**2 * d / float(torch.tensor(math.fsum(squares), dtype=torch.float32))

    def state_dict(self) -> dict[str, Any]:
        """The mean, with all that was learned."""
        self._learn()
        return {"mean": self._mu.state_dict()} if self._mu else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        self._pending, self._lesson = None, Combination()
        if self._mu and "mean" in state:
            self._mu.load_state_dict(state["mean"])
