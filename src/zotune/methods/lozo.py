"""LOZO: products of two thin Gaussian matrices, one of which is kept for an interval.

Chen, Zhang, Cao, Yuan, Wen, "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures", ICLR 2025,
arXiv 2410.07698. Per matrix W (m x n), with t the step and nu the interval:

    V ~ N(0, I), n x r                                                  a new one whenever t is a multiple of nu
    U ~ N(0, I), m x r                                                  every step
    c = [ L(theta + eps U V^T) - L(theta - eps U V^T) ] / (2 eps)       one number for the whole model
    W <- W - lr c U V^T / r                                             the rule

Everything that is not a matrix gets plain noise z, and moves by c z. With momentum beta (LOZO-M):

    N <- N V_old^T V / n        when V has changed: what of the old momentum the new V can say
    N <- beta N + (1 - beta) c U
    W <- W - lr N V^T / r

Forwards per step: 2. Extra memory: none, since V comes from the run seed and t // nu; with momentum r m fp32 numbers per
matrix.

E[<G, U V^T> U V^T] = r G, hence the 1/r: E[c U V^T / r] is G over draws of U and V, and G V V^T / r while V is kept.
E|c U V^T / r|^2 = (mn + 2 + 2 (m + n + 1) / r) |G|^2, where MeZO has mn + 2 (derived here). So with the learning rate of
MeZO the moves are of MeZO's size. The probes are not: |U V^T|^2 is r m n on average, so eps counts sqrt(r) times.

The paper's LGE has the 1/r, the released code for large models has not: its learning rates are r times those here. That
code also draws V before U from one generator in the probes of a step that renews V, and not in its update, which thus
moves along another U than was probed, once per interval. It treats vectors as here; the paper speaks of matrices only.
Momentum of vectors is left open; here they have none. `rank` and `interval` are 1 or 2, and 50 or 100 in the paper's
search for OPT; momentum is 0.9.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Direction, Scaled
from zotune.core.errors import ConfigError
from zotune.core.low_rank import Factors, LowRank, low_rank_or_noise, low_rank_shape, normal_matrix, one_thread
from zotune.core.site import Site
from zotune.methods.base import Base


@dataclass(frozen=True)
class Lazy:
    """The source "lozo": U V^T / sqrt(r) on matrices, of unit variance; plain noise elsewhere."""

    rank: int = 2  # r
    interval: int = 50  # nu, steps that V is kept

    name: ClassVar[str] = "lozo"
    extra_state: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for option, good, needed in (
            ("rank", self.rank >= 1, "at least 1"),
            ("interval", self.interval >= 1, "at least 1 step"),
        ):
            if not good:
                raise ConfigError(f"{option} must be {needed}; got {getattr(self, option)!r} ({self.name!r}).")

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`. A rank above a matrix's smaller side is a ConfigError."""
        pairs = self.factors(ctx)
        return low_rank_or_noise(ctx, {name: Factors.of(u / self.rank**0.5, v) for name, (u, v) in pairs.items()})

    def factors(self, ctx: Context) -> dict[str, tuple[Tensor, Tensor]]:
        """A fresh U and the interval's V of each matrix."""
        fresh, pairs = ctx.stream(), {}
        for site in ctx.sites:
            shape = low_rank_shape(site, self.rank, self.name)
            if shape is not None:
                u = normal_matrix(fresh, site, "left", (shape[0], self.rank))
                pairs[site.name] = u, self.kept(ctx, site, shape[1], ctx.step // self.interval)
        return pairs

    def kept(self, ctx: Context, site: Site, columns: int, period: int) -> Tensor:
        """V of a matrix in the period-th interval."""
        return normal_matrix(ctx.stream("lozo", period), site, "right", (columns, self.rank))

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Source.extra_bytes`."""
        return 0


@dataclass(eq=False)
class LOZO(Base):
    """A central difference along U V^T, with momentum of U if asked for."""

    rank: int = 2  # r; 1 or 2 for OPT-13B, 4 for RoBERTa-large in the released scripts
    interval: int = 50  # nu, steps that V is kept; 50 or 100 in the released scripts
    momentum: float = 0.0  # beta; 0: LOZO; LOZO-M has 0.9

    name: ClassVar[str] = "lozo"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2410.07698"
    extra_state: ClassVar[str] = "with momentum, r m fp32 numbers per m x n matrix (N)"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("momentum", 0.0 <= self.momentum < 1.0, "at least 0 and below 1")
        self.source = Lazy(self.rank, self.interval)  # checks its options
        self._mean: dict[str, Tensor] = {}  # N
        self._period = 0  # the interval whose V belongs to N
        self._next: dict[str, Tensor] = {}  # N after this step, if the step is accepted

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Method.extra_bytes`."""
        shapes = [low_rank_shape(site, self.rank, self.name) for site in sites]
        return sum(4 * self.rank * shape[0] for shape in shapes if shape is not None) if self.momentum else 0

    def estimate(self, ctx: Context) -> Estimate:
        """The slope c along U V^T, times U V^T / r; or the mean of such."""
        pairs, eps = self.source.factors(ctx), ctx.eps
        d = low_rank_or_noise(ctx, {name: Factors.of(u, v) for name, (u, v) in pairs.items()})
        plus, minus = ctx.loss([+eps * d, -eps * d])
        c = (plus - minus) / (2 * eps)
        g = c * Scaled(d, dict.fromkeys(pairs, 1.0 / self.rank))
        if self.momentum:
            self._next = self._averaged(ctx, pairs, float(c))
            mean = {name: Factors.of(n / self.rank, pairs[name][1]) for name, n in self._next.items()}
            g = c * Scaled(d, dict.fromkeys(pairs, 0.0)) + ctx.per_group(LowRank(mean))
        return Estimate(g, (plus + minus) / 2, {"rho": float(c)})

    def _averaged(self, ctx: Context, pairs: dict[str, tuple[Tensor, Tensor]], c: float) -> dict[str, Tensor]:
        """beta N + (1 - beta) c U, with N taken over to the V of this step first."""
        beta, sites, made = self.momentum, {site.name: site for site in ctx.sites}, {}
        for name, (u, v) in pairs.items():
            mean = self._mean.get(name, torch.zeros(u.shape)).double()
            if ctx.step // self.interval != self._period and name in self._mean:
                old = self.source.kept(ctx, sites[name], len(v), self._period)
                with one_thread():
                    mean = mean @ (old.T @ v) / len(v)
            made[name] = (beta * mean + (1.0 - beta) * c * u).float()
        return made

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """See `Method.observe`: the mean goes on from here."""
        self._mean, self._next, self._period = self._next, {}, ctx.step // self.interval

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return {"period": self._period, "mean": {name: n.clone() for name, n in self._mean.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        self._mean = {name: n.detach().clone() for name, n in state.get("mean", {}).items()}
        self._period, self._next = int(state.get("period", 0)), {}
