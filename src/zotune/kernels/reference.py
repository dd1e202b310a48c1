"""The back end that needs nothing but torch and numpy: rows of the codebook are gathered, multiplied and added.

Slower than the compiled ones, and what they are tested against. Each step of it is one operation on a buffer that stays
in cache; row numbers are drawn once for both sides of a pair and the update (`kernels.row_numbers`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.kernels.codebook import scaled_rows
from zotune.kernels.composed import Composed, Sums
from zotune.kernels.contract import Run, Term
from zotune.kernels.row_numbers import TABLES, Blocks, recent, row_numbers
from zotune.kernels.workspace import workspace

FEW = 1 << 14  # fewer numbers than this are scaled after they are gathered: the codebook has 16 times as many


class ReferenceBackend(Composed):
    """Pure torch and numpy, on any device."""

    name = "reference"

    def sums(self, like: Tensor, run: Run, terms: Sequence[Term]) -> Sums:
        """See `Composed.sums`."""
        made = [(_run if run.rows is None else _rows)(like, run, term) for term in terms]
        if len(made) == 1:
            return made[0]

        def total(offset: int, count: int) -> Tensor:
            whole = workspace("total", count, like.dtype, like.device).fill_(-0.0)  # -0.0 + x is x, bit for bit
            for one in made:
                whole.add_(one(offset, count))
            return whole

        return total


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] for int32 row numbers, flat; valid until the next call."""
    out = workspace("noise", index.numel() * rows.shape[1], rows.dtype, rows.device)
    torch.index_select(rows, 0, index, out=out.view(-1, rows.shape[1]))
    return out


def _run(like: Tensor, run: Run, term: Term) -> Sums:
    """scale * z on parts of a run of elements, each product rounded to the precision of `like`."""
    table, few = TABLES[term.book], run.count < FEW
    width, block = table.width, table.width * table.rows_per_block
    first, last = run.start // block, -(-(run.start + run.count) // block)
    index = recent().row_numbers(table, term.key, Blocks(run.site, first, last), like.device)
    rows = scaled_rows(table.book, 1.0 if few else term.scale, like.dtype, like.device)
    skip = run.start - first * block  # elements of the first block that lie before the run

    def made(offset: int, count: int) -> Tensor:
        begin = skip + offset
        top, bottom = begin // width, -(-(begin + count) // width)
        found = _gather(rows, index[top:bottom])[begin - top * width :][:count]
        if few:
            found.mul_(term.scale if isinstance(term.scale, float | int) else term.scale.to(found))
        return found

    return made


def _rows(like: Tensor, run: Run, term: Term) -> Sums:
    """scale * z of chosen rows of a tensor, whole: the units that cover each row, then the elements out of them."""
    assert run.rows is not None
    table, device, width = TABLES[term.book], like.device, run.width
    first = run.rows.to(device) * width  # (k,) number of each row's first element
    unit = table.width
    cover = width // unit if width % unit == 0 else (width - 1) // unit + 2  # units that a row can touch
    units = ((first // unit)[:, None] + torch.arange(cover, device=device)).view(-1)  # (k * cover,)
    named = row_numbers(table, term.key, run.site, units // table.rows_per_block).view(-1, table.rows_per_block)
    index = named.gather(1, (units % table.rows_per_block)[:, None])[:, 0]
    rows = scaled_rows(table.book, term.scale, like.dtype, device)

    def made(offset: int, count: int) -> Tensor:
        found = _gather(rows, index).view(first.numel(), cover * unit)
        if cover * unit != width:
            found = found.gather(1, (first % unit)[:, None] + torch.arange(width, device=device))
        return found.view(-1)

    return made
