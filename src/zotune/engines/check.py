"""Do two engines give the same losses? Asked once, on a few small tensors, before the first step."""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from zotune.core.direction import Direction, Scaled
from zotune.core.step import Closure
from zotune.core.weights import Weights
from zotune.engines.query import ask
from zotune.errors import EngineError

MAX_NUMEL = 1 << 20  # at most this many elements are copied for the comparison
MAX_SITES = 8
NOT_A_FUNCTION = 1e-3  # a closure that differs from itself by more than this has no slope at the usual eps


class Perturbing(Protocol):
    """An engine that can hold a point while the closure runs."""

    weights: Weights

    def at(self, point: Direction, only: Collection[str] | None = None) -> AbstractContextManager[None]:
        """The closure sees the perturbed weights inside the block."""
        ...


def compare_engines(
    engine: Perturbing, reference: Perturbing, names: set[str], point: Direction, closure: Closure, seed: int
) -> int:
    """Perturb a few of the named tensors with both engines and compare the losses. Returns the forwards spent.

    Raises:
        EngineError: the losses differ by more than the closure differs from itself.
    """
    weights = engine.weights
    sample = _sample(weights, names)
    if not sample:
        return 0
    part = Scaled(point, dict.fromkeys(sample, 1.0), otherwise=0.0)

    def loss(which: Perturbing | None) -> float:
        if which is None:
            return ask(closure, weights, seed)
        with which.at(part, set(sample)):
            return ask(closure, weights, seed)

    ours, theirs = loss(engine), loss(reference)
    if ours == theirs:
        return 2
    # Engines may multiply in another order, and some kernels are not deterministic: allow for both.
    again, here = loss(engine), loss(None)
    if abs(ours - again) > NOT_A_FUNCTION * (1 + abs(here)):
        raise EngineError(
            f"The closure is not a function of the weights: asked twice at the same point it gave {ours!r} and {again!r}. "
            "If it draws a new batch each time it is called, move that out of it: all queries of a step must see one "
            "batch. If its randomness is wanted, use engine='in_place'."
        )
    allowed = 0.05 * abs(theirs - here) + 4 * abs(ours - again) + 1e-6 * (1 + abs(here))
    if abs(ours - theirs) > allowed:
        raise EngineError(
            f"Engines disagree: perturbing {len(sample)} tensors ({', '.join(sample[:3])}, ...) gives the loss {ours!r} "
            f"layer by layer and {theirs!r} in place (unperturbed {here!r}, asked again {again!r}). "
            "Use engine='in_place' and report this model."
        )
    return 4


def _sample(weights: Weights, names: set[str]) -> list[str]:
    """Small tensors, spread over the model."""
    slots = [weights.slots[name] for name in weights.slots if name in names]
    spread = slots[:: max(1, len(slots) // MAX_SITES)] + sorted(slots, key=lambda s: s.tensor.numel())[:1]
    chosen: list[str] = []
    budget = MAX_NUMEL
    for slot in sorted(spread, key=lambda s: s.tensor.numel()):
        if slot.tensor.numel() <= budget and slot.site.name not in chosen:
            chosen.append(slot.site.name)
            budget -= slot.tensor.numel()
    return chosen


def refuse_different_losses(ours: Sequence[float], theirs: Sequence[float], weights: Weights) -> None:
    """Losses of several points, batched and layer by layer.

    A forward of more rows sums its products in another order; 32 units of the weights' precision are allowed for that,
    and a tenth of what the points differ by: a tensor that was left out or moved twice moves the losses by more.

    Raises:
        EngineError: they differ by more, or one is not a finite number where the other is.
    """
    unit = max(torch.finfo(slot.tensor.dtype).eps for slot in weights)
    finite = [loss for loss in theirs if math.isfinite(loss)]
    spread = max(finite) - min(finite) if finite else 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if not math.isfinite(mine) and not math.isfinite(other):
            continue
        if not abs(mine - other) <= 0.1 * spread + 32 * max(unit, 1e-9) * (1 + abs(other)):
            raise EngineError(
                f"The batched forward gives the loss {mine!r} at a point where layer by layer gives {other!r}. "
                "Use engine='layerwise' and report this model."
            )
