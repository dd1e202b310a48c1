"""Closures that return one loss per example, and the plain way to answer for directions that differ between examples.

Example i's loss along its own direction is entry i of what the closure returns at theta + z_i: one forward for each
example and point, whatever the model. It is the reference for `engines.batched_examples`, which needs one for all.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zotune.core.direction import Direction
from zotune.core.signed import differs, for_example
from zotune.core.step import Closure
from zotune.errors import ClosureError


class Plain(Protocol):
    """An engine that answers points which are the same for all examples."""

    check_forwards: int

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Engine.losses`."""
        ...


class Noted:
    """A closure of examples as one of a single number, their mean; the examples' losses are kept beside."""

    def __init__(self, closure: Closure) -> None:
        self._closure = closure
        self.last: Tensor = torch.empty(0)  # (B,) float64, of the last call

    def __call__(self) -> Tensor:
        """Run the closure."""
        self.last = per_example(self._closure())
        return self.last.mean()


def per_example(answer: Any) -> Tensor:
    """(B,) float64 out of what a closure returned; a copy.

    Raises:
        ClosureError: anything else than one loss per example.
    """
    if not isinstance(answer, Tensor) or answer.dim() != 1 or answer.numel() == 0:
        given = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ClosureError(
            f"The closure returned {given}; this method needs one loss per example, a tensor of shape (B,), since each "
            "example has a direction of its own. Leave out the mean over the batch."
        )
    return answer.detach().to(torch.float64, copy=True)


def one_by_one(engine: Plain, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
    """(len(points), B) losses, by B forwards for each point that differs between the examples.

    The forwards beyond one a point are added to the engine's `check_forwards`.
    """
    noted = Noted(closure)
    found: list[Tensor] = []
    for point in points:
        engine.losses([for_example(point, 0)], noted, seed)
        answers = noted.last.clone()
        check_count(len(answers), len(found[0]) if found else len(answers))
        for number in range(1, len(answers)) if differs(point) else ():
            engine.losses([for_example(point, number)], noted, seed)
            check_count(len(noted.last), len(answers))
            answers[number] = noted.last[number]
            engine.check_forwards += 1
        found.append(answers)
    return torch.stack(found)


def check_count(count: int, before: int) -> None:
    """All points of a step must be asked for on one batch."""
    if count != before:
        raise ClosureError(
            f"The closure returned {before} losses, and then {count} in the same step: all queries of a step must see one "
            "batch."
        )
