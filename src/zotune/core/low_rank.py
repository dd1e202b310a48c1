"""Low-rank directions: left @ right.T on matrices, the same bits for any slice, thread count and BLAS.

A matrix product in floating point depends on how it is cut up, and a direction must not. So the factors are rounded onto
grids coarse enough (21 to 24 bits) that every product and every partial sum is an exact fp64 number: then no order of
summation matters, and the one rounding to the weight's precision is elementwise. What cannot be exact (QR, SVD) is done
in fp64 by one thread, so that the number of threads does not show.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.context import Context
from zotune.core.direction import HERE, Direction, Leaves, Noise, Scalar, Scaled
from zotune.core.errors import ConfigError
from zotune.core.noise import CHUNK, Stream
from zotune.core.site import Site

MAX_RANK = 1 << 11  # 2 * 21 bits of two factors and 11 bits of a sum fill fp64's 53


def grid_bits(rank: int) -> int:
    """Bits that each of two factors may have, so that a sum of `rank` products is exact in fp64 (and a factor in fp32)."""
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"The rank must be between 1 and {MAX_RANK}; got {rank}.")
    return min(24, (53 - math.ceil(math.log2(rank))) // 2)


def on_grid(values: Tensor, rank: int) -> Tensor:
    """Values rounded to multiples of 2**-bits of the power of two above the largest: (any shape), fp64 on the CPU.

    A relative change of the largest values of at most 2**-22, as of fp32 numbers.
    """
    values = values.detach().to("cpu", torch.float64)
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return values
    unit = 2.0 ** (math.frexp(largest)[1] - grid_bits(rank))
    return torch.round(values / unit) * unit


def normal_matrix(source: Stream, site: Site, role: str, shape: tuple[int, ...]) -> Tensor:
    """A small matrix of exact standard normals that belongs to a site: `shape`, fp64, drawn on the CPU everywhere."""
    return Noise(source, "gaussian").realise(Site(f"{site.name}#{role}", shape), torch.float64)


def signs(source: Stream, site: Site, role: str, count: int = 1) -> Tensor:
    """(count,) independent signs that belong to a site, fp64."""
    return Noise(source, "rademacher").realise(Site(f"{site.name}#{role}", (count,)), torch.float64)


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


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, k) @ right (k, n) of factors put onto grids: fp64, the same bits for any BLAS and thread count."""
    rank = left.shape[1]
    return on_grid(left, rank) @ on_grid(right, rank)


@dataclass(frozen=True)
class Factors:
    """One matrix as left (m, r) @ right (n, r).T. Make it with `Factors.of`, which puts both onto their grids.

    m * n is the site's number of elements; the matrix need not have the site's own shape (row-major order counts).
    """

    left: Tensor  # fp32, on a grid
    right: Tensor  # fp32, on a grid

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "Factors":
        """Factors rounded onto their grids, in fp32 (which holds them exactly)."""
        rank = left.shape[1]
        if right.shape[1] != rank:
            raise ConfigError(f"Factors need equal ranks; got {tuple(left.shape)} and {tuple(right.shape)}.")
        return cls(on_grid(left, rank).float(), on_grid(right, rank).float())

    @classmethod
    def around(cls, left: Tensor, core: Tensor, right: Tensor) -> "Factors":
        """left (m, r) @ core (r, r) @ right (n, r).T for two factors that are on grids of rank r.

        The core goes into the shorter factor; the longer one is shared with the caller, not copied.
        """
        if left.shape[0] > right.shape[0]:
            return cls(left, on_grid(matrix_product(right, core.T), core.shape[0]).float())
        return cls(on_grid(matrix_product(left, core), core.shape[0]).float(), right)

    def run(self, start: int, count: int, device: torch.device) -> Tensor:
        """Elements start ... start + count - 1 of the matrix in row-major order, exact, fp64."""
        width = self.right.shape[0]
        first, last = start // width, -(-(start + count) // width)
        rows = self.left[first:last].to(device, torch.float64) @ self.right.to(device, torch.float64).T
        return rows.view(-1)[start - first * width :][:count]

    def chosen(self, rows: Tensor, width: int, device: torch.device) -> Tensor:
        """Rows of a tensor that is `width` wide, exact, fp64: (k, width)."""
        if width == self.right.shape[0]:
            left = self.left[rows.to(self.left.device)]
            return left.to(device, torch.float64) @ self.right.to(device, torch.float64).T
        made = [self.run(row * width, width, device) for row in rows.tolist()]  # seen in another shape: a row is a run
        return torch.stack(made) if made else torch.zeros(0, width, dtype=torch.float64, device=device)


@dataclass(frozen=True, eq=False)
class LowRank(Direction):
    """Low-rank on the sites that have factors, another direction (by default zero) on the rest."""

    factors: Mapping[str, Factors]
    otherwise: Direction = HERE

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

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return site.name in self.factors or self.otherwise.touches(site)


def low_rank_or_noise(ctx: Context, factors: Mapping[str, Factors]) -> Direction:
    """Low-rank on the sites that have factors, plain noise of the run's kind on the rest; on the groups' scale."""
    return ctx.per_group(LowRank(factors)) + Scaled(ctx.gaussian(), dict.fromkeys(factors, 0.0))


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
    if not square:
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
