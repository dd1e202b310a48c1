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
from functools import lru_cache

import torch
from torch import Tensor

from zotune.core.context import Context
from zotune.core.direction import HERE, Combination, Direction, Leaves, Noise, Scalar, Scaled
from zotune.core.draws import draw_flat, draw_stack
from zotune.core.errors import ConfigError
from zotune.core.noise import CHUNK, Stream
from zotune.core.site import Site

MAX_RANK = 1 << 11  # 2 * 21 bits of two factors and 11 bits of a sum fill fp64's 53
SMALLEST = 2.0**-100  # numbers below it are on no grid: its units would leave fp32's exponents
TABLE_CEILING = 4.0  # a power of two above every number of table noise, which ends at 83/32
TABLE_RANK = 1 << 11  # up to here sums of products of table noise are exact in fp32: 83**2 * 2**11 < 2**24


@lru_cache(maxsize=MAX_RANK)
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
    unit = ceiling_of(largest) * 2.0 ** -grid_bits(rank)
    return torch.round(values / unit) * unit


def ceiling_of(largest: float) -> float:
    """The power of two above a positive number."""
    return 2.0 ** math.frexp(largest)[1]


def on_grids(many: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[float]]:
    """`on_grid` of many fp32 tensors at once, in fp32 (the same numbers: all that happens is scaled by powers of two).

    Returns:
        The rounded tensors, and for each a power of two above its numbers (0 for a tensor of zeros).
    """
    if not many:
        return [], []
    many = list(many)
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(many))).tolist()
    ceilings = [ceiling_of(value) if value and math.isfinite(value) else 0.0 for value in largest]
    units = [max(ceiling, SMALLEST) * 2.0 ** -grid_bits(rank) for ceiling in ceilings]
    made = torch._foreach_mul(many, [1.0 / unit for unit in units])
    torch._foreach_round_(made)
    torch._foreach_mul_(made, units)
    return list(made), ceilings


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


@dataclass(frozen=True)
class Factors:
    """One matrix as left (m, r) @ right (n, r).T. Make it with `Factors.of`, which puts both onto their grids.

    m * n is the site's number of elements; the matrix need not have the site's own shape (row-major order counts).
    One of the two factors is usually kept for many steps, as the same tensor: what adds up directions, and what
    multiplies activations by several of them, finds by that what they have in common.
    """

    left: Tensor  # fp32, on a grid
    right: Tensor  # fp32, on a grid
    fresh: str = "left"  # "left" or "right": the factor that is another in each step
    ceiling: float | None = None  # a power of two that no number of the fresh factor exceeds; None: not known
    single: bool = False  # both are table noise: sums of their products are exact in fp32 already

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "Factors":
        """Factors rounded onto their grids, in fp32 (which holds them exactly)."""
        rank = left.shape[1]
        if right.shape[1] != rank:
            raise ConfigError(f"Factors need equal ranks; got {tuple(left.shape)} and {tuple(right.shape)}.")
        return cls(on_grid(left, rank).float(), on_grid(right, rank).float())

    @property
    def rank(self) -> int:
        """Columns of each factor."""
        return self.left.shape[1]

    @property
    def changing(self) -> Tensor:
        """The fresh factor."""
        return self.left if self.fresh == "left" else self.right

    @property
    def kept(self) -> Tensor:
        """The other one."""
        return self.right if self.fresh == "left" else self.left

    def run(self, start: int, count: int, device: torch.device) -> Tensor:
        """Elements start ... start + count - 1 of the matrix in row-major order, exact: fp32 if that holds them, or fp64."""
        width = self.right.shape[0]
        first, last = start // width, -(-(start + count) // width)
        rows = self._product(self.left[first:last], device)
        return rows.view(-1)[start - first * width :][:count]

    def chosen(self, rows: Tensor, width: int, device: torch.device) -> Tensor:
        """Rows of a tensor that is `width` wide, exact, fp32 or fp64: (k, width)."""
        if width == self.right.shape[0]:
            return self._product(self.left[rows.to(self.left.device)], device)
        made = [self.run(row * width, width, device) for row in rows.tolist()]  # seen in another shape: a row is a run
        return torch.stack(made) if made else torch.zeros(0, width, device=device)

    def _product(self, left: Tensor, device: torch.device) -> Tensor:
        precision = torch.float32 if self.single and self.rank <= TABLE_RANK else torch.float64
        return left.to(device, precision) @ self.right.to(device, precision).T


@dataclass(frozen=True, eq=False)
class Sheet:
    """Factors of many matrices whose fresh sides lie in one tensor, so that they can be added up in a few calls."""

    names: tuple[str, ...]
    values: Tensor  # (sum of sizes,) fp32: one fresh side after the other
    sizes: tuple[int, ...]  # numbers that each takes up; it may need fewer
    shapes: tuple[tuple[int, int], ...]  # of what lies there
    turned: bool  # what lies there is transposed
    kept: tuple[Tensor, ...]  # the other sides
    fresh: tuple[str, ...]  # see `Factors`
    ceilings: Tensor  # (k,) fp64, see `Factors`
    single: bool = False  # see `Factors`

    def laid_out_as(self, other: "Sheet") -> bool:
        """Whether the same matrices lie at the same places, in the same way."""
        return (
            self.names == other.names
            and self.shapes == other.shapes
            and self.sizes == other.sizes
            and self.turned == other.turned
            and self.fresh == other.fresh
        )

    def factors(self) -> dict[str, Factors]:
        """By name; their fresh sides are views."""
        parts = [
            (part if size == shape[0] * shape[1] else part[: shape[0] * shape[1]]).view(shape)
            for part, size, shape in zip(
                torch.split(self.values, list(self.sizes)), self.sizes, self.shapes, strict=True
            )
        ]
        new = [part.T for part in parts] if self.turned else parts
        rows = zip(self.names, new, self.kept, self.fresh, self.ceilings.tolist(), strict=True)
        return {
            name: Factors(side, kept, which, ceiling, self.single)
            if which == "left"
            else Factors(kept, side, which, ceiling, self.single)
            for name, side, kept, which, ceiling in rows
        }


@dataclass(frozen=True, eq=False)
class LowRank(Direction):
    """Low-rank on the sites that have factors, another direction (by default zero) on the rest."""

    factors: Mapping[str, Factors]
    otherwise: Direction = HERE
    sheets: tuple[Sheet, ...] = ()  # if there are any: the same factors, all of them

    @classmethod
    def on(cls, sheets: Sequence[Sheet]) -> "LowRank":
        """Low-rank on what is on the sheets, zero elsewhere."""
        factors: dict[str, Factors] = {}
        for sheet in sheets:
            factors.update(sheet.factors())
        return cls(factors, sheets=tuple(sheets))

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
