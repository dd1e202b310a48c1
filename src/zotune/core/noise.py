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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zotune.core.errors import ConfigError
from zotune.core.site import Site
from zotune.kernels.codebook import INDEX_BITS, WIDTH, scaled_rows
from zotune.kernels.philox import Words, philox_scalar, words

CHUNK = 1 << 18  # elements made at once: one megabyte of fp32, which stays in a second-level cache


@dataclass(frozen=True)
class Stream:
    """Names one infinite sequence of random words."""

    key: Words


@lru_cache(maxsize=4096)
def stream(seed: int, *purpose: int | str) -> Stream:
    """The stream of a run seed and a purpose, such as ``stream(seed, "step", 17, 0)``. Distinct purposes, distinct streams."""
    text = repr((int(seed), *purpose)).encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"zotune-stream").digest()
    return Stream((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")))


def uniform(source: Stream, low: float, high: float) -> float:
    """One number from [low, high), 53 random bits; the same on every machine."""
    a, b, _, _ = philox_scalar((0, 0, 0, 0), source.key)
    return low + (high - low) * ((a >> 5) * 2**26 + (b >> 6)) / 2**53


# ----------------------------------------------------------------------------------------------------------------------
# Each kind: (stream, site id, first block, scale, like) -> numbers of whole blocks, already times scale.
# A block is what one Philox call makes: 8 codebook rows = 512 normals, 4 Gaussians, or 128 signs.


def _normal_rows(source: Stream, site: int, rows: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """(n,) row numbers -> (n, 64): row r takes 16-bit lane r % 8 of block r // 8."""
    lanes = words(source.key, site, rows >> 3)
    lane = rows & 7
    word = lanes.gather(1, (lane >> 1)[:, None])[:, 0]
    index = (word >> ((lane & 1) << 4)) & ((1 << INDEX_BITS) - 1)
    return scaled_rows("normal", scale, like.dtype, like.device).index_select(0, index)


def _normal(source: Stream, site: int, blocks: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    lanes = words(source.key, site, blocks)
    low, high = lanes & ((1 << INDEX_BITS) - 1), (lanes >> 16) & ((1 << INDEX_BITS) - 1)
    index = torch.stack((low, high), dim=2).view(-1)
    return scaled_rows("normal", scale, like.dtype, like.device).index_select(0, index)


def _rademacher(source: Stream, site: int, blocks: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    lanes = words(source.key, site, blocks)
    shifts = torch.tensor((0, 8, 16, 24), device=lanes.device)
    index = ((lanes[:, :, None] >> shifts) & 255).view(-1)
    return scaled_rows("rademacher", scale, like.dtype, like.device).index_select(0, index)


def _gaussian(source: Stream, site: int, blocks: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    # Box-Muller in fp32 whatever the weight's dtype: 24 bits of each word, shifted by half a step so that log(0) cannot be
    unit = ((words(source.key, site, blocks) >> 8).to(torch.float32) + 0.5) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2]))
    angle = (2.0 * math.pi) * unit[:, 1::2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2).view(-1, 4)
    return z.to(like.dtype) * scale


Maker = Callable[[Stream, int, Tensor, float | Tensor, Tensor], Tensor]
# kind -> numbers in a block, maker
KINDS: dict[str, tuple[int, Maker]] = {
    "normal": (8 * WIDTH, _normal),
    "gaussian": (4, _gaussian),
    "rademacher": (128, _rademacher),
}


def check_kind(kind: str) -> str:
    """The kind, or an error that lists those there are."""
    if kind not in KINDS:
        raise ConfigError(f"noise must be one of {', '.join(KINDS)}; got {kind!r}.")
    return kind


def add_noise(out: Tensor, site: Site, source: Stream, kind: str, scale: float | Tensor) -> None:
    """out += scale * z[site], one rounding for the product and one for the sum, so chunks and devices agree.

    Args:
        out: fp32 or fp64, as many elements as `site` means, in its order.
        site: whole tensor, run of elements, or choice of rows.
        source: the stream.
        kind: a key of `KINDS`.
        scale: a number, or a 0-d tensor that is never read on the host.
    """
    if site.rows is not None:
        _add_rows(out, site, source, kind, scale)
        return
    if not out.is_contiguous():
        out.add_(make_noise(site, source, kind, scale, out).view(out.shape))
        return
    flat = out.view(-1)
    for offset, part in site.chunks(CHUNK):
        flat[offset : offset + part.count].add_(make_noise(part, source, kind, scale, flat))


def make_noise(site: Site, source: Stream, kind: str, scale: float | Tensor, like: Tensor) -> Tensor:
    """scale * z[site] for a run of elements: (count,), dtype and device of `like`."""
    per_block, maker = KINDS[kind]
    first, last = site.start // per_block, -(-(site.start + site.count) // per_block)
    blocks = torch.arange(first, last, device=like.device)
    skip = site.start - first * per_block
    return maker(source, site.id, blocks, scale, like).view(-1)[skip : skip + site.count]


def _add_rows(out: Tensor, site: Site, source: Stream, kind: str, scale: float | Tensor) -> None:
    """Noise of chosen rows: the codebook rows (or blocks) that cover each row, then the elements out of them."""
    assert site.rows is not None
    first = site.rows.to(out.device) * site.width  # (k,) number of each row's first element
    if kind == "normal":
        unit, maker = WIDTH, _normal_rows
    else:
        unit, maker = KINDS[kind]
    cover = (site.width - 2) // unit + 2 if site.width > 1 else 1  # units that a row of this width can touch
    if site.width % unit == 0:
        cover = site.width // unit
    units = (first // unit)[:, None] + torch.arange(cover, device=out.device)  # (k, cover)
    made = maker(source, site.id, units.view(-1), scale, out).view(first.numel(), cover * unit)
    if cover * unit != site.width:
        columns = (first % unit)[:, None] + torch.arange(site.width, device=out.device)
        made = made.gather(1, columns)
    out.view(first.numel(), site.width).add_(made)
