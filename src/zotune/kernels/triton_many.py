"""One launch for the update of many tensors: a model has hundreds, and a launch costs as much as a small tensor's update.

Tensors of one dtype go into one launch. The addresses lie in a table on the device that is made once and used as long as the
tensors stay where they are. Tensors whose address or number of elements is no multiple of 16 take launches of their own.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.kernels.contract import Addition, Term, written
from zotune.kernels.triton_jit import TILE, update_many
from zotune.kernels.triton_noise import KINDS, OPTIONS, TritonBackend, book_of, numbers, on, signed

KEPT = 16  # tables of addresses that are kept


class ManyUpdates:
    """`Backend.update` of many tensors at once, the same bits."""

    def __init__(self, backend: TritonBackend) -> None:
        self.backend = backend
        self.launches = 0  # of the last call
        self._places: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def update(self, additions: Sequence[Addition]) -> None:
        """value += sum of terms of each addition, kept as `Backend.update` keeps it."""
        self.launches = 0
        groups: dict[tuple[Any, ...], list[Addition]] = {}
        for addition in additions:
            if _fits(addition):
                kind = (addition.stored.device, addition.stored.dtype, len(addition.terms), book_of(addition.terms))
                groups.setdefault(kind, []).append(addition)
            elif addition.stored.numel() and addition.terms:
                addition.apply(self.backend.update)
                self.launches += 1
        for (device, dtype, count, book), members in groups.items():
            self._launch(members, device, dtype, count, book)
            self.launches += 1

    def _launch(
        self, additions: list[Addition], device: torch.device, dtype: torch.dtype, count: int, book: int
    ) -> None:
        rows: dict[Any, int] = {}  # by the terms: their first row in the table
        terms: list[Term] = []
        for addition in additions:
            if _key(addition.terms) not in rows:
                rows[_key(addition.terms)] = len(terms)
                terms.extend(addition.terms)
        place, owner = self._place(additions, [rows[_key(addition.terms)] for addition in additions], device)
        kind, _, precision = KINDS[dtype]
        table = self.backend.table(terms, device)
        with on(device):
            update_many[(owner.numel(),)](
                owner, place, table, count, numbers(device),
                BOOK=book, KIND=kind, TILE=TILE, FLOAT=precision, **OPTIONS,
            )  # fmt: skip
        written(
            [tensor for addition in additions for tensor in (addition.stored, addition.carried) if tensor is not None]
        )

    def _place(self, additions: list[Addition], rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Where tensors lie, and which tile belongs to which: (tensors, 6) int64 and (tiles,) int32 on the device."""
        lines = [
            (
                i.stored.data_ptr(),
                (i.stored if i.carried is None else i.carried).data_ptr(),
                i.site,
                i.stored.numel(),
                row,
            )
            for i, row in zip(additions, rows, strict=True)
        ]
        key = (device, *lines)
        if key not in self._places:
            table: list[tuple[int, ...]] = []
            tiles: list[int] = []
            for stored, carried, site, count, row in lines:
                table.append((stored, carried, signed(site), count, sum(tiles), row))
                tiles.append(-(-count // TILE))
            owner = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles))
            made = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
            self._places[key] = (made, owner.to(device, non_blocking=True))
            if len(self._places) > KEPT:
                self._places.popitem(last=False)
        return self._places[key]


class Triton(TritonBackend):
    """Table noise on a CUDA device. See `kernels.contract.Backend`."""

    def __init__(self) -> None:
        super().__init__()
        self.many = ManyUpdates(self)

    def update_many(self, additions: Sequence[Addition]) -> None:
        """See `Backend.update_many`: one launch for each dtype and number of terms."""
        self.many.update(additions)


def _fits(addition: Addition) -> bool:
    tensors = (addition.stored,) if addition.carried is None else (addition.stored, addition.carried)
    size = addition.stored.numel()
    return size > 0 and size % 16 == 0 and bool(addition.terms) and all(t.data_ptr() % 16 == 0 for t in tensors)


def _key(terms: Sequence[Term]) -> tuple[Any, ...]:
    """Equal for terms that read the same: numbers by their bits, tensors by what they are."""
    return tuple((t.key, t.book, id(t.scale) if isinstance(t.scale, Tensor) else float(t.scale).hex()) for t in terms)
