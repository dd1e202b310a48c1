"""Pending updates: what low-rank steps have moved, kept as factors beside the weights and folded into them now and then.

Writing left @ right.T into every weight costs a pass over all of them; steps that share one factor add up in the other
one, which is a thousandth of that. So between two folds the weights that count are

    stored weights + sum over steps of c (left @ right.T)                every query point is displaced by that sum

and a fold adds the sum to the stored weights: one update of each tensor for many steps, so that low-precision storage
rounds once and not in each of them.

The sum of a factor's multiples is kept in fp32 on a grid of a power of two that bounds |c| * |factor| summed over the
steps: then every sum is exact after each summand's own rounding (about 2**-19 of what a period of 50 steps moves), a
product with the kept factor is exact in fp64, and no order, chunk or thread count shows. All matrices of a `Sheet` are
done at once: a step's move costs a handful of calls.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction
from zotune.core.factors import Factors, Sheet
from zotune.core.grids import SMALLEST, ceiling_of, grid_bits
from zotune.core.low_rank import LowRank
from zotune.core.site import Site
from zotune.core.weights import Weights

MAX_COLUMNS = 16  # columns of all factors of a tensor together, if they are more than one pair


@dataclass(frozen=True)
class Move:
    """A multiple of what lies on a sheet: a displacement of its tensors, or a part of it."""

    coefficients: Tensor  # (k,) fp64
    sheet: Sheet


def moves_of(direction: Direction, sites: Sequence[Site]) -> tuple[list[Move], set[str]]:
    """The low-rank part of a displacement, and on which of the sites that is all of it (the others are not in it)."""
    quick = _whole_sheets(direction, sites)
    if quick is not None:
        return quick
    parts = {site.name: made for site in sites if (made := low_rank_parts(direction, site))}
    depth = max(map(len, parts.values()), default=0)
    return [_collected({n: p[k] for n, p in parts.items() if k < len(p)}) for k in range(depth)], set(parts)


def low_rank_parts(direction: Direction, site: Site) -> list[tuple[float, Factors]]:
    """A direction on one site as a sum of multiples of low-rank matrices; empty if it is none, or is zero there."""
    parts: list[tuple[float, Factors]] = []
    for coefficient, leaf in direction.leaves(site) or ():
        if not isinstance(leaf, LowRank) or site.name not in leaf.factors:
            return []
        parts.append((float(coefficient), leaf.factors[site.name]))
    return parts


def _whole_sheets(direction: Direction, sites: Sequence[Site]) -> tuple[list[Move], set[str]] | None:
    """The usual case without a look at each tensor: a plain sum of low-rank directions on sheets and of what is not there."""
    terms = list(_terms(direction, 1.0))
    low_rank = [(c, term) for c, term in terms if isinstance(term, LowRank) and term.sheets]
    rest = [term for _, term in terms if not (isinstance(term, LowRank) and term.sheets)]
    names = {name for _, term in low_rank for name in term.factors}
    inside = [site for site in sites if site.name in names]
    if not names or len(inside) < len(names) or any(term.touches(site) for term in rest for site in inside):
        return None
    moves = [Move(torch.full((len(s.names),), c, dtype=torch.float64), s) for c, term in low_rank for s in term.sheets]
    return moves, names


def _terms(direction: Direction, scale: float) -> Iterator[tuple[float, Direction]]:
    """A sum of sums as one sum."""
    if isinstance(direction, Combination):
        for coefficient, inner in direction.terms:
            yield from _terms(inner, scale * float(coefficient))
    else:
        yield scale, direction


def _collected(parts: Mapping[str, tuple[float, Factors]]) -> Move:
    """Multiples of factors from anywhere, on a sheet made for them."""
    factors = [each for _, each in parts.values()]
    sides = [each.changing for each in factors]
    sheet = Sheet(
        names=tuple(parts),
        values=torch.cat([side.reshape(-1) for side in sides]),
        sizes=tuple(side.numel() for side in sides),
        shapes=tuple((len(side), each.rank) for side, each in zip(sides, factors, strict=True)),
        turned=False,
        kept=tuple(each.kept for each in factors),
        fresh=tuple(each.fresh for each in factors),
        ceilings=torch.tensor([_ceiling(each) for each in factors], dtype=torch.float64),
    )
    return Move(torch.tensor([c for c, _ in parts.values()], dtype=torch.float64), sheet)


def _ceiling(factors: Factors) -> float:
    if factors.ceiling is not None:
        return factors.ceiling
    largest = float(factors.changing.abs().max()) if factors.changing.numel() else 0.0
    return ceiling_of(largest) if largest else 0.0


@dataclass(frozen=True)
class Piece:
    """A sum of multiples of sheets that have their kept factors in common."""

    sheet: Sheet  # its values hold the sum, its ceilings bound them
    bounds: Tensor  # (k,) fp64, sum of |c| * ceiling
    units: Tensor  # (k,) fp64, powers of two: the numbers of the sum are multiples of them
    foreign: bool = False  # the kept factors come from a file: a method's numbers, but not its tensors


class Pending:
    """Sums of low-rank steps."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._made: Combination | None = None

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def names(self) -> list[str]:
        """The tensors that have something pending."""
        return list(dict.fromkeys(name for piece in self._pieces for name in piece.sheet.names))

    def direction(self) -> Combination:
        """All that is pending, as a displacement from the stored weights: one term, if no tensor has two pieces."""
        if self._made is None:
            layers: list[list[Sheet]] = []
            for piece in self._pieces:
                names = set(piece.sheet.names)
                fit = (layer for layer in layers if all(names.isdisjoint(sheet.names) for sheet in layer))
                layer = next(fit, None)
                if layer is None:
                    layers.append(layer := [])
                layer.append(piece.sheet)
            self._made = Combination(tuple((1.0, LowRank.on(layer)) for layer in layers))
        return self._made

    def displaced(self, points: Sequence[Direction], sites: Sequence[Site]) -> list[Direction]:
        """The points, which are displacements from the weights that count, as displacements from the stored weights."""
        if not self._pieces:
            return list(points)
        if any(piece.foreign for piece in self._pieces):
            self._adopt(points, sites)
        return [self.direction() + point for point in points]

    def fits(self, moves: Iterable[Move]) -> bool:
        """Whether moves share their kept factors with what is pending on their tensors, where there is something."""
        taken = {name for piece in self._pieces for name in piece.sheet.names} if self._pieces else set()
        return all(self._find(move.sheet) is not None or taken.isdisjoint(move.sheet.names) for move in moves)

    def absorb(self, moves: Iterable[Move]) -> None:
        """Add moves. Those that do not fit lie beside the others, which costs every query: fold first."""
        for move in moves:
            if bool((move.coefficients != 0).any()):
                place = self._find(move.sheet)
                if place is None:
                    self._pieces.append(_added(move, None))
                else:
                    self._pieces[place] = _added(move, self._pieces[place])
                self._made = None

    def is_full(self) -> bool:
        """Whether a tensor has several pieces with more columns than are worth carrying about."""
        columns: Counter[str] = Counter()
        for piece in self._pieces:
            columns.update({n: min(shape) for n, shape in zip(piece.sheet.names, piece.sheet.shapes, strict=True)})
        return len(self.direction().terms) > 1 and max(columns.values()) > MAX_COLUMNS

    def write(self, weights: Weights) -> None:
        """Add what is pending to the stored weights. It stays pending: see `clear`."""
        direction = self.direction()
        for name in self.names:
            weights.update(weights.slots[name], lambda values, part: direction.add_to(values, part))

    def clear(self) -> None:
        """Nothing is pending any more."""
        self._pieces, self._made = [], None

    # ------------------------------------------------------------------------------------------------------------------

    def _find(self, sheet: Sheet) -> int | None:
        """Which piece has the names and kept factors of a sheet: the same tensors, or tensors with the same numbers."""
        alike = [k for k, piece in enumerate(self._pieces) if piece.sheet.laid_out_as(sheet)]
        for equal in (lambda a, b: a is b, torch.equal):
            for k in alike:
                if all(equal(a, b) for a, b in zip(self._pieces[k].sheet.kept, sheet.kept, strict=True)):
                    return k
        return None

    def _adopt(self, points: Sequence[Direction], sites: Sequence[Site]) -> None:
        """Take a method's tensors for kept ones of equal numbers, so that engines see what they have in common."""
        own: dict[str, list[Tensor]] = {}
        for point in points:
            for move in moves_of(point, sites)[0]:
                for name, kept in zip(move.sheet.names, move.sheet.kept, strict=True):
                    own.setdefault(name, []).append(kept)
        for number, piece in enumerate(self._pieces):
            if piece.foreign:
                pairs = list(zip(piece.sheet.names, piece.sheet.kept, strict=True))
                found = [next((new for new in own.get(name, ()) if torch.equal(new, old)), None) for name, old in pairs]
                sides = tuple(old if new is None else new for (_, old), new in zip(pairs, found, strict=True))
                sheet = replace(piece.sheet, kept=sides)
                self._pieces[number] = replace(piece, sheet=sheet, foreign=any(new is None for new in found))
        self._made = None

    # ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """Tensors, numbers and strings."""
        return [
            {"bounds": piece.bounds, **{key: _plain(getattr(piece.sheet, key)) for key in _SAVED}}
            for piece in self._pieces
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up what `state_dict` returned."""
        self.clear()
        for saved in state:
            bounds = saved["bounds"].detach().clone()
            sheet = Sheet(**{key: _copied(saved[key]) for key in _SAVED}, ceilings=_above(bounds))
            self._pieces.append(Piece(sheet, bounds, _units(bounds, sheet), foreign=True))


_SAVED = ("names", "values", "sizes", "shapes", "turned", "kept", "fresh")


def _plain(value: Any) -> Any:
    """Tuples as lists, which every way of saving keeps."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _copied(value: Any) -> Any:
    """The same with tuples for lists, and tensors of its own."""
    if isinstance(value, list | tuple):
        return tuple(_copied(item) for item in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def _added(move: Move, before: Piece | None) -> Piece:
    """A move beside what was there: elementwise in fp32, the same on every machine."""
    sheet = move.sheet
    c = torch.where(sheet.ceilings >= SMALLEST, move.coefficients, 0.0)
    bounds = c.abs() * sheet.ceilings + (0.0 if before is None else before.bounds)
    units = _units(bounds, sheet)
    total = _rounded(sheet.values, c, units, sheet)
    if before is not None:
        old = before.sheet.values
        if not torch.equal(units, before.units):
            old = _rounded(old, torch.ones_like(c), units, sheet)
        total = total.add_(old)
    return Piece(replace(sheet, values=total, ceilings=_above(bounds), single=False), bounds, units)


def _rounded(values: Tensor, scales: Tensor, units: Tensor, sheet: Sheet) -> Tensor:
    """values * scale as multiples of the unit, a scale and a unit for each matrix."""
    alike = len(set(sheet.sizes)) == 1
    made = (values.view(len(sheet.sizes), -1) if alike else values) * _spread(scales / units, sheet, alike)
    return made.round_().mul_(_spread(units, sheet, alike)).view(-1)


def _spread(each: Tensor, sheet: Sheet, alike: bool) -> Tensor:
    """A number for each matrix as fp32 numbers that go with `values`, which has a row for each if sizes are alike."""
    if alike:
        return each.float()[:, None]
    if bool((each == each[0]).all()):
        return each[0].float()
    return torch.repeat_interleave(each.float(), torch.tensor(sheet.sizes), output_size=sheet.values.numel())


def _above(bounds: Tensor) -> Tensor:
    """(k,) powers of two above positive numbers; SMALLEST above 0."""
    powers = torch.ldexp(torch.ones_like(bounds), torch.frexp(bounds).exponent)
    return torch.where(bounds > 0, powers, SMALLEST).clamp(min=SMALLEST)


def _units(bounds: Tensor, sheet: Sheet) -> Tensor:
    """The grids of sums that do not exceed the bounds: one bit of a factor's is left for the summands' own rounding."""
    bits = torch.tensor([1.0 - grid_bits(kept.shape[1]) for kept in sheet.kept], dtype=torch.float64)
    return _above(bounds) * torch.exp2(bits)
