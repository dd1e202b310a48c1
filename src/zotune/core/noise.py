"""Noise as a pure function of (run seed, stream, canonical site name, element number).

Nothing else enters: not the order of tensors, the chunking, the device, the weight's dtype, the number of threads, nor
any global generator. A stream is two 32-bit words hashed from the run seed and what the stream is for; the site's 64-bit
id and the element's block number are the Philox counter (`kernels.philox`). Kinds of noise:

* ``normal``: rows of a fixed codebook (`kernels.codebook`): the default; the same bits on every device.
* ``gaussian``: exact normals by Box-Muller; devices agree to rounding (their log and cos differ in the last bit).
* ``rademacher``: +-1; the same bits on every device.
"""

import hashlib
import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zotune.core.errors import ConfigError
from zotune.core.site import Site
from zotune.core.workspace import workspace
from zotune.kernels.codebook import INDEX_BITS, WIDTH, scaled_rows
from zotune.kernels.philox import Words, philox_scalar, words

FEW = 1 << 14  # fewer numbers than this are scaled after they are gathered: the codebook has 16 times as many
CHUNK = 1 << 18  # elements made at once: one megabyte of fp32, which stays in a second-level cache


@dataclass(frozen=True)
class Stream:
    """Names one infinite sequence of random words."""

    key: Words


@lru_cache(maxsize=4096)
def stream(seed: int, *purpose: int | str) -> Stream:
    """The stream of a run seed and a purpose, such as ``stream(seed, "step", 17, 0)``. Distinct purposes, distinct streams."""
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in purpose))).encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"zotune-stream").digest()
    return Stream((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")))


def uniform(source: Stream, low: float, high: float) -> float:
    """One number from [low, high), 53 random bits; the same on every machine."""
    a, b, _, _ = philox_scalar((0, 0, 0, 0), source.key)
    return low + (high - low) * ((a >> 5) * 2**26 + (b >> 6)) / 2**53


LANES = 1 << 16  # values of a lane


def lanes(source: Stream, site: Site, device: torch.device) -> Tensor:
    """16 random bits for each element that `site` means: (site.numel,) int64 in [0, LANES). A block has 8 lanes."""
    if site.rows is None:
        first, last = site.start // 8, -(-(site.start + site.count) // 8)
        made = _lanes_of_blocks(source, site, torch.arange(first, last, device=device))
        return made.view(-1)[site.start - first * 8 :][: site.count]
    starts = site.rows.to(device) * site.width  # (k,) number of each row's first element
    cover = (site.width - 1) // 8 + 2  # blocks that a row can touch
    blocks = (starts // 8)[:, None] + torch.arange(cover, device=device)
    made = _lanes_of_blocks(source, site, blocks.view(-1)).view(starts.numel(), cover * 8)
    return made.gather(1, (starts % 8)[:, None] + torch.arange(site.width, device=device)).view(-1)


def _lanes_of_blocks(source: Stream, site: Site, blocks: Tensor) -> Tensor:
    """(b,) block numbers -> (b, 8): the low and the high half of each word in turn."""
    made = words(source.key, site.id, blocks)
    return torch.stack((made & 0xFFFF, made >> 16), dim=2).view(-1, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Table noise: row numbers from Philox, rows from a codebook.


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
KINDS = ("normal", "gaussian", "rademacher")


def check_kind(kind: str) -> str:
    """The kind, or an error that lists those there are."""
    if kind not in KINDS:
        raise ConfigError(f"noise must be one of {', '.join(KINDS)}; got {kind!r}.")
    return kind


def _row_numbers(table: Table, source: Stream, site: int, blocks: Tensor) -> Tensor:
    """(b,) block numbers -> (b * rows_per_block,) int16 row numbers."""
    mask, shift = (1 << table.bits) - 1, 32 // table.lanes
    made = words(source.key, site, blocks)
    lanes = [((made >> (shift * lane)) & mask).to(torch.int16) for lane in range(table.lanes)]
    return torch.stack(lanes, dim=2).view(-1)


class _Recent:
    """Row numbers made lately. A step draws each stream for both sides and the update; Philox is paid once.

    Two bytes for 64 numbers of noise, and never more than BUDGET in all.
    """

    BUDGET = 32 << 20  # bytes

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._bytes = 0

    def row_numbers(
        self, table: Table, source: Stream, site: int, first: int, last: int, device: torch.device
    ) -> Tensor:
        """Row numbers of the blocks first ... last - 1."""
        key = (table.book, source.key, site, first, last, device)
        found = self._kept.get(key)
        if found is None:
            found = _row_numbers(table, source, site, torch.arange(first, last, device=device))
            if self._bytes + found.nbytes > self.BUDGET:
                self._kept, self._bytes = {}, 0
            if found.nbytes <= self.BUDGET:
                self._kept[key] = found
                self._bytes += found.nbytes
        return found


_local = threading.local()


def _recent() -> _Recent:
    if not hasattr(_local, "recent"):
        _local.recent = _Recent()
    recent: _Recent = _local.recent
    return recent


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], valid until the next call."""
    index = index.to(torch.int32)
    out = workspace("noise", index.numel() * rows.shape[1], rows.dtype, rows.device).view(index.numel(), rows.shape[1])
    torch.index_select(rows, 0, index, out=out)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Adding noise to a tensor


def add_noise(out: Tensor, site: Site, source: Stream, kind: str, scale: float | Tensor) -> None:
    """out += scale * z[site], one rounding for the product and one for the sum, so chunks and devices agree.

    Args:
        out: fp32 or fp64, as many elements as `site` means, in its order.
        site: whole tensor, run of elements, or choice of rows.
        source: the stream.
        kind: one of `KINDS`.
        scale: a number, or a 0-d tensor; one on a GPU is never read on the host.
    """
    if site.rows is not None:
        _add_rows(out, site, source, kind, scale)
    elif out.is_contiguous():
        _add_run(out.view(-1), site, source, kind, scale)
    else:
        dense = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        _add_run(dense.view(-1), site, source, kind, scale)
        out.add_(dense)


def _add_run(flat: Tensor, site: Site, source: Stream, kind: str, scale: float | Tensor) -> None:
    """Noise of a run of elements."""
    if kind == "gaussian":
        for offset in range(0, site.count, CHUNK):
            part = site.part(offset, min(CHUNK, site.count - offset))
            first, last = part.start // 4, -(-(part.start + part.count) // 4)
            made = _gaussian(source, site.id, torch.arange(first, last, device=flat.device), scale, flat).view(-1)
            flat[offset : offset + part.count].add_(made[part.start - 4 * first :][: part.count])
        return
    table = TABLES[kind]
    width, block = table.width, table.width * table.rows_per_block
    first, last = site.start // block, -(-(site.start + site.count) // block)
    index = _recent().row_numbers(table, source, site.id, first, last, flat.device)
    few = site.count < FEW
    rows = scaled_rows(table.book, 1.0 if few else scale, flat.dtype, flat.device)
    skip = site.start - first * block  # elements of the first block that lie before the run
    for offset in range(0, site.count, CHUNK):
        count = min(CHUNK, site.count - offset)
        top, bottom = (skip + offset) // width, -(-(skip + offset + count) // width)
        made = _gather(rows, index[top:bottom]).view(-1)[skip + offset - top * width :][:count]
        if few:
            made = made.mul_(scale if isinstance(scale, float | int) else scale.to(made))
        flat[offset : offset + count].add_(made)


def _add_rows(out: Tensor, site: Site, source: Stream, kind: str, scale: float | Tensor) -> None:
    """Noise of chosen rows of a tensor: the units that cover each row, then the elements out of them."""
    assert site.rows is not None
    first = site.rows.to(out.device) * site.width  # (k,) number of each row's first element
    unit = 4 if kind == "gaussian" else TABLES[kind].width
    cover = site.width // unit if site.width % unit == 0 else (site.width - 1) // unit + 2  # units that a row can touch
    units = ((first // unit)[:, None] + torch.arange(cover, device=out.device)).view(-1)  # (k * cover,)
    if kind == "gaussian":
        made = _gaussian(source, site.id, units, scale, out)
    else:
        table = TABLES[kind]
        named = _row_numbers(table, source, site.id, units // table.rows_per_block).view(-1, table.rows_per_block)
        index = named.gather(1, (units % table.rows_per_block)[:, None])[:, 0]
        made = _gather(scaled_rows(table.book, scale, out.dtype, out.device), index)
    made = made.view(first.numel(), cover * unit)
    if cover * unit != site.width:
        columns = (first % unit)[:, None] + torch.arange(site.width, device=out.device)
        made = made.gather(1, columns)
    out.view(first.numel(), site.width).add_(made)


def _gaussian(source: Stream, site: int, blocks: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """(b,) block numbers -> (b, 4) exact normals times scale."""
    # Box-Muller in fp32 whatever the weight's dtype: 24 bits of each word, shifted by half a step so that log(0) cannot be
    unit = ((words(source.key, site, blocks) >> 8).to(torch.float32) + 0.5) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2]))
    angle = (2.0 * math.pi) * unit[:, 1::2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2).view(-1, 4)
    return z.to(like.dtype) * scale
