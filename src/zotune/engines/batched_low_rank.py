"""Low-rank points on activations: y += s (x right) left.T instead of a perturbed copy of the matrix.

The product with the stored matrix is shared by all copies. Per copy only thin products remain, and those are done for all
copies together: x times the distinct right factors side by side, each column times the coefficient that its copy has for
it, times the left factors below each other. Points that are sums (an update that waits to be folded in, and a new
direction) only make the thin products a little wider; leaves that share a right factor share its columns.

Factors are rounded to the precision of the activations. In bf16 a point is so evaluated to 8 bits of each factor, and at
the stored weights: the carried low-order bits (less than half a unit of the weight) are left out of the shared product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction, Scalar
from zotune.core.factors import Factors
from zotune.core.low_rank import LowRank
from zotune.core.site import Site


@dataclass
class Thin:
    """Points on one matrix as low-rank terms."""

    inputs: list[Tensor]  # (in, r) distinct factors that meet the activations
    outputs: list[Tensor]  # (out, r) of each term
    which: list[int] | None  # the number in `inputs` of each term; None: each its own, in order
    scales: list[list[Scalar]]  # [term][point]

    @property
    def columns(self) -> int:
        """Width of the second product."""
        return sum(factor.shape[1] for factor in self.outputs)


class Points:
    """The points of a wave, with what their low-rank parts have in common worked out once for all matrices."""

    def __init__(self, points: Sequence[Direction]) -> None:
        self.points = points
        self.rest: list[Direction] = []  # terms of the points that are not low-rank directions
        by_leaf: dict[int, tuple[LowRank, list[Scalar]]] = {}
        for number, point in enumerate(points):
            for coefficient, term in point.terms if isinstance(point, Combination) else ((1.0, point),):
                if isinstance(term, LowRank):
                    scales = by_leaf.setdefault(id(term), (term, [0.0] * len(points)))[1]
                    scales[number] = scales[number] + coefficient
                else:
                    self.rest.append(term)
        self.leaves = list(by_leaf.values())

    def on(self, site: Site) -> list[tuple[Factors, list[Scalar]]] | None:
        """What the points are made of on a site, with a scale for each point; None if that is not low-rank matrices."""
        if any(term.touches(site) for term in self.rest):
            return self._asked(site)
        found = [(leaf.factors.get(site.name), scales) for leaf, scales in self.leaves if leaf.touches(site)]
        if any(factors is None for factors, _ in found):
            return self._asked(site)
        return [(factors, scales) for factors, scales in found if factors is not None]

    def _asked(self, site: Site) -> list[tuple[Factors, list[Scalar]]] | None:
        """The same, asking each point for its leaves."""
        terms: dict[tuple[int, int], tuple[Factors, list[Scalar]]] = {}
        for number, point in enumerate(self.points):
            leaves = point.leaves(site)
            if leaves is None:
                return None
            for scale, leaf in leaves:
                factors = leaf.factors.get(site.name) if isinstance(leaf, LowRank) else None
                if factors is None:
                    return None
                key = (id(factors.left), id(factors.right))
                scales = terms.setdefault(key, (factors, [0.0] * len(self.points)))[1]
                scales[number] = scales[number] + scale
        return list(terms.values())


def thin_terms(points: Points, site: Site, transposed: bool) -> Thin | None:
    """The points on a matrix as low-rank terms, or None if one of them is something else.

    Args:
        points: displacements.
        site: the whole of an (out, in) matrix.
        transposed: the matrix is stored as (in, out).
    """
    terms = points.on(site)
    if terms is None or any((f.left.shape[0], f.right.shape[0]) != site.shape for f, _ in terms):
        return None
    inputs: list[Tensor] = []
    which: list[int] = []
    outputs: list[Tensor] = []
    for factors, _ in terms:
        into, out = (factors.left, factors.right) if transposed else (factors.right, factors.left)
        place = next((k for k, known in enumerate(inputs) if known is into), len(inputs))
        if place == len(inputs):
            inputs.append(into)
        which.append(place)
        outputs.append(out)
    in_order = which == list(range(len(inputs)))
    return Thin(inputs, outputs, None if in_order else which, [scales for _, scales in terms])


class ThinProducts:
    """Low-rank terms of one linear layer, made ready for a forward of C copies; factors that stay are kept."""

    def __init__(self) -> None:
        self.into = self.out = self._columns = NOTHING  # (in, K'), (K, out), (C, 1, K)
        self._which: list[slice] | None = None  # the columns of `into` that each term takes
        self._repeated = 1  # terms that all take the same ones
        self._kept: list[Tensor] = []

    def ready(self, thin: Thin, first: int, last: int, like: Tensor, known: dict[Any, Tensor]) -> None:
        """Before a forward.

        Args:
            thin: terms with scales for all points of a wave.
            first: the copies are the points first ... last - 1.
            last: see `first`.
            like: a tensor of the activations' dtype and device.
            known: scales as tensors, by their values: the same for many matrices.
        """
        if not same_objects(self._kept, thin.inputs) or self.into.dtype != like.dtype:
            self._kept, self.into = thin.inputs, _side_by_side(thin.inputs, like)
        self.out = _side_by_side(thin.outputs, like).t()
        self._repeated = len(thin.outputs) if len(thin.inputs) == 1 else 1
        many = thin.which is not None and self._repeated == 1
        self._which = [_block(thin.inputs, place) for place in thin.which or ()] if many else None
        self._columns = _columns(thin, first, last, like, known)

    def done(self) -> None:
        """After a forward: only factors that may stay are kept."""
        self.out = self._columns = NOTHING

    def add(self, out: Tensor, x: Tensor, inner: Tensor | None = None) -> None:
        """out += sum over terms of scale * (x @ input) @ output.T, with each copy's scales.

        Args:
            out: (C * n, m), changed in place.
            x: (C * n, in), contiguous.
            inner: x @ into, if that is known.
        """
        if inner is None:
            inner = torch.mm(cast_as(x, out), cast_as(self.into, out))
        if self._which is not None:
            inner = torch.cat([inner[:, block] for block in self._which], 1)
        copies, terms, width = self._columns.shape[0], self._repeated, inner.shape[1]
        scaled = torch.empty((copies, inner.shape[0] // copies, terms, width), dtype=inner.dtype, device=inner.device)
        torch.mul(inner.view(copies, -1, 1, width), self._columns.view(copies, 1, terms, width), out=scaled)
        out.addmm_(scaled.view(-1, terms * width), cast_as(self.out, out))

    def factors(self, copies: range, like: Tensor) -> tuple[Tensor, Tensor]:
        """(in, K) and (C, K, out) whose products are the terms of some copies, in the dtype of `like`."""
        into = self.into
        if self._which is not None:
            into = torch.cat([into[:, block] for block in self._which], 1)
        elif self._repeated > 1:
            into = into.repeat(1, self._repeated)
        scales = self._columns[copies.start : copies.stop].transpose(1, 2)  # (C, K, 1)
        return into.to(like), (scales * self.out.unsqueeze(0)).to(like)


NOTHING = torch.empty(0)


def cast_as(values: Tensor, like: Tensor) -> Tensor:
    """Under autocast activations have another dtype than weights."""
    return values if values.dtype == like.dtype else values.to(like.dtype)


def _side_by_side(factors: list[Tensor], like: Tensor) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(factors, 1)).to(like)


def same_objects(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same tensors."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _block(factors: list[Tensor], place: int) -> slice:
    first = sum(factor.shape[1] for factor in factors[:place])
    return slice(first, first + factors[place].shape[1])


def _columns(thin: Thin, first: int, last: int, like: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """(C, 1, columns), fp32 or fp64: the scale of each column in each copy. Scales on a GPU are never read on the host."""
    dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
    widths = tuple(factor.shape[1] for factor in thin.outputs)
    scales = [tuple(term[first:last]) for term in thin.scales]
    if any(isinstance(scale, Tensor) for term in scales for scale in term):
        made = [torch.stack([torch.as_tensor(s, dtype=dtype, device=device) for s in term]) for term in scales]
        return torch.cat(
            [one[:, None].expand(-1, width) for one, width in zip(made, widths, strict=True)], 1
        ).unsqueeze(1)
    key = (tuple(scales), widths, dtype, device)
    if key not in known:
        rows = [
            [s for term, width in zip(scales, widths, strict=True) for s in [term[c]] * width]
            for c in range(last - first)
        ]
        known[key] = torch.tensor(rows, dtype=dtype, device=device).unsqueeze(1)
    return known[key]
