"""`perturb` and `update` put together from sums of noise and torch's own operations, a chunk at a time.

What the pure-torch back end does, and the compiled one for dtypes that it has no kernel for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zotune.kernels.contract import Addition, Run, Term
from zotune.kernels.halves import JOIN, SPLIT
from zotune.kernels.unfused import Unfused
from zotune.kernels.workspace import workspace

CHUNK = 1 << 19  # elements worked on at once: two megabytes of fp32; smaller chunks cost more in calls than in cache
SIGNED: dict[bool, Callable[..., Tensor]] = {True: torch.add, False: torch.sub}
# The sum of the terms on elements offset ... offset + count - 1 of a run, in a buffer: valid until the next call.
Sums = Callable[[int, int], Tensor]


class Composed(Unfused, ABC):
    """A back end that makes sums of noise. See `kernels.contract.Backend`."""

    @abstractmethod
    def sums(self, like: Tensor, run: Run, terms: Sequence[Term]) -> Sums:
        """What makes the terms on parts of a run, in the precision and on the device of `like`."""

    def add(self, out: Tensor, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.add`."""
        sums = self.sums(out, run, terms)
        for offset, count, (piece, *_) in chunks(run, out):
            piece.add_(sums(offset, count))

    def perturb(
        self,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        """See `Backend.perturb`."""
        halves, sums = stored.dtype in JOIN, self.sums(_wide(stored), run, terms)
        low_bits = () if carried is None else (carried,)
        for offset, count, (held, *rest) in chunks(run, stored, *(out for out, _ in outs), *low_bits):
            values = widened(held, rest[len(outs)] if low_bits else None) if halves else held
            _displace(rest, outs, values, sums(offset, count))

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.update`."""
        if stored.dtype not in SPLIT:
            self.add(stored, run, terms)
            return
        sums = self.sums(_wide(stored), run, terms)
        for offset, count, (held, low) in chunks(run, stored, _needed(carried)):
            SPLIT[held.dtype](widened(held, low).add_(sums(offset, count)), held, low)

    def update_many(self, additions: Sequence[Addition]) -> None:
        """See `Backend.update_many`."""
        for addition in additions:
            addition.apply(self.update)


def chunks(run: Run, *tensors: Tensor) -> Iterator[tuple[int, int, Sequence[Tensor]]]:
    """(offset, count, parts of the tensors) of a run, a chunk at a time; chosen rows come whole."""
    total = tensors[0].numel()
    if run.rows is not None or total <= CHUNK:
        yield 0, total, tensors
        return
    for offset in range(0, total, CHUNK):
        count = min(CHUNK, total - offset)
        yield offset, count, [tensor[offset : offset + count] for tensor in tensors]


def _wide(stored: Tensor) -> Tensor:
    """Like what the values of a tensor are worked on in."""
    return stored.new_empty(0, dtype=torch.float32) if stored.dtype in JOIN else stored


def _needed(carried: Tensor | None) -> Tensor:
    if carried is None:
        raise TypeError("An update of a bf16 or fp16 tensor needs the tensor of carried bits beside it.")
    return carried


def widened(held: Tensor, low: Tensor | None) -> Tensor:
    """fp32 values of bf16 or fp16 numbers and their carried bits, in a buffer."""
    values = workspace("widened", held.numel(), torch.float32, held.device).copy_(held)
    if low is not None:
        JOIN[held.dtype](values, held, low)
    return values


def _displace(sides: Sequence[Tensor], outs: Sequence[tuple[Tensor, float]], values: Tensor, total: Tensor) -> None:
    """side = round(values + sign * total) for each of the outs."""
    for side, (_, sign) in zip(sides, outs, strict=False):  # carried bits may follow the sides
        if side.dtype == values.dtype:
            SIGNED[sign > 0](values, total, out=side)
        else:
            moved = workspace("moved", side.numel(), values.dtype, values.device)
            side.copy_(SIGNED[sign > 0](values, total, out=moved))
