"""Low-rank points that share their kept factors: one fresh factor for each copy, of all matrices in one product.

    y_c += (x_c kept) fresh_c.T        fresh_c = sum over terms of scale_(c, term) * fresh_term

The terms are what waits to be folded in and the new directions; their fresh factors lie one after the other in one tensor
(`core.factors.Sheet`), so that the sums of all matrices cost one product of (copies x terms) with (terms x numbers). A matrix
is then left with one thin product on each side, however many terms there are. `engines.batched_low_rank` does the rest.

The compiled kernels of the CPU keep the sum in fp32 and do both thin products in one call. Elsewhere it is rounded to the
precision of the activations once; in bf16 what waits is so known to 8 bits of the whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.direction import Scalar
from zotune.core.factors import Sheet
from zotune.core.low_rank import LowRank
from zotune.core.site import Site
from zotune.engines.batched_low_rank import NOTHING, Points, cast_as
from zotune.kernels.dispatch import backend_for


@dataclass
class Side:
    """The factors of one matrix."""

    kept: Tensor  # (n, r)
    fresh: str  # "left" or "right": which one is not kept
    rows: int  # of that one


class FreshFactors:
    """The points of a wave on the sheets that they share."""

    def __init__(self, points: Points) -> None:
        self.rest = points.rest
        self.leaves = points.leaves if _alike([leaf for leaf, _ in points.leaves]) else []
        self.sides: dict[str, Side] = {}
        for sheet in self.leaves[0][0].sheets if self.leaves else ():
            rows = [columns if sheet.turned else rows for rows, columns in sheet.shapes]
            self.sides.update(zip(sheet.names, map(Side, sheet.kept, sheet.fresh, rows), strict=True))

    def on(self, site: Site, fresh: str) -> Side | None:
        """The factors of a matrix, if that is all that the points are there and the fresh one is the left or right one."""
        side = self.sides.get(site.name)
        if side is None or side.fresh != fresh or any(term.touches(site) for term in self.rest):
            return None
        shape = (side.rows, side.kept.shape[0]) if fresh == "left" else (side.kept.shape[0], side.rows)
        return side if shape == site.shape else None  # else the matrix is seen in another shape

    def made(self, first: int, last: int, like: Tensor) -> dict[str, Tensor]:
        """(C, r, m) fresh factors for the points first ... last - 1, as products with activations like `like` take them."""
        compiled = backend_for(like.device).adds_low_rank(like.dtype)
        found: dict[str, Tensor] = {}
        for number, sheet in enumerate(self.leaves[0][0].sheets if self.leaves else ()):
            wide = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            sheets = [leaf.sheets[number].values.to(wide) for leaf, _ in self.leaves]
            scales = _table([scales[first:last] for _, scales in self.leaves], wide)
            sums = _summed(scales, sheets).to(wide.dtype if compiled else like.dtype)
            parts = torch.split(sums, list(sheet.sizes), 1)
            for name, part, (rows, columns) in zip(sheet.names, parts, sheet.shapes, strict=True):
                whole = part[:, : rows * columns].view(-1, rows, columns)
                found[name] = whole if sheet.turned else whole.transpose(1, 2)
        return found


class FreshProducts:
    """The thin products of one linear layer: by a kernel where there is one, else by torch."""

    def __init__(self) -> None:
        self.into = self._turned = self._fresh = NOTHING  # (in, r), (r, in), (C, r, out)
        self._kept, self._dtype = NOTHING, NOTHING.dtype

    @property
    def alone(self) -> bool:
        """Whether x @ into is part of the kernel, so that layers with the same input need not share it."""
        return self._turned is not NOTHING

    def ready(self, side: Side, fresh: Tensor, like: Tensor) -> None:
        """Before a forward. `like`: a tensor of the activations' dtype and device."""
        compiled = backend_for(like.device).adds_low_rank(like.dtype)
        if self._kept is not side.kept or self._dtype != like.dtype or compiled != self.alone:
            self._kept, self._dtype = side.kept, like.dtype
            self._turned = side.kept.to(like.device).t().contiguous() if compiled else NOTHING
            self.into = self._turned.t() if compiled else side.kept.to(like)
        self._fresh = fresh

    def done(self) -> None:
        """After a forward: only the factor that may stay is kept."""
        self._fresh = NOTHING

    def add(self, out: Tensor, x: Tensor, inner: Tensor | None = None) -> None:
        """out += (x @ kept) @ fresh of each copy: (C * n, m), changed in place. `inner`: x @ into, if that is known."""
        backend = backend_for(out.device)
        if self.alone and x.dtype == out.dtype and backend.adds_low_rank(out.dtype):
            backend.add_low_rank(out, x.contiguous(), self._turned, self._fresh)
            return
        if inner is None:
            inner = torch.mm(cast_as(x, out), cast_as(self.into, out))
        copies, rank, width = self._fresh.shape
        out.view(copies, -1, width).baddbmm_(inner.reshape(copies, -1, rank), cast_as(self._fresh, out))

    def factors(self, copies: range, like: Tensor) -> tuple[Tensor, Tensor]:
        """(in, r) and (C, r, out) whose products are the terms of some copies, in the dtype of `like`."""
        return self.into.to(like), self._fresh[copies.start : copies.stop].to(like)


def _alike(leaves: list[LowRank]) -> bool:
    """Whether the directions lie on sheets of one layout and share their kept factors."""
    first = leaves[0].sheets if leaves else ()
    return bool(first) and all(
        len(leaf.sheets) == len(first) and all(map(_same, leaf.sheets, first)) for leaf in leaves
    )


def _same(one: Sheet, other: Sheet) -> bool:
    return one.laid_out_as(other) and all(a is b for a, b in zip(one.kept, other.kept, strict=True))


def _summed(scales: Tensor, sheets: list[Tensor]) -> Tensor:
    """(C, terms) @ (terms, n), without the stack of the sheets, which is as large as the sums."""
    first, *rest = sheets
    sums = torch.outer(scales[:, 0], first)
    for number, values in enumerate(rest, start=1):
        sums.addr_(scales[:, number], values)
    return sums


def _table(scales: list[list[Scalar]], like: Tensor) -> Tensor:
    """(C, terms) from scales by [term][copy]; those on a GPU are not read on the host."""
    if any(isinstance(scale, Tensor) for term in scales for scale in term):
        rows = [
            torch.stack([torch.as_tensor(s, dtype=like.dtype, device=like.device) for s in term]) for term in scales
        ]
        return torch.stack(rows, 1)
    return torch.tensor(list(zip(*scales, strict=True)), dtype=like.dtype, device=like.device)
