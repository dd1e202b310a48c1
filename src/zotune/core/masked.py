"""Masked directions: most numbers are left out, at random, and which ones is replayed like the noise itself."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from zotune.core.direction import Direction, Scalar
from zotune.core.noise import CHUNK, Stream, lanes
from zotune.core.site import Site
from zotune.kernels.contract import LANES, Mask, Term


@dataclass(frozen=True, eq=False)
class Masked(Direction):
    """A direction where each element is kept with a probability, and otherwise 0.

    Element k of a site is kept if its 16 random bits, a function of (stream, site, k), are below density * 2**16: the same
    choice for any slice, for probe and update, and for as long as the stream is the same.
    """

    inner: Direction
    source: Stream
    densities: Mapping[str, float] = field(default_factory=dict)  # by site name
    otherwise: float = 1.0  # density of sites that are not named

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`. Numbers that are left out keep their bits."""
        limit = self._limit(site)
        if limit == LANES:
            self.inner.add_to(out, site, scale)
        elif not self.touches(site):
            return
        elif site.rows is not None or not out.is_contiguous():
            out.add_(self._made(site, limit, out, scale).view(out.shape))
        else:
            flat = out.view(-1)
            for offset, part in site.chunks(CHUNK):
                flat[offset : offset + part.count].add_(self._made(part, limit, out, scale))

    def touches(self, site: Site) -> bool:
        """False where the density is 0."""
        return self._limit(site) > 0 and self.inner.touches(site)

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """See `Direction.term`: of a single kind of noise."""
        leaves, limit = self.inner.leaves(site, scale), self._limit(site)
        if leaves is None or len(leaves) != 1:
            return None
        (coefficient, leaf), *_ = leaves
        term = leaf.term(site, coefficient)
        if term is None or limit == LANES:
            return term
        return replace(term, mask=Mask(self.source.key, limit)) if term.drawn else None

    def _limit(self, site: Site) -> int:
        return round(self.densities.get(site.name, self.otherwise) * LANES)

    def _made(self, part: Site, limit: int, like: Tensor, scale: Scalar) -> Tensor:
        made = (scale * self.inner).realise(part, like.dtype, like.device).view(-1)
        # not 0.0: -0.0 is what leaves every number as it is, -0.0 included
        return made.masked_fill_(_left_out(self.source, part, limit, like.device), -0.0)


class _Kept(threading.local):
    """Masks made lately, a bit for each element, never more than BUDGET bytes in all.

    A mask needs 16 random bits for each number, 30 times as many as table noise; most of the time it is the mask of the
    step before.
    """

    BUDGET = 32 << 20

    def __init__(self) -> None:
        self.masks: dict[tuple[object, ...], np.ndarray] = {}
        self.bytes = 0


_kept = _Kept()


def _left_out(source: Stream, part: Site, limit: int, device: torch.device) -> Tensor:
    """(part.numel,) bool: which elements are 0."""
    if part.rows is not None or device.type != "cpu":
        return lanes(source, part, device) >= limit
    key = (source.key, part.id, part.start, part.count, limit)
    packed = _kept.masks.get(key)
    if packed is None:
        packed = np.packbits((lanes(source, part, device) >= limit).numpy())
        if _kept.bytes + packed.nbytes > _Kept.BUDGET:
            _kept.masks, _kept.bytes = {}, 0
        _kept.masks[key] = packed
        _kept.bytes += packed.nbytes
    return torch.from_numpy(np.unpackbits(packed, count=part.count)).view(torch.bool)
