"""The recorded engine: answers come from a ledger instead of a model. Replay and resume run on it."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from zotune.core.context import as_losses
from zotune.core.direction import Direction
from zotune.core.step import Closure
from zotune.errors import LedgerError


class Recorded:
    """Gives back the losses of one step, in the order in which they were asked for."""

    name: ClassVar[str] = "recorded"
    offers: ClassVar[frozenset[str]] = frozenset({"slope", "examples"})  # nothing is computed, so nothing is missing
    extra_memory: ClassVar[str] = "none"

    def __init__(self, losses: Sequence[float], step: int) -> None:
        self.reason = "replays a ledger"
        self.check_forwards = 0
        self._losses, self._step = list(losses), step

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Engine.losses`."""
        return as_losses(self._take(len(points)))

    def slope(self, direction: Direction, closure: Closure, seed: int) -> tuple[float, float]:
        """The loss and its derivative, as they were written down."""
        loss, derivative = self._take(2)
        return loss, derivative

    def example_losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """All losses of the step: as many examples as they leave to each point."""
        count, rest = divmod(len(self._losses), len(points))
        if rest or not count:
            raise LedgerError(
                f"Step {self._step} asks for the losses of examples at {len(points)} points, and the ledger holds "
                f"{len(self._losses)} losses. Was it written with other method options?"
            )
        return as_losses(self._take(count * len(points))).view(len(points), count)

    def _take(self, count: int) -> list[float]:
        if count > len(self._losses):
            raise LedgerError(
                f"Step {self._step} asks for more losses than the ledger holds. Was it written with other method options?"
            )
        taken, self._losses = self._losses[:count], self._losses[count:]
        return taken

    def close(self) -> None:
        """All losses of the step must have been used."""
        if self._losses:
            raise LedgerError(
                f"Step {self._step} of the ledger holds {len(self._losses)} losses more than the method asks for. "
                "Was it written with other method options?"
            )
