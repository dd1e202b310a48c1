"""Weights at another point while gradients are taken, and their own bits again afterwards, without a second copy.

A sum cannot be undone by a difference: fl(fl(w + d) - d) is not always w. It nearly is: where w + d stays in w's binade
and |d| is small beside |w|, the rounding error of the sum is less than half a unit in the last place of w, and the
difference rounds back to w. So the displacement, which is a recipe, is taken off again, and only the numbers for which that
fails are kept, with their places. For normal noise of scale d on weights of scale s that is a share of about d / s; tensors
for which it is more than half are kept whole. 16-bit tensors, whose small displacements round away, are handled alike: what
changed is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core.direction import Direction
from zotune.core.noise import CHUNK
from zotune.core.site import Site
from zotune.core.weights import LOW_PRECISION, Slot, Weights

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Displacement:
    """What is kept while weights stand elsewhere."""

    point: Direction
    pieces: list["_Piece"] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass
class _Piece:
    slot: Slot
    part: Site
    where: Tensor | None  # (k,) int32 places in the part; None: `values` are all of it
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.where is None else self.where.nbytes)


@contextmanager
def displaced(weights: Weights, point: Direction) -> Iterator[Displacement]:
    """The stored tensors hold round(value + point) inside the block, and their own bits after it.

    Args:
        weights: the trained tensors.
        point: a displacement; must not depend on the weights.
    """
    kept = Displacement(point)
    try:
        for slot in weights:
            if point.touches(slot.site):
                for part in _parts(slot):
                    kept.pieces.append(_move(slot, part, point))
        yield kept
    finally:
        for piece in kept.pieces:
            _restore(piece, point)


def _parts(slot: Slot) -> Iterator[Site]:
    if slot.tensor.is_contiguous():
        yield from (part for _, part in slot.site.chunks(CHUNK))
    else:
        yield slot.site


@torch.no_grad()
def _move(slot: Slot, part: Site, point: Direction) -> _Piece:
    """Write the perturbed values of a part; return what it takes to undo that."""
    stored = slot.stored(part)
    before = stored.clone()
    if slot.tensor.dtype in LOW_PRECISION:
        values = slot.storage.read(slot, part)
        values.add_(_step(values, part, point))
        stored.copy_(values)
        back = stored
    else:
        step = _step(stored, part, point)
        stored.add_(step)
        back = stored - step
    wrong = _bits(back) != _bits(before)
    if int(wrong.sum()) * (before.element_size() + 4) > before.nbytes:
        return _Piece(slot, part, None, before)
    where = wrong.nonzero()[:, 0].to(torch.int32)
    return _Piece(slot, part, where, before.reshape(-1)[where])


@torch.no_grad()
def _restore(piece: _Piece, point: Direction) -> None:
    stored = piece.slot.stored(piece.part)
    if piece.where is None:
        stored.copy_(piece.values)
        return
    if stored.dtype not in LOW_PRECISION:
        stored.sub_(_step(stored, piece.part, point))
    if stored.is_contiguous():
        stored.view(-1)[piece.where] = piece.values
    else:
        whole = stored.reshape(-1)
        whole[piece.where] = piece.values
        stored.copy_(whole.view(stored.shape))


def _step(like: Tensor, part: Site, point: Direction) -> Tensor:
    """The displacement of a part: the same bits each time, which is what makes this exact."""
    made = torch.zeros(part.numel, dtype=like.dtype, device=like.device)
    point.add_to(made, part)
    return made.view(like.shape)


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(_BITS[values.element_size()])
