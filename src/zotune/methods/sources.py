"""Sources: where a method's random directions come from, for methods that can use more than one kind.

A source is a dataclass of its options; `draw(ctx)` is a fresh direction with E[z z^T] = I over everything that is
random in it. Sources keep no state that the run seed and the step do not give back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from zotune.core.context import Context
from zotune.core.direction import Direction
from zotune.core.options import Options
from zotune.core.registry import make
from zotune.core.site import Site
from zotune.methods.base import Base
from zotune.methods.lozo import Lazy
from zotune.methods.sparse import SparseNoise
from zotune.methods.subzero import Subspace


class Source(Protocol):
    """Draws directions."""

    name: ClassVar[str]
    extra_state: ClassVar[str]
    low_rank: ClassVar[bool]  # whether its directions are low-rank on matrices

    def draw(self, ctx: Context) -> Direction:
        """A fresh direction of this step."""
        ...

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """Bytes kept between steps when these sites are trained."""
        ...


class FullSpace(Options):
    """Sources that keep nothing."""

    extra_state: ClassVar[str] = "none"
    low_rank: ClassVar[bool] = False

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Source.extra_bytes`."""
        return 0


@dataclass(frozen=True)
class Gaussian(FullSpace):
    """Standard normal in all trained numbers, of the run's kind of noise."""

    name: ClassVar[str] = "gaussian"

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`."""
        return ctx.gaussian()


@dataclass(frozen=True)
class Rademacher(FullSpace):
    """Independent signs."""

    name: ClassVar[str] = "rademacher"

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`."""
        return ctx.rademacher()


SOURCES: dict[str, type] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "subzero": Subspace,
    "lozo": Lazy,
    "sparse": SparseNoise,
}


def make_source(name: str, options: dict[str, Any]) -> Source:
    """A source from its name and options; a ConfigError names what is known."""
    made: Source = make("source", SOURCES, name, options)
    return made


class FromSource(Base):
    """A method with the options `source` and `source_options`, that draws its directions from there."""

    source: str
    source_options: dict[str, Any]

    extra_state: ClassVar[str] = "none, or what the source keeps"

    def take_source(self) -> None:
        """Make the source of these options; a ConfigError names what is known."""
        self._source = make_source(self.source, self.source_options)

    @property
    def low_rank(self) -> bool:
        """See `Method.low_rank`."""
        return self._source.low_rank

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Method.extra_bytes`: what the source keeps."""
        return self._source.extra_bytes(sites)
