"""SubZero: random low-rank directions between bases that are kept for an interval.

Yu, Zhou, Wang, Li, Tian, Huang, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", ICCV 2025, arXiv 2410.08989.
Per matrix W (m x n), with t the step and F the interval:

    U, V = Q factors of Gaussian (m x r) and (n x r) matrices       new ones whenever t is a multiple of F
    Z ~ N(0, I), r x r                                              every step, exact normals whatever the run's noise
    Zt = sqrt(m n) / r  *  U Z V^T                                  so E|Zt|^2 = m n, as of plain noise
    rho = [ L(theta + eps Zt) - L(theta - eps Zt) ] / (2 eps)       one number for the whole model
    W <- W - lr rho Zt                                              the rule

Everything that is not a matrix gets plain noise. Forwards per step: 2n, or n + 1 one-sided. Extra memory: r (m + n) fp32
numbers per matrix, a cache: the bases come from the run seed and t // F, so they are never saved.

E[rho Zt] = mn/r^2 U U^T G V V^T inside an interval (G the gradient), and G over the draws of U and V. E|rho Zt|^2 is
(mn/r^2)^2 (r^2 + 2) |U^T G V|^2, on average mn (1 + 2/r^2) |G|^2: no less than MeZO's mn + 2 (derived here). What
differs is that directions repeat inside an interval, whose total update has rank r.

Adapters and prompts are thin (8 x d), and the paper looks at them in the most nearly square shape with as many elements;
its code does so for every matrix in those modes and for none in full tuning. Here `reshape="auto"` decides by the
matrix: reshaped where the smaller side is at most 8 r. The released code draws the bases from whatever state the
generator is in, so a run that resumes inside an interval has none; uses fp16 bases, which are orthonormal to 1e-3 only;
and fails in the update if r is above the smaller side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Direction
from zotune.core.frames import Batch, Frames
from zotune.core.low_rank import as_matrix, low_rank_or_noise, low_rank_shape, normal_stack, random_basis
from zotune.core.noise import Stream
from zotune.core.options import Options
from zotune.core.site import Site
from zotune.methods.base import Base
from zotune.methods.mezo import central, forward

THIN = 8  # a side of at most THIN * rank is thin: the basis would span an eighth of it or more
RESHAPES = ("auto", "never", "always")


@dataclass(eq=False)
class Subspace(Options):
    """The source "subzero": sqrt(mn)/r U Z V^T on matrices, plain noise elsewhere."""

    rank: int = 8  # r; the released code's default, and 24 in its example
    interval: int = 1000  # F, steps that the bases are kept; the paper's choice (2000 in the released code)
    reshape: str = "auto"  # look at a matrix in its most nearly square shape: "auto" (thin ones), "never", "always"

    name: ClassVar[str] = "subzero"
    extra_state: ClassVar[str] = "r (m + n) fp32 numbers per m x n matrix (the bases; made again, never saved)"
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("rank", self.rank >= 1, "at least 1")
        self.check("interval", self.interval >= 1, "at least 1 step")
        self.check("reshape", self.reshape in RESHAPES, f"one of {', '.join(RESHAPES)}")
        self._frames = Frames({})  # a cache: what it is made of is all that it depends on
        self._made_of: tuple[Stream, list[Site]] | None = None

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`. A rank above a matrix's smaller side is a ConfigError."""
        self._renew(ctx)
        fresh = ctx.stream()

        def cores(batch: Batch) -> Tensor:
            drawn = normal_stack(fresh, batch.names, "core", (batch.rank, batch.rank))
            return drawn.mul_((batch.numel.sqrt() / batch.rank)[:, None, None])

        return low_rank_or_noise(ctx, self._frames.around(cores))

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Source.extra_bytes`."""
        shapes = [self.shape_of(site) for site in sites]
        return sum(4 * self.rank * sum(shape) for shape in shapes if shape is not None)

    def shape_of(self, site: Site) -> tuple[int, int] | None:
        """The shape in which a tensor counts as a matrix; None if it is none.

        Raises:
            ConfigError: the rank is above the smaller side.
        """
        own = as_matrix(site)
        if own is None:
            return None
        square = self.reshape == "always" or (self.reshape == "auto" and min(own) <= THIN * self.rank)
        return low_rank_shape(site, self.rank, self.name, square)

    def _renew(self, ctx: Context) -> None:
        kept = ctx.stream("subzero", ctx.step // self.interval)
        made_of = (kept, list(ctx.sites))
        if made_of == self._made_of:
            return
        bases = {}
        for site in ctx.sites:
            shape = self.shape_of(site)
            if shape is not None:
                left = random_basis(kept, site, "left", (shape[0], self.rank))
                bases[site.name] = left, random_basis(kept, site, "right", (shape[1], self.rank))
        self._frames, self._made_of = Frames(bases), made_of


@dataclass(eq=False)
class SubZero(Base):
    """Differences of losses along directions of the source "subzero"."""

    rank: int = 8  # r; the released code's default, and 24 in its example
    interval: int = 1000  # F, steps that the bases are kept; the paper's choice (2000 in the released code)
    reshape: str = "auto"  # look at a matrix in its most nearly square shape: "auto" (thin ones), "never", "always"
    n: int = 1  # directions per step, which share the bases; 1 in the paper
    sides: int = 2  # 2: central differences; 1: forward differences against the current weights

    name: ClassVar[str] = "subzero"
    paper: ClassVar[str] = "Yu et al. 2025, arXiv 2410.08989"
    extra_state: ClassVar[str] = Subspace.extra_state
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("n", self.n >= 1, "at least 1 direction per step")
        self.check("sides", self.sides in (1, 2), "1 (forward) or 2 (central differences)")
        self.source = Subspace(self.rank, self.interval, self.reshape)  # checks its options

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2 * self.n if self.sides == 2 else self.n + 1

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Method.extra_bytes`."""
        return self.source.extra_bytes(sites)

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of n projected gradients times their directions."""
        return self._central(ctx) if self.sides == 2 else self._forward(ctx)

    def _central(self, ctx: Context) -> Estimate:
        return central(ctx, [self.source.draw(ctx) for _ in range(self.n)])

    def _forward(self, ctx: Context) -> Estimate:
        return forward(ctx, [self.source.draw(ctx) for _ in range(self.n)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Method.load_state_dict`: nothing is saved, and the bases are made again at the next step."""
        self.source = Subspace(self.rank, self.interval, self.reshape)
