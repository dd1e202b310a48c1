"""Directions made of another one element by element. They are replayed too: the inner direction is made a chunk at a time."""

from dataclasses import dataclass

from torch import Tensor

from zotune.core.direction import Direction, Scalar
from zotune.core.noise import CHUNK
from zotune.core.site import Site


@dataclass(frozen=True, eq=False)
class Sign(Direction):
    """The sign of each number of a direction: -1, 0 or 1."""

    inner: Direction

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        if not self.inner.touches(site):
            return
        if site.rows is not None or not out.is_contiguous():
            out.add_(self._made(site, out).mul_(scale).view(out.shape))
            return
        flat = out.view(-1)
        for offset, part in site.chunks(CHUNK):
            flat[offset : offset + part.count].add_(self._made(part, out).mul_(scale))

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return self.inner.touches(site)

    def _made(self, part: Site, like: Tensor) -> Tensor:
        return self.inner.realise(part, like.dtype, like.device).view(-1).sign_()
