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
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.kernels.contract import Run, Term
from zotune.kernels.dispatch import backend_for
from zotune.kernels.philox import Words, philox_scalar, words
from zotune.kernels.row_numbers import TABLES

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


KINDS = ("normal", "gaussian", "rademacher")
TABLE_KINDS = frozenset(TABLES)  # what the kernels make; the others are computed


def check_kind(kind: str) -> str:
    """The kind, or an error that lists those there are."""
    if kind not in KINDS:
        raise ConfigError(f"noise must be one of {', '.join(KINDS)}; got {kind!r}.")
    return kind


def run_of(site: Site, device: torch.device) -> Run:
    """The elements that a site means, as the kernels are told."""
    return site.run if site.rows is None else replace(site.run, rows=site.rows.to(device))


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
    if kind not in TABLE_KINDS and site.rows is not None:
        _add_gaussian_rows(out, site, source, scale)
    elif not out.is_contiguous():
        dense = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        add_noise(dense, site, source, kind, scale)
        out.add_(dense)
    elif kind in TABLE_KINDS:
        run = run_of(site, out.device)
        backend_for(out.device).add(out.view(-1), run, [Term(source.key, kind, scale)])
    else:
        _add_gaussian(out.view(-1), site, source, scale)


def _add_gaussian(flat: Tensor, site: Site, source: Stream, scale: float | Tensor) -> None:
    """Exact normals of a run of elements."""
    for offset in range(0, site.count, CHUNK):
        part = site.part(offset, min(CHUNK, site.count - offset))
        first, last = part.start // 4, -(-(part.start + part.count) // 4)
        made = _gaussian(source, site.id, torch.arange(first, last, device=flat.device), scale, flat).view(-1)
        flat[offset : offset + part.count].add_(made[part.start - 4 * first :][: part.count])


def _add_gaussian_rows(out: Tensor, site: Site, source: Stream, scale: float | Tensor) -> None:
    """Exact normals of chosen rows: the blocks that cover each row, then the elements out of them."""
    assert site.rows is not None
    first = site.rows.to(out.device) * site.width  # (k,) number of each row's first element
    cover = site.width // 4 if site.width % 4 == 0 else (site.width - 1) // 4 + 2  # blocks that a row can touch
    blocks = ((first // 4)[:, None] + torch.arange(cover, device=out.device)).view(-1)  # (k * cover,)
    made = _gaussian(source, site.id, blocks, scale, out).view(first.numel(), cover * 4)
    if cover * 4 != site.width:
        made = made.gather(1, (first % 4)[:, None] + torch.arange(site.width, device=out.device))
    out.view(first.numel(), site.width).add_(made)


def _gaussian(source: Stream, site: int, blocks: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """(b,) block numbers -> (b, 4) exact normals times scale."""
    return box_muller(words(source.key, site, blocks)).to(like.dtype) * scale


def box_muller(drawn: Tensor) -> Tensor:
    """(b, 4) words of 32 bits, as int64 -> (b, 4) exact normals in fp32, whatever the weight's dtype."""
    unit = ((drawn >> 8).to(torch.float32) + 0.5) * 2.0**-24  # 24 bits; half a step more, so that log(0) cannot be
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2]))
    angle = (2.0 * math.pi) * unit[:, 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2).view(-1, 4)
