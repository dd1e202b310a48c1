"""The in-place engine: perturb the stored tensors, ask, put back a copy. Any module, any closure.

Restoring by arithmetic (+eps, -2 eps, +eps) does not give the weights back: numbers smaller than the perturbation lose
bits that no subtraction can return, and bf16 weights drift by 12 % of their norm in 1,000 steps. So the tensors are
copied for the length of a wave and copied back, which is exact, also after an exception. Memory: one copy of what is
trained. For adapters that is nothing; for full tuning prefer the layerwise engine, which needs no copy.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from zotune.core.context import as_losses
from zotune.core.direction import Direction
from zotune.core.step import Closure
from zotune.core.weights import Slot, Weights
from zotune.engines.audit import ReadAudit
from zotune.engines.examples import one_by_one
from zotune.engines.forward_mode import ask_slope, attach, check_slope
from zotune.engines.query import ask, ask_first
from zotune.errors import ClosureError


class InPlace:
    """Writes perturbed values into the stored tensors during a query."""

    name: ClassVar[str] = "in_place"
    offers: ClassVar[frozenset[str]] = frozenset({"slope", "examples"})
    extra_memory: ClassVar[str] = "one copy of the trained tensors during a query"  # of a slope: their tangents

    def __init__(self, weights: Weights, reason: str = "asked for") -> None:
        self.weights = weights
        self.reason = reason
        self.check_forwards = 0  # forwards spent on checking, beside those that the method asks for
        self._unread: set[str] | None = None  # not known before the first query
        self._slope_checked = False

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Engine.losses`."""
        self.weights.settle()
        if self._unread is None:
            self._survey(closure, seed)
        answers = []
        for point in points:
            with self.at(point):
                answers.append(ask(closure, self.weights, seed))
        refuse_standing_still(answers, points, self._unread or (), self.weights)
        return as_losses(answers)

    def slope(self, direction: Direction, closure: Closure, seed: int) -> tuple[float, float]:
        """The loss at the current weights and its derivative along a direction."""
        self.weights.settle()
        if self._unread is None:
            self._survey(closure, seed)
        loss, derivative = ask_slope(self, direction, closure, seed)
        if not self._slope_checked:
            check_slope(self, direction, closure, seed, derivative)
            self._slope_checked = True
        return loss, derivative

    def example_losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """The loss of each example at each point, by as many forwards as there are examples."""
        self.weights.settle()
        return one_by_one(self, points, closure, seed)

    @contextmanager
    def along(self, direction: Direction, only: Collection[str] | None = None) -> Iterator[None]:
        """Inside a dual level: the stored tensors carry the direction as tangent until the level ends."""
        for slot in self.weights:
            if direction.touches(slot.site) and (only is None or slot.site.name in only):
                attach(slot, direction)
        yield

    @contextmanager
    def at(self, point: Direction, only: Collection[str] | None = None) -> Iterator[None]:
        """The stored tensors hold the perturbed values inside the block, and their own bits after it."""
        slots = [s for s in self.weights if point.touches(s.site) and (only is None or s.site.name in only)]
        self.weights.settle(slots)
        saved: list[tuple[Slot, Tensor]] = []
        try:
            for slot in slots:
                saved.append((slot, slot.tensor.detach().clone()))
                self.weights.perturb(slot, slot.site, point, slot.tensor)
            yield
        finally:
            for slot, before in reversed(saved):
                slot.tensor.copy_(before)

    def _survey(self, closure: Closure, seed: int) -> None:
        """One forward at the current weights: is the loss a number, and which tensors does it read?"""
        audit = ReadAudit(self.weights)
        with audit:
            ask_first(closure, self.weights, seed)
        self.check_forwards += 1
        self._unread = set(self.weights.slots) - audit.read


def refuse_standing_still(
    answers: Sequence[float], points: Sequence[Direction], unread: Collection[str], weights: Weights
) -> None:
    """Equal losses at different points, from a closure that reads no trained tensor, cannot train anything.

    Equal losses alone are no fault (accuracy is a step function), nor are reads that were not seen (a compiled model).
    """
    if len(points) > 1 and len(unread) == len(weights.slots) and len({float(answer) for answer in answers}) == 1:
        raise ClosureError(
            f"The loss is {answers[0]!r} at {len(points)} different points, and the closure reads none of the "
            f"{len(weights.slots)} trained tensors: perturbing them changes nothing. Does the closure run the model "
            "whose parameters were given to ZO (and not a copy, or a shard that is gathered elsewhere)?"
        )
