"""Directions: vectors over all sites that are replayed, never stored.

A direction is a recipe. It can be added to any tensor, slice or row choice, in any order, as often as needed, and is the
same each time. Directions form a vector space: ``eps * z``, ``mu + sigma * u``, ``z1 - z2`` are directions. A gradient
estimate is one too, which is why it needs no memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from zotune.core.noise import CHUNK, TABLE_KINDS, Stream, add_noise, run_of
from zotune.core.site import Site
from zotune.kernels.contract import Term
from zotune.kernels.dispatch import backend_for

Scalar = float | Tensor  # a Python number, or a 0-d tensor
Leaves = tuple[tuple[Scalar, "Direction"], ...]  # a flat sum: (coefficient, what cannot be taken apart further)


class Direction(ABC):
    """A vector over all sites."""

    @abstractmethod
    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """out += scale * self[site].

        Args:
            out: fp32 or fp64, with as many elements as `site` means; changed in place.
            site: whole tensor, run of elements, or choice of rows.
            scale: a number or a 0-d tensor.
        """

    def touches(self, site: Site) -> bool:
        """False if this direction is zero on the site, so that engines may leave it alone."""
        return True

    @property
    def uniform(self) -> bool:
        """Whether `leaves` says the same of every site, so that it need be asked once for all tensors."""
        return False

    def leaves(self, site: Site, scale: Scalar = 1.0) -> Leaves | None:
        """The direction on one site as a flat sum, for engines and kernels that do more than add it.

        `add_to` is the same as: each leaf times its coefficient is rounded; if there are several they are summed in this
        order, starting from -0.0; and the sum is added.

        Returns:
            (coefficient, leaf) in the order of summation, () where it is zero; None if it is a sum of sums.
        """
        return ((scale, self),) if self.touches(site) else ()

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """What the kernels add in one pass instead of `scale` times this leaf, the same bits; None if they cannot."""
        return None

    def realise(self, site: Site, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The direction on one site as a tensor, shaped like the part of the site that is meant."""
        out = torch.zeros(site.numel, dtype=dtype, device=device)
        self.add_to(out, site)
        whole = site.rows is None and site.count == Site(site.name, site.shape).count
        return out.view(site.shape) if whole else out

    def __mul__(self, factor: Scalar) -> "Combination":
        return Combination(((factor, self),))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "Combination":
        return self * (1.0 / divisor)

    def __neg__(self) -> "Combination":
        return self * -1.0

    def __pos__(self) -> "Direction":
        return self

    def __add__(self, other: "Direction") -> "Combination":
        return Combination(((1.0, self),)) + other

    def __sub__(self, other: "Direction") -> "Combination":
        return self + (-other)


@dataclass(frozen=True, eq=False)
class Noise(Direction):
    """Random numbers of one stream: independent, zero mean, unit variance."""

    source: Stream
    kind: str = "normal"

    @property
    def uniform(self) -> bool:
        """See `Direction.uniform`."""
        return True

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        add_noise(out, site, self.source, self.kind, scale)

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """See `Direction.term`."""
        return Term(self.source.key, self.kind, scale) if self.kind in TABLE_KINDS else None


@dataclass(frozen=True, eq=False)
class Scaled(Direction):
    """A direction with one factor per site: per-group eps, learned scales, blocks (factor 0 outside)."""

    inner: Direction
    factors: Mapping[str, Scalar]
    otherwise: Scalar = 1.0

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        if self.touches(site):
            self.inner.add_to(out, site, scale * self.factors.get(site.name, self.otherwise))

    def leaves(self, site: Site, scale: Scalar = 1.0) -> Leaves | None:
        """See `Direction.leaves`."""
        if not self.touches(site):
            return ()
        return self.inner.leaves(site, scale * self.factors.get(site.name, self.otherwise))

    def touches(self, site: Site) -> bool:
        """False where the factor is the number 0."""
        factor = self.factors.get(site.name, self.otherwise)
        return (isinstance(factor, Tensor) or factor != 0.0) and self.inner.touches(site)


@dataclass(frozen=True, eq=False)
class Stored(Direction):
    """A direction that does live in memory: one tensor per site, for methods that learn one."""

    tensors: Mapping[str, Tensor]

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        whole = self.tensors[site.name]
        values = whole.reshape(-1)[site.start : site.start + site.count] if site.rows is None else whole[site.rows]
        out.add_((values.to(out.dtype) * scale).view(out.shape))

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """See `Direction.term`."""
        return given(self.tensors[site.name], site, scale)

    def touches(self, site: Site) -> bool:
        """False for sites that have no tensor."""
        return site.name in self.tensors


@dataclass(frozen=True, eq=False)
class Combination(Direction):
    """sum of coefficient * direction. The empty one is zero: as a point it means the current weights."""

    terms: tuple[tuple[Scalar, Direction], ...] = field(default=())

    @cached_property
    def uniform(self) -> bool:
        """See `Direction.uniform`."""
        return all(inner.uniform for _, inner in self.terms)

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`. Several terms are summed in a small buffer first, so `out` is rounded once."""
        terms = [(scale * coefficient, inner) for coefficient, inner in self.terms if inner.touches(site)]
        if len(terms) == 1:
            terms[0][1].add_to(out, site, terms[0][0])
        elif terms and out.is_contiguous() and (table := kernel_terms(self, site, out.device, scale)):
            backend_for(out.device).add(out.view(-1), run_of(site, out.device), table)
        elif terms and (site.rows is not None or not out.is_contiguous()):
            out.add_(_sum(terms, site, out).view(out.shape))
        elif terms:
            flat = out.view(-1)
            for offset, part in site.chunks(CHUNK):
                flat[offset : offset + part.count].add_(_sum(terms, part, flat))

    def leaves(self, site: Site, scale: Scalar = 1.0) -> Leaves | None:
        """See `Direction.leaves`."""
        parts = [inner.leaves(site, scale * coefficient) for coefficient, inner in self.terms if inner.touches(site)]
        if len(parts) == 1:
            return parts[0]
        flat: list[tuple[Scalar, Direction]] = []
        for part in parts:
            if part is None or len(part) != 1:
                return None  # an inner sum is rounded before the outer one
            flat.append(part[0])
        return tuple(flat)

    def touches(self, site: Site) -> bool:
        """True if any term touches the site."""
        return any(inner.touches(site) for _, inner in self.terms)

    def __mul__(self, factor: Scalar) -> "Combination":
        return Combination(tuple((factor * coefficient, inner) for coefficient, inner in self.terms))

    __rmul__ = __mul__

    def __add__(self, other: Direction) -> "Combination":
        right = other.terms if isinstance(other, Combination) else ((1.0, other),)
        return Combination(self.terms + right)

    def __bool__(self) -> bool:
        return bool(self.terms)


HERE = Combination()  # the point that means the current weights


def kernel_terms(
    direction: Direction, site: Site, device: torch.device, scale: Scalar = 1.0
) -> tuple[Term, ...] | None:
    """The direction on a site as the device's kernels add it in one pass; None unless it is a flat sum of what they take.

    Adding these terms is the same as `direction.add_to(out, site, scale)`, bit for bit; () where it is zero.
    """
    if not (isinstance(direction, Combination) and direction.uniform and isinstance(scale, float) and scale == 1.0):
        return _as_terms(direction.leaves(site, scale), site, device)
    kept: dict[str, tuple[Term, ...] | None] = vars(direction)  # where its cached properties are, too
    if "terms_anywhere" not in kept:  # noise alone, which all kernels take
        kept["terms_anywhere"] = _as_terms(direction.leaves(site), site, device)
    return kept["terms_anywhere"]


def given(tensor: Tensor, site: Site, scale: Scalar) -> Term | None:
    """`scale` times the numbers of a tensor that lie as those of the whole site; None if they lie otherwise."""
    whole = tensor.numel() == prod(site.shape) and tensor.is_contiguous() and not tensor.requires_grad
    return Term.given(tensor.view(-1), scale) if whole else None


def _as_terms(leaves: Leaves | None, site: Site, device: torch.device) -> tuple[Term, ...] | None:
    if leaves is None:
        return None
    terms = []
    for coefficient, leaf in leaves:
        if (term := leaf.term(site, coefficient)) is None:
            return None
        terms.append(term)
    return tuple(terms) if backend_for(device).takes(terms) else None


def _sum(terms: list[tuple[Scalar, Direction]], site: Site, like: Tensor) -> Tensor:
    total = torch.full((site.numel,), -0.0, dtype=like.dtype, device=like.device)  # where nothing is added, -0.0 stays
    for coefficient, inner in terms:
        inner.add_to(total, site, coefficient)
    return total
