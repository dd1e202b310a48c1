"""Which rows of a codebook the noise of a run of elements is: drawn by Philox, kept, and drawn ahead.

A step draws each stream for both sides and the update, so what was drawn lately is kept: four bytes for 64 numbers of noise.
And it draws stream after stream for the same tensors in the same order. A call of numpy costs as much as the random words
of a small tensor; so when a run is drawn, those runs that were asked for after it the last time are drawn with it, in the
same calls. That is a guess at what will be asked, and never changes what is answered.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zotune.kernels.codebook import INDEX_BITS, WIDTH
from zotune.kernels.philox import U32, Words, words, words32


@dataclass(frozen=True)
class Table:
    """How a kind of noise reads a Philox block (four 32-bit words): `lanes` row numbers of `bits` bits in each word."""

    book: str
    width: int  # numbers in a row
    lanes: int
    bits: int

    @property
    def rows_per_block(self) -> int:
        """Rows that one block names."""
        return 4 * self.lanes


TABLES = {
    "normal": Table("normal", WIDTH, lanes=2, bits=INDEX_BITS),  # a block is 8 rows of 64: 512 numbers
    "rademacher": Table("rademacher", 8, lanes=4, bits=8),  # a block is 16 rows of 8: 128 signs
}


class Blocks(NamedTuple):
    """Blocks first ... last - 1 of a site."""

    site: int  # 64-bit id
    first: int
    last: int

    @property
    def total(self) -> int:
        """How many."""
        return self.last - self.first


def row_numbers(table: Table, key: Words, site: int, blocks: Tensor) -> Tensor:
    """(b,) block numbers -> (b * rows_per_block,) int32 row numbers."""
    if blocks.device.type == "cpu":
        return _of_words(table, words32(key, site, blocks.numpy().astype(np.uint64)))
    mask = (1 << table.bits) - 1
    drawn, shift = words(key, site, blocks), 32 // table.lanes
    lanes = [((drawn >> (shift * lane)) & mask).to(torch.int32) for lane in range(table.lanes)]
    return torch.stack(lanes, dim=2).view(-1)


def _of_words(table: Table, made: U32) -> Tensor:
    """The words in memory are the lanes, the lowest first."""
    return torch.from_numpy((made.view(f"<u{4 // table.lanes}") & ((1 << table.bits) - 1)).astype(np.int32)).view(-1)


def _together(table: Table, key: Words, runs: Sequence[Blocks]) -> Iterator[Tensor]:
    """The row numbers of each run, drawn in the same calls."""
    counts = [run.total for run in runs]
    blocks = np.concatenate([np.arange(run.first, run.last, dtype=np.uint64) for run in runs])
    sites = np.repeat(np.array([run.site for run in runs], dtype=np.uint64), counts)
    rows = _of_words(table, words32(key, sites, blocks))
    for part in torch.split(rows, [table.rows_per_block * count for count in counts]):
        yield part.clone() if len(runs) > 1 else part  # one that is forgotten must not hold the memory of others


Drawn = tuple[str, Words, torch.device]  # a stream, on a device


class Recent:
    """Row numbers made lately, never more than BUDGET in all."""

    BUDGET = 32 << 20  # bytes
    AHEAD = 1 << 14  # blocks drawn together: what numpy works on at once (half a million bytes in each array)
    STREAMS = 256  # whose last question is remembered

    def __init__(self) -> None:
        self.kept: dict[tuple[Drawn, Blocks], Tensor] = {}
        self.bytes = 0
        self._latest: dict[Drawn, Blocks] = {}  # what each stream was last asked for
        self._next: dict[Blocks, Blocks] = {}  # what a stream that was asked for one was asked for next

    def row_numbers(self, table: Table, key: Words, run: Blocks, device: torch.device) -> Tensor:
        """Row numbers of the blocks of a run."""
        drawn = (table.book, key, device)
        self._learn(drawn, run)
        found = self.kept.get((drawn, run))
        if found is not None:
            return found
        if device.type != "cpu":
            found = row_numbers(table, key, run.site, torch.arange(run.first, run.last, device=device))
            self._keep(drawn, run, found)
            return found
        runs = self._with_next(drawn, run)
        found, *rest = _together(table, key, runs)
        for one, made in zip(runs, (found, *rest), strict=True):
            self._keep(drawn, one, made)
        return found

    def _learn(self, drawn: Drawn, run: Blocks) -> None:
        before = self._latest.get(drawn)
        if before is not None:
            if before != run:
                self._next[before] = run
        elif len(self._latest) >= self.STREAMS:
            self._latest, self._next = {}, {}
        self._latest[drawn] = run

    def _with_next(self, drawn: Drawn, run: Blocks) -> list[Blocks]:
        runs, room, following = {run: None}, self.AHEAD - run.total, self._next.get(run)
        while following is not None and following not in runs and (drawn, following) not in self.kept:
            room -= following.total
            if room < 0:
                break
            runs[following] = None
            following = self._next.get(following)
        return list(runs)

    def _keep(self, drawn: Drawn, run: Blocks, made: Tensor) -> None:
        if self.bytes + made.nbytes > self.BUDGET:
            self.kept, self.bytes = {}, 0
        if made.nbytes <= self.BUDGET:
            self.kept[drawn, run] = made
            self.bytes += made.nbytes


local = threading.local()  # each thread keeps its own


def recent() -> Recent:
    """This thread's row numbers."""
    if not hasattr(local, "recent"):
        local.recent = Recent()
    found: Recent = local.recent
    return found
