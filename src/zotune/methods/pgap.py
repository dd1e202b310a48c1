"""P-GAP: directions inside the leading subspace of a rough gradient estimate, aligned with that estimate.

Mi, Tan, Zhang, Xu, Yuan, Huang, "Towards Fast LLM Fine-tuning through Zeroth-Order Optimization with Projected
Gradient-Aligned Perturbations", 2025, arXiv 2510.18228. Whenever the step t is a multiple of k, per matrix W (m x n):

    Q_j ~ N(0, I) over everything trained, j = 1 ... h
    rho_j = [ L(theta + eps Q_j) - L(theta - eps Q_j) ] / (2 eps)
    G = (1/h) sum_j rho_j Q_j                                             one matrix at a time, then forgotten
    U, S, V = the r largest singular values of G and their vectors        kept until the next refresh

and in every step:

    Z_0 ~ N(0, I), r x r;  xi = +-1
    Z = Z_0 - ( <S, Z_0> - xi sqrt(delta) |S| ) / |S|^2  S                so <U S V^T, U Z V^T> = xi sqrt(delta) |S|
    Zf = U Z V^T on matrices, plain noise elsewhere
    p = [ L(theta + eps Zf) - L(theta - eps Zf) ] / (2 eps)               one number for the whole model
    W <- W - lr p Zf                                                      the rule
    delta = delta_start + (delta_end - delta_start) t / horizon

Forwards per step: 2 + 2h/k on average. Extra memory: r (m + n + 1) fp32 numbers per matrix, and during a refresh one G.

What it estimates (derived here; P the projector on {U Z V^T}, a the gradient's component along G's direction ghat = U S
V^T / |S|, b^2 = |P grad|^2 - a^2): E[p Zf] = P grad + (delta - 1) a ghat for one matrix, and E|p Zf|^2 = (r^2 - 1 +
delta) (delta a^2 + b^2) + 2 b^2. So delta = 1 is the projected gradient, delta = 2 doubles the old estimate's part of it,
and delta = 0 deletes that part. With h = 10 probes the bases are all but random: see the method's page.

The paper leaves open, and here: xi is drawn per matrix and step ("matrix"; "shared": per step; "fixed": +1, as in the one
other implementation known); a rank above a matrix's smaller side is refused, or capped there with `cap`; embeddings are
matrices like any other; the probes of a refresh use eps and the batch of their step and move nothing. A matrix of which
the probes say nothing (S = 0), or whose first refresh had losses that are no finite numbers, has random orthonormal bases
and unaligned Z, which is SubZero's direction without its scale; a later refresh with such losses leaves all bases as they
were. The step itself is judged by its own pair of losses. No code of the authors is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination, Direction
from zotune.core.frames import Batch, Frames
from zotune.core.grids import on_grid
from zotune.core.low_rank import (
    as_matrix,
    low_rank_or_noise,
    low_rank_shape,
    normal_matrix,
    normal_stack,
    one_thread,
    orthonormal,
    random_basis,
    signs,
)
from zotune.core.noise import Stream
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.base import Base

OVERSAMPLING, ITERATIONS = 8, 2  # of the randomised decomposition: Halko, Martinsson, Tropp 2011, arXiv 0909.4061

Basis = tuple[Tensor, Tensor, Tensor]  # U (m, r), S (r,), V (n, r): fp32, U and V on grids of rank r


@dataclass(eq=False)
class PGAP(Base):
    """A central difference along a random direction that has a fixed component along an old estimate."""

    rank: int = 8  # r; the paper: 128, 256, 512 in full tuning, 8 with LoRA
    h: int = 10  # probes of a refresh
    k: int = 100  # steps from one refresh to the next
    delta_start: float = 2.0  # delta in step 0
    delta_end: float = 0.0  # delta from step `horizon` on
    horizon: int | None = None  # steps over which delta goes from start to end: those of the run
    xi: str = "matrix"  # "matrix": a sign per matrix and step; "shared": per step; "fixed": always +1
    svd: str = "exact"  # or "randomised", which pays at ranks far below the sides
    scale: str = "none"  # "matched": sqrt(mn)/r Zf, on the scale of plain noise, for lr and eps of MeZO
    basis: str = "estimate"  # "random": orthonormal bases that know nothing of G, as a control
    cap: bool = False  # take min(rank, m, n) where a matrix has a smaller side below the rank

    name: ClassVar[str] = "pgap"
    paper: ClassVar[str] = "Mi et al. 2025, arXiv 2510.18228"
    extra_state: ClassVar[str] = "r (m + n + 1) fp32 numbers per m x n matrix (U, S, V)"
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("rank", self.rank >= 1, "at least 1")
        self.check("h", self.h >= 1, "at least 1 probe")
        self.check("k", self.k >= 1, "at least 1 step")
        self.check(
            "delta_start", self.delta_start >= 0.0, "at least 0", "Its root is the component along the estimate."
        )
        self.check("delta_end", self.delta_end >= 0.0, "at least 0", "Its root is the component along the estimate.")
        self.check("horizon", self.horizon is None or self.horizon >= 1, "at least 1 step, or None")
        self.check("xi", self.xi in SIGNS, f"one of {', '.join(SIGNS)}")
        self.check("svd", self.svd in SUBSPACES, f"one of {', '.join(SUBSPACES)}")
        self.check("scale", self.scale in ("none", "matched"), "none or matched")
        self.check("basis", self.basis in ("estimate", "random"), "estimate or random")
        self._bases: dict[str, Basis] = {}
        self._frames: Frames | None = None  # the same bases, stacked
        self._refreshed: int | None = None  # the step

    @property
    def forwards(self) -> float:
        """Queries per step, on average."""
        return 2 + 2 * self.h / self.k

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Method.extra_bytes`."""
        shapes = [shape for site in sites if (shape := self._shape(site))]
        return sum(4 * r * (m + n + 1) for m, n, r in shapes)

    def estimate(self, ctx: Context) -> Estimate:
        """The slope p along Zf, times Zf."""
        delta, eps = self.delta(ctx.step), ctx.eps
        if ctx.step % self.k == 0 or self._refreshed is None:
            self._refresh(ctx)
        z = self._draw(ctx, delta)
        plus, minus = ctx.loss([+eps * z, -eps * z])
        p = (plus - minus) / (2 * eps)
        return Estimate(p * z, (plus + minus) / 2, {"rho": p, "delta": delta})

    def delta(self, step: int) -> float:
        """The projection magnitude of a step."""
        if self.delta_start == self.delta_end:
            return self.delta_start
        if self.horizon is None:
            raise ConfigError(
                f"horizon is needed: delta goes from {self.delta_start:g} to {self.delta_end:g} over the run, whose length a "
                "method does not know (method 'pgap'). Give horizon=<steps of the run>, or a delta_end equal to delta_start."
            )
        done = min(step / self.horizon, 1.0)
        return (1.0 - done) * self.delta_start + done * self.delta_end

    # ------------------------------------------------------------------------------------------------------------------

    def _draw(self, ctx: Context, delta: float) -> Direction:
        fresh, frames = ctx.stream(), self._stacked()

        def cores(batch: Batch) -> Tensor:
            z = normal_stack(fresh, batch.names, "core", (batch.rank, batch.rank))
            s = torch.stack([self._bases[name][1] for name in batch.names]).double()
            z = aligned(z, s, SIGNS[self.xi](fresh, batch.names) * delta**0.5)
            return z * (batch.numel.sqrt() / batch.rank)[:, None, None] if self.scale == "matched" else z

        return low_rank_or_noise(ctx, frames.around(cores))

    def _stacked(self) -> Frames:
        """The bases as `Frames`, made when they are first needed; `_bases` then holds views of them."""
        if self._frames is None:
            self._frames = Frames({name: (u, v) for name, (u, _, v) in self._bases.items()})
            self._bases = {n: (u, self._bases[n][1], v) for n, (u, v) in self._frames.pairs.items()}
        return self._frames

    def _refresh(self, ctx: Context) -> None:
        """Probe, then decompose the estimate of one matrix after the other."""
        eps, shapes = ctx.eps, {site: shape for site in ctx.sites if (shape := self._shape(site))}
        probes = [ctx.gaussian() for _ in range(self.h)]
        losses = ctx.loss([side * q for q in probes for side in (+eps, -eps)]).view(self.h, 2)
        rho = (losses[:, 0] - losses[:, 1]) / (2 * eps)
        known = bool(rho.isfinite().all())
        g = Combination(tuple((float(slope) / self.h, q) for slope, q in zip(rho, probes, strict=True)))
        random = ctx.stream()
        for site, (m, n, r) in shapes.items():
            if known:
                self._bases[site.name] = self._basis(g, random, site, (m, n, r))
            elif site.name not in self._bases:
                self._bases[site.name] = random_bases(random, site, (m, n, r))
        self._refreshed, self._frames = ctx.step, None

    def _basis(self, g: Direction, random: Stream, site: Site, shape: tuple[int, int, int]) -> Basis:
        m, n, r = shape
        estimate = g.realise(site, torch.float64).view(m, n)
        if self.basis == "random" or not bool(estimate.any()):
            u, _, v = random_bases(random, site, shape)
            return u, ((u.double().T @ estimate) * v.double().T).sum(dim=1).float(), v
        columns = SUBSPACES[self.svd](estimate if m >= n else estimate.T, r, random, site)
        u, s, v = decomposed(estimate if m >= n else estimate.T, columns, r)
        u, v = (u, v) if m >= n else (v, u)
        return on_grid(u, r).float(), s.float(), on_grid(v, r).float()

    def _shape(self, site: Site) -> tuple[int, int, int] | None:
        """m, n and r of a matrix; None for everything else."""
        own = as_matrix(site)
        r = min(self.rank, *own) if own and self.cap else self.rank
        shape = low_rank_shape(site, r, self.name)
        return (*shape, r) if shape else None

    # ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        bases = {name: dict(zip("USV", map(torch.clone, basis), strict=True)) for name, basis in self._bases.items()}
        return {"refreshed": self._refreshed, "bases": bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        kept: Mapping[str, Mapping[str, Tensor]] = state.get("bases", {})
        self._bases = {name: (b["U"].clone(), b["S"].clone(), b["V"].clone()) for name, b in kept.items()}
        self._refreshed, self._frames = state.get("refreshed"), None


def aligned(z: Tensor, s: Tensor, component: float | Tensor) -> Tensor:
    """z (..., r, r) with its component along diag(s) / |s| replaced by the given one; z itself where s (..., r) is 0."""
    with one_thread():
        square = (s * s).sum(dim=-1)
        inner = (z.diagonal(dim1=-2, dim2=-1) * s).sum(dim=-1)
    change = (inner - component * square.sqrt()) / square.where(square > 0, 1.0)  # of s
    return z - torch.diag_embed(change[..., None] * s)


def random_bases(source: Stream, site: Site, shape: tuple[int, int, int]) -> Basis:
    """Random orthonormal columns, and S = 0."""
    m, n, r = shape
    return random_basis(source, site, "left", (m, r)), torch.zeros(r), random_basis(source, site, "right", (n, r))


def decomposed(tall: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values of tall (m, n) whose right ones lie in the span of orthonormal columns (n, c).

    The sign is fixed: in each column of U the entry of largest magnitude is positive.
    """
    with one_thread():
        q, small = torch.linalg.qr(tall @ columns)
        u, s, vt = torch.linalg.svd(small)
        u, v = (q @ u)[:, :rank], (columns @ vt.T)[:, :rank]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    return u * sign, s[:rank], v * sign


def exact_subspace(tall: Tensor, rank: int, source: Stream, site: Site) -> Tensor:
    """The leading right singular vectors of tall (m, n): eigenvectors of the n x n Gram matrix.

    Squaring costs half the digits of small singular values. That is harmless: `decomposed` starts from these columns but
    decomposes the matrix itself, and 8 digits are as many as fp32 factors hold.
    """
    with one_thread():
        _, vectors = torch.linalg.eigh(tall.T @ tall)
    return vectors[:, -rank:].flip(1)


def randomised_subspace(tall: Tensor, rank: int, source: Stream, site: Site) -> Tensor:
    """Nearly the same by subspace iteration from a random start: a few thin products instead of n^3 work."""
    width = min(rank + OVERSAMPLING, tall.shape[1])
    columns = orthonormal(normal_matrix(source, site, "start", (tall.shape[1], width)))
    for _ in range(ITERATIONS):
        with one_thread():
            columns = tall.T @ orthonormal(tall @ columns)
        columns = orthonormal(columns)
    return columns


Subspace = Callable[[Tensor, int, Stream, Site], Tensor]
SUBSPACES: dict[str, Subspace] = {"exact": exact_subspace, "randomised": randomised_subspace}
SIGNS: dict[str, Callable[[Stream, Sequence[str]], Tensor]] = {  # one for each name
    "matrix": lambda source, names: signs(source, names, "xi"),
    "shared": lambda source, names: signs(source, [""], "xi").expand(len(names)),
    "fixed": lambda source, names: torch.ones(len(names), dtype=torch.float64),
}
