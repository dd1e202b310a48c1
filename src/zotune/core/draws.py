"""Noise of many small tensors in one go: the bits that `noise.add_noise` gives each of them, without a call for each.

Low-rank directions need a few numbers per row of every matrix. There are hundreds of matrices, so what such a direction
costs is not its numbers but the calls that make them. Here the Philox counters of all of them are laid out once and kept;
a draw is one pass of Philox and one gather (or one Box-Muller), cut into views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from zotune.core.noise import Stream, box_muller
from zotune.core.site import site_id
from zotune.kernels.codebook import BOOKS
from zotune.kernels.philox import MASK, U64, philox_numpy
from zotune.kernels.row_numbers import TABLES

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Layout:
    """Where the numbers of all tensors lie. A unit is what is drawn at once: a codebook row, or a block of exact normals."""

    counter: tuple[U64, U64, U64, U64]  # (blocks,) each: block number and tensor, as `philox.words` counts
    units: Tensor | None  # (units,) which units of those blocks are used; None: all
    sizes: tuple[int, ...]  # numbers drawn for each tensor: whole units


def draw_flat(source: Stream, names: Sequence[str], counts: Sequence[int], kind: str) -> tuple[Tensor, tuple[int, ...]]:
    """Numbers 0 ... counts[i] - 1 of the noise of a stream on a tensor called names[i].

    Returns:
        One flat fp32 tensor on the CPU (fp32 holds every kind exactly), and how many numbers of it belong to each name, of
        which the first counts[i] are meant: the same bits as `Noise(source, kind).realise(Site(names[i], (counts[i],)))`,
        in any company and order.
    """
    layout = _layout(tuple(names), tuple(counts), kind)
    return _made(source, layout, kind).view(-1), layout.sizes


def draw_stack(source: Stream, names: Sequence[str], count: int, kind: str) -> Tensor:
    """As `draw_flat`, the same count for each name: (len(names), count)."""
    flat, sizes = draw_flat(source, names, [count] * len(names), kind)
    return flat.view(len(names), sizes[0] if sizes else count)[:, :count]


def _made(source: Stream, layout: _Layout, kind: str) -> Tensor:
    c0, c1, c2, c3 = layout.counter
    words = philox_numpy((c0.copy(), c1.copy(), c2.copy(), c3.copy()), source.key)
    return _gaussian(words) if kind == "gaussian" else _rows(words, kind, layout)


@lru_cache(maxsize=16)
def _layout(names: tuple[str, ...], counts: tuple[int, ...], kind: str) -> _Layout:
    table = TABLES.get(kind)
    width, per_block = (4, 1) if table is None else (table.width, table.rows_per_block)
    used = [-(-count // width) for count in counts]  # units of each tensor
    blocks = [-(-units // per_block) for units in used]
    number = np.concatenate([np.arange(n, dtype=np.uint64) for n in blocks]) if blocks else np.empty(0, np.uint64)
    ids = np.repeat(np.array([site_id(name) for name in names], dtype=np.uint64), blocks)
    low, high = np.uint64(MASK), np.uint64(32)
    starts = np.cumsum([0, *(n * per_block for n in blocks)])
    wanted = np.concatenate([start + np.arange(n) for start, n in zip(starts, used, strict=False)]) if used else starts
    units = None if sum(used) == starts[-1] else torch.from_numpy(wanted.astype(np.int64))
    counter = (number & low, number >> high, ids & low, ids >> high)
    return _Layout(counter, units, tuple(n * width for n in used))


def _rows(words: tuple[U64, U64, U64, U64], kind: str, layout: _Layout) -> Tensor:
    """Codebook rows: (units, width)."""
    table = TABLES[kind]
    mask, shift = np.uint64((1 << table.bits) - 1), 32 // table.lanes
    index = np.empty((words[0].size, 4, table.lanes), dtype=np.int64)
    for word, values in enumerate(words):
        for lane in range(table.lanes):
            index[:, word, lane] = (values >> np.uint64(shift * lane)) & mask
    rows = torch.from_numpy(index.reshape(-1))
    if layout.units is not None:
        rows = rows[layout.units]
    return BOOKS[table.book](torch.float32, CPU).index_select(0, rows)


def _gaussian(words: tuple[U64, U64, U64, U64]) -> Tensor:
    """Exact normals, four of a block: (blocks, 4)."""
    return box_muller(torch.from_numpy(np.stack(words, axis=1).view(np.int64)))
