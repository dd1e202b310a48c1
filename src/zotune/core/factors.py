"""Matrices as products of two thin factors, one at a time and many on one sheet."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zotune.core.grids import on_grid
from zotune.errors import ConfigError
from zotune.kernels.contract import ThinFactors

TABLE_CEILING = 4.0  # a power of two above every number of table noise, which ends at 83/32
TABLE_RANK = 1 << 11  # up to here sums of products of table noise are exact in fp32: 83**2 * 2**11 < 2**24


def by_columns(factor: Tensor) -> Tensor:
    """A copy that lies in memory column after column: thin products read it like that, and then need no copy of theirs."""
    return factor.t().clone(memory_format=torch.contiguous_format).t()


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

    @cached_property
    def thin(self) -> ThinFactors:
        """As the kernels take them: made once for all points and the move along them."""
        return ThinFactors(self.left, self.right.T.contiguous(), self.single and self.rank <= TABLE_RANK)

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


class OnSheets(Mapping[str, Factors]):
    """The factors of all matrices on some sheets. A sheet is cut up when one of its matrices is first asked for: sums of
    sheets never are."""

    def __init__(self, sheets: Sequence[Sheet]) -> None:
        self._sheets = {name: sheet for sheet in sheets for name in sheet.names}
        self._found: dict[str, Factors] = {}

    def __getitem__(self, name: str) -> Factors:
        if name not in self._found:
            self._found.update(self._sheets[name].factors())
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sheets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sheets)

    def __len__(self) -> int:
        return len(self._sheets)
