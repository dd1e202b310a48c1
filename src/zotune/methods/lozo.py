"""LOZO: products of two thin Gaussian matrices, one of which is kept for an interval.

Chen, Zhang, Cao, Yuan, Wen, "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures", ICLR 2025,
arXiv 2410.07698. Per matrix W (m x n), with t the step and nu the interval:

    V ~ N(0, I), n x r                                                  a new one whenever t is a multiple of nu
    U ~ N(0, I), m x r                                                  every step
    c = [ L(theta + eps U V^T) - L(theta - eps U V^T) ] / (2 eps)       one number for the whole model
    W <- W - lr c U V^T / r                                             the rule

Everything that is not a matrix gets plain noise z, and moves by c z. U and V are of the run's kind of noise: by default
numbers of the table, whose first two moments are those of N(0, I) exactly, and whose fourth is 3.00003. With momentum
beta (LOZO-M):

    N <- N V_old^T V / n        when V has changed: what of the old momentum the new V can say
    N <- beta N + (1 - beta) c U
    W <- W - lr N V^T / r

Forwards per step: 2. Extra memory: r n fp32 numbers per matrix, V, a cache: it comes from the run seed and t // nu and is
never saved; with momentum r m more, which are.

E[<G, U V^T> U V^T] = r G, hence the 1/r: E[c U V^T / r] is G over draws of U and V, and G V V^T / r while V is kept.
E|c U V^T / r|^2 = (mn + 2 + 2 (m + n + 1) / r) |G|^2, where MeZO has mn + 2 (derived here). So with the learning rate of
MeZO the moves are of MeZO's size. The probes are not: |U V^T|^2 is r m n on average, so eps counts sqrt(r) times.

The paper's LGE has the 1/r, the released code for large models has not: its learning rates are r times those here. That
code also draws V before U from one generator in the probes of a step that renews V, and not in its update, which thus
moves along another U than was probed, once per interval. It treats vectors as here; the paper speaks of matrices only.
Momentum of vectors is left open; here they have none. `rank` and `interval` are 1 or 2, and 50 or 100 in the paper's
search for OPT; momentum is 0.9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Direction
from zotune.core.factors import TABLE_CEILING, Factors, Sheet, by_columns
from zotune.core.grids import on_grids
from zotune.core.low_rank import LowRank, low_rank_or_noise, low_rank_shape, normal_sheet, one_thread
from zotune.core.noise import Stream
from zotune.core.options import Options
from zotune.core.site import Site
from zotune.methods.base import Base


@dataclass(eq=False)
class Lazy(Options):
    """The source "lozo": U V^T / sqrt(r) on matrices, of unit variance; plain noise elsewhere."""

    rank: int = 2  # r
    interval: int = 50  # nu, steps that V is kept

    name: ClassVar[str] = "lozo"
    extra_state: ClassVar[str] = "r n fp32 numbers per m x n matrix (V; made again, never saved)"
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("rank", self.rank >= 1, "at least 1")
        self.check("interval", self.interval >= 1, "at least 1 step")
        self._shapes: dict[str, tuple[int, int]] = {}  # three caches: what they are made of is all that they depend on
        self._sites: list[Site] = []
        self._v: tuple[tuple[Stream, str] | None, dict[str, Tensor]] = (None, {})

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`. A rank above a matrix's smaller side is a ConfigError."""
        return low_rank_or_noise(ctx, self.low_rank_part(ctx), self.rank**-0.5)

    def low_rank_part(self, ctx: Context) -> LowRank:
        """A fresh U times the interval's V of each matrix."""
        shapes, kind = self._matrices(ctx), ctx.kind
        v = self.kept(ctx, ctx.step // self.interval)
        sides = {name: (m, self.rank) for name, (m, _) in shapes.items()}
        u, sizes = normal_sheet(ctx.stream(), sides, "left", kind)
        ceilings = torch.full((len(sizes),), TABLE_CEILING, dtype=torch.float64)
        names, kept, fresh = tuple(sides), tuple(v.values()), ("left",) * len(sides)
        sheet = Sheet(names, u, sizes, tuple(sides.values()), False, kept, fresh, ceilings, single=True)
        if kind != "gaussian":
            return LowRank.on([sheet])
        rounded, tops = on_grids([each.left for each in sheet.factors().values()], self.rank)
        made = zip(v.items(), rounded, tops, strict=True)
        return LowRank({name: Factors(left, right, "left", top) for (name, right), left, top in made})

    def kept(self, ctx: Context, period: int) -> dict[str, Tensor]:
        """V of each matrix in the period-th interval: the same tensors as long as it is asked for."""
        source, kind, shapes = ctx.stream("lozo", period), ctx.kind, self._matrices(ctx)
        if self._v[0] != (source, kind):
            sides = {name: (n, self.rank) for name, (_, n) in shapes.items()}
            flat, sizes = normal_sheet(source, sides, "right", kind)
            parts = zip(torch.split(flat, list(sizes)), sides.values(), strict=True)
            v = [by_columns(part[: n * r].view(n, r)) for part, (n, r) in parts]
            v = v if kind != "gaussian" else on_grids(v, self.rank)[0]
            self._v = (source, kind), dict(zip(shapes, v, strict=True))
        return self._v[1]

    def _matrices(self, ctx: Context) -> dict[str, tuple[int, int]]:
        if ctx.sites != self._sites:
            shapes = {site.name: low_rank_shape(site, self.rank, self.name) for site in ctx.sites}
            self._shapes = {name: shape for name, shape in shapes.items() if shape is not None}
            self._sites, self._v = list(ctx.sites), (None, {})
        return self._shapes

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Source.extra_bytes`."""
        shapes = [low_rank_shape(site, self.rank, self.name) for site in sites]
        return sum(4 * self.rank * shape[1] for shape in shapes if shape is not None)


@dataclass(eq=False)
class LOZO(Base):
    """A central difference along U V^T, with momentum of U if asked for."""

    rank: int = 2  # r; 1 or 2 for OPT-13B, 4 for RoBERTa-large in the released scripts
    interval: int = 50  # nu, steps that V is kept; 50 or 100 in the released scripts
    momentum: float = 0.0  # beta; 0: LOZO; LOZO-M has 0.9

    name: ClassVar[str] = "lozo"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2410.07698"
    extra_state: ClassVar[str] = "r n fp32 numbers per m x n matrix (V), with momentum r m more (N)"
    low_rank: ClassVar[bool] = True

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
        momentum = sum(4 * self.rank * shape[0] for shape in shapes if shape is not None) if self.momentum else 0
        return self.source.extra_bytes(sites) + momentum

    def estimate(self, ctx: Context) -> Estimate:
        """The slope c along U V^T, times U V^T / r; or the mean of such."""
        low_rank, eps = self.source.low_rank_part(ctx), ctx.eps
        d = low_rank_or_noise(ctx, low_rank)
        plus, minus = ctx.loss([+eps * d, -eps * d])
        c = (plus - minus) / (2 * eps)
        (_, matrices), (_, rest) = d.terms
        if not self.momentum:
            g = (c / self.rank) * matrices + c * rest
        else:
            mean = self._averaged(ctx, low_rank.factors, float(c))
            self._next = {name: each.left for name, each in mean.items()}
            g = ctx.per_group(LowRank(mean)) / self.rank + c * rest
        return Estimate(g, (plus + minus) / 2, {"rho": c})

    def _averaged(self, ctx: Context, factors: Mapping[str, Factors], c: float) -> dict[str, Factors]:
        """(beta N + (1 - beta) c U) V^T, with N taken over to the V of this step first."""
        before = {name: self._mean.get(name, torch.zeros(each.left.shape)) for name, each in factors.items()}
        if self._mean and ctx.step // self.interval != self._period:
            old = Lazy(self.rank, self.interval).kept(ctx, self._period)  # of its own: the source keeps this step's
            with one_thread():
                for name, n in before.items():
                    v = factors[name].right.double()
                    before[name] = (n.double() @ (old[name].double().T @ v) / len(v)).float()
        fresh = torch._foreach_mul([each.left for each in factors.values()], (1.0 - self.momentum) * c)
        summed = torch._foreach_add(torch._foreach_mul(list(before.values()), self.momentum), fresh)
        mean, ceilings = on_grids(summed, self.rank)
        made = zip(factors.items(), mean, ceilings, strict=True)
        return {name: Factors(n, each.right, "left", ceiling) for (name, each), n, ceiling in made}

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
