"""`kernels.prepared` for the compiled kernels: what they are told is packed once, and a call packs its terms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.kernels.contract import Term, written
from zotune.kernels.native_packing import (
    BF16,
    BF16_CARRIED,
    BF16_SPLIT,
    EXACT,
    JOB,
    OUT,
    ROOM,
    check,
    room_for,
    takes,
    threads_for,
)
from zotune.kernels.prepared import Prepared, Signs


class NativePrepared(Prepared):
    """fp32, fp64 and bf16."""

    def __init__(self, backend: Any, stored: Tensor, carried: Tensor | None, site: int, outs: Sequence[Tensor]) -> None:
        super().__init__(backend, stored, carried, site, outs)
        self._count = stored.numel()
        for tensor in (stored, *outs):
            check(tensor, stored.dtype, self._count)
        if carried is not None:
            check(carried, torch.int16, self._count)
        low = 0 if carried is None else carried.data_ptr()
        self._where = (self._address, low, 0, site, 0, self._count, 0)
        self._kind = EXACT.get(stored.dtype, BF16 if carried is None else BF16_CARRIED)
        self._updates = EXACT.get(stored.dtype, BF16_SPLIT)
        self._outs = [[OUT.pack(out.data_ptr(), minus) for minus in (False, True)] for out in outs]
        self._changed = [stored] if carried is None else [stored, carried]

    def __call__(self, terms: Sequence[Term], signs: Signs, update: Sequence[Term] = ()) -> None:
        """See `Prepared.__call__`."""
        if not self._count or not takes(terms, *([update] if update else [])):
            super().__call__(terms, signs, update)
            return
        backend, count, own = self.backend, len(terms), len(update)
        room = room_for(count + own)
        outs = b"".join([self._outs[k][sign < 0] for k, sign in signs])
        query = self._job(room + own * ROOM, self._kind, count, len(signs), backend.packed.of(terms), outs)
        threads = threads_for(self._count * (count + own))
        if update:
            before = self._job(room, self._updates, own, 1, backend.packed.of(update), OUT.pack(self._address, 0))
            backend.update_and_run(before, query, threads)
            written(self._changed)
        else:
            backend.run(query, threads)
        written([self.outs[k] for k, _ in signs])

    def _job(self, room: int, kind: int, terms: int, outs: int, packed: bytes, places: bytes) -> bytes:
        address, *rest = self._where
        return JOB.pack(room, address, *rest, kind, terms, outs, 0, 0, 0, 0) + packed + places
