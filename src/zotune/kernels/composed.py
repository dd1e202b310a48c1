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

CHUNK = 1 << 18  # elements worked on at once: one megabyte of fp32; smaller chunks cost more in calls than in cache
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
        if stored.dtype in JOIN:
            self._perturb_halves(outs, stored, carried, run, terms)
            return
        sums = self.sums(stored, run, terms)
        for offset, count, (held, *sides) in chunks(run, stored, *(out for out, _ in outs)):
            total = sums(offset, count)
            for side, (_, sign) in zip(sides, outs, strict=True):
                SIGNED[sign > 0](held, total, out=side)

    def _perturb_halves(
        self,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        buffer = _values(stored, run)
        sums = self.sums(buffer, run, terms)
        moved = buffer if len(outs) == 1 else workspace("moved", buffer.numel(), buffer.dtype, buffer.device)
        low_bits = () if carried is None else (carried,)
        for offset, count, (held, *rest) in chunks(run, stored, *(out for out, _ in outs), *low_bits):
            values = widened(held, rest[len(outs)] if low_bits else None, buffer)
            total = sums(offset, count)
            for side, (_, sign) in zip(rest, outs, strict=False):
                side.copy_(SIGNED[sign > 0](values, total, out=moved[:count]))

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.update`."""
        if stored.dtype not in SPLIT:
            self.add(stored, run, terms)
            return
        if carried is None:
            raise TypeError(f"An update of a {stored.dtype} tensor needs the tensor of carried bits beside it.")
        buffer = _values(stored, run)
        sums = self.sums(buffer, run, terms)
        for offset, count, (held, low) in chunks(run, stored, carried):
            values = widened(held, low, buffer).add_(sums(offset, count))
            SPLIT[held.dtype](values, held, low)

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


def _values(stored: Tensor, run: Run) -> Tensor:
    """A buffer for the fp32 values of a chunk."""
    count = stored.numel() if run.rows is not None else min(CHUNK, stored.numel())
    return workspace("widened", count, torch.float32, stored.device)


def widened(held: Tensor, low: Tensor | None, buffer: Tensor | None = None) -> Tensor:
    """fp32 values of bf16 or fp16 numbers and their carried bits, in a buffer."""
    if buffer is None:
        buffer = workspace("widened", held.numel(), torch.float32, held.device)
    values = buffer[: held.numel()].copy_(held)
    if low is not None:
        JOIN[held.dtype](values, held, low)
    return values
