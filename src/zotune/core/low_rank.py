"""Low-rank directions: left @ right.T on matrices, the same bits for any slice, thread count and BLAS.

A matrix product in floating point depends on how it is cut up, and a direction must not. So the factors are rounded onto
grids coarse enough (21 to 24 bits) that every product and every partial sum is an exact fp64 number: then no order of
summation matters, and the one rounding to the weight's precision is elementwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.direction import HERE, Direction, Noise, Scalar
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

    def run(self, start: int, count: int, device: torch.device) -> Tensor:
        """Elements start ... start + count - 1 of the matrix in row-major order, exact, fp64."""
        width = self.right.shape[0]
        first, last = start // width, -(-(start + count) // width)
        rows = self.left[first:last].to(device, torch.float64) @ self.right.to(device, torch.float64).T
        return rows.view(-1)[start - first * width :][:count]


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
            for row, number in zip(out.view(-1, site.width), site.rows.tolist(), strict=True):
                row.add_(factors.run(number * site.width, site.width, out.device).to(out.dtype) * scale)
        elif out.is_contiguous():
            flat = out.view(-1)
            for offset, part in site.chunks(CHUNK):
                made = factors.run(part.start, part.count, out.device).to(out.dtype)
                flat[offset : offset + part.count].add_(made.mul_(scale))
        else:
            out.add_((factors.run(site.start, site.count, out.device).to(out.dtype) * scale).view(out.shape))

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return site.name in self.factors or self.otherwise.touches(site)


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
