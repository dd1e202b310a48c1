"""Low-rank directions: left @ right.T on matrices, the same bits for any slice, thread count and BLAS.

A matrix product in floating point depends on how it is cut up, and a direction must not. So the factors are rounded onto
grids coarse enough (21 to 24 bits) that every product and every partial sum is an exact fp64 number: then no order of
summation matters, and the one rounding to the weight's precision is elementwise. Numbers of table noise are 32nds below 4:
they lie on such a grid as they are, and even fp32 holds the sums of their products. What cannot be exact (QR, SVD) is done
in fp64 by one thread, so that the number of threads does not show.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.context import Context
from zotune.core.direction import HERE, Combination, Direction, Leaves, Noise, Scalar, Scaled
from zotune.core.draws import draw_flat, draw_stack
from zotune.core.factors import Factors, OnSheets, Sheet
from zotune.core.grids import on_grid
from zotune.core.noise import CHUNK, Stream
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.kernels.contract import Term


def normal_matrix(source: Stream, site: Site, role: str, shape: tuple[int, ...], kind: str = "gaussian") -> Tensor:
    """A small matrix of standard normals that belongs to a site: `shape`, fp64, drawn on the CPU everywhere."""
    return Noise(source, kind).realise(Site(f"{site.name}#{role}", shape), torch.float64)


def normal_sheet(
    source: Stream, shapes: Mapping[str, tuple[int, int]], role: str, kind: str
) -> tuple[Tensor, tuple[int, ...]]:
    """`normal_matrix` for many sites at once: one fp32 tensor that holds them all, and the numbers each takes up in it."""
    names, counts = [f"{name}#{role}" for name in shapes], [math.prod(shape) for shape in shapes.values()]
    return draw_flat(source, names, counts, kind)


def normal_stack(source: Stream, names: Sequence[str], role: str, shape: tuple[int, int]) -> Tensor:
    """`normal_matrix` of one shape for many sites: (len(names), *shape), fp64, exact normals."""
    drawn = draw_stack(source, [f"{name}#{role}" for name in names], math.prod(shape), "gaussian")
    return drawn.reshape(len(names), *shape).double()


def signs(source: Stream, names: Sequence[str], role: str) -> Tensor:
    """(len(names),) independent signs, one that belongs to each site, fp64."""
    return draw_stack(source, [f"{name}#{role}" for name in names], 1, "rademacher")[:, 0].double()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums inside the block are split over no threads, so their order is the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def orthonormal(matrix: Tensor) -> Tensor:
    """(m, r) of full rank, m >= r -> its Q factor: orthonormal columns, fp64. The sign is fixed: R has a positive diagonal.

    Of a Gaussian matrix it is uniform among all orthonormal ones (Haar), which needs that sign.
    """
    with one_thread():
        q, r = torch.linalg.qr(matrix.detach().to("cpu", torch.float64))
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def random_basis(source: Stream, site: Site, role: str, shape: tuple[int, int]) -> Tensor:
    """(m, r) orthonormal columns, uniform among all such, that belong to a site: fp32, on a grid of rank r."""
    return on_grid(orthonormal(normal_matrix(source, site, role, shape)), shape[1]).float()


@dataclass(frozen=True, eq=False)
class LowRank(Direction):
    """Low-rank on the sites that have factors, another direction (by default zero) on the rest."""

    factors: Mapping[str, Factors]
    otherwise: Direction = HERE
    sheets: tuple[Sheet, ...] = ()  # if there are any: the same factors, all of them

    @classmethod
    def on(cls, sheets: Sequence[Sheet]) -> "LowRank":
        """Low-rank on what is on the sheets, zero elsewhere."""
        return cls(OnSheets(sheets), sheets=tuple(sheets))

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        factors = self.factors.get(site.name)
        if factors is None:
            self.otherwise.add_to(out, site, scale)
        elif site.rows is not None:
            out.add_((factors.chosen(site.rows, site.width, out.device).to(out.dtype) * scale).view(out.shape))
        elif out.is_contiguous():
            flat = out.view(-1)
            for offset, part in site.chunks(CHUNK):
                made = factors.run(part.start, part.count, out.device).to(out.dtype)
                flat[offset : offset + part.count].add_(made.mul_(scale))
        else:
            out.add_((factors.run(site.start, site.count, out.device).to(out.dtype) * scale).view(out.shape))

    def leaves(self, site: Site, scale: Scalar = 1.0) -> Leaves | None:
        """See `Direction.leaves`: itself where it has factors."""
        return ((scale, self),) if site.name in self.factors else self.otherwise.leaves(site, scale)

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """See `Direction.term`."""
        factors = self.factors.get(site.name)
        if factors is None or len(factors.left) * len(factors.right) != math.prod(site.shape):
            return None
        return Term.low_rank(factors.thin, scale)

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return site.name in self.factors or self.otherwise.touches(site)


def low_rank_or_noise(ctx: Context, low_rank: LowRank, scale: float = 1.0) -> Combination:
    """`scale` * low-rank on its sites, plain noise of the run's kind on the rest; on the groups' scale. Two terms."""
    return scale * ctx.per_group(low_rank) + Scaled(ctx.gaussian(), dict.fromkeys(low_rank.factors, 0.0))


def as_matrix(site: Site, square: bool = False) -> tuple[int, int] | None:
    """The shape in which a tensor counts as a matrix: its own if it has two dimensions (those of size 1 left out).

    Args:
        site: a whole tensor.
        square: instead the most nearly square shape with as many elements, for thin adapters (SubZero's reshape).

    Returns:
        None for vectors, scalars and tensors of three and more dimensions.
    """
    sizes = [size for size in site.shape if size != 1]
    if len(sizes) != 2:
        return None
    if not square or 0 in sizes:
        return sizes[0], sizes[1]
    numel = sizes[0] * sizes[1]
    rows = next(k for k in range(math.isqrt(numel), 0, -1) if numel % k == 0)
    return rows, numel // rows


def low_rank_shape(site: Site, rank: int, who: str, square: bool = False) -> tuple[int, int] | None:
    """As `as_matrix`, for factors of a rank.

    Raises:
        ConfigError: the rank is above the matrix's smaller side.
    """
    own, shape = as_matrix(site), as_matrix(site, square)
    if own is None or shape is None or rank <= min(shape):
        return shape
    seen = f", seen as {shape[0]} x {shape[1]}," if shape != own else ""
    raise ConfigError(
        f"rank must be between 1 and {min(shape)} for the tensor {site.name!r} of shape {own[0]} x {own[1]}{seen} whose "
        f"smaller side bounds the rank of any matrix like it; got {rank} ({who!r}). Lower the rank, or leave this tensor "
        "untrained."
    )
