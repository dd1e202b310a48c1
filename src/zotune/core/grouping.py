"""How several points are written to a tensor with as few draws of noise as can be."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.core.direction import Direction, kernel_terms
from zotune.core.site import Site
from zotune.kernels.contract import Term

Grouped = tuple[list[tuple[tuple[Term, ...], list[tuple[int, float]]]], list[int]]


class Draws:
    """Asked the same for tensor after tensor: the answer is kept."""

    def __init__(self) -> None:
        self._points: Sequence[Direction] = ()
        self._answer: Grouped = ([], [])

    def of(self, points: Sequence[Direction], part: Site, device: torch.device) -> Grouped:
        """Draws: terms, and which points are these terms with which sign. And the points that the kernels do not take."""
        if points is self._points:
            return self._answer
        made = _grouped(points, part, device)
        if isinstance(points, tuple) and all(point.uniform for point in points):
            self._points, self._answer = points, made
        return made


def _grouped(points: Sequence[Direction], part: Site, device: torch.device) -> Grouped:
    drawn = [kernel_terms(point, part, device) for point in points]
    waiting = [k for k, terms in enumerate(drawn) if terms]
    draws = []
    while waiting:  # those that are one draw, with either sign, are written together
        first = drawn[waiting[0]] or ()
        signs = [(k, _opposite(drawn[k] or (), first)) for k in waiting]
        draws.append((first, [(k, sign) for k, sign in signs if sign is not None]))
        waiting = [k for k, sign in signs if sign is None]
    return draws, [k for k, terms in enumerate(drawn) if not terms]


def _opposite(terms: tuple[Term, ...], first: tuple[Term, ...]) -> float | None:
    """1.0 if these terms are the first ones, -1.0 if they are its one term with the other sign, None otherwise."""
    if terms is first:
        return 1.0
    if len(terms) != len(first):
        return None
    same = True
    for a, b in zip(terms, first, strict=True):
        if not _same_source(a, b):
            return None
        same = same and _same_number(a.scale, b.scale)
    if same:
        return 1.0
    # A sum of several that cancels is +0.0 for both signs, so a pair of such sums is not a sum and its negative.
    return -1.0 if len(terms) == 1 and _negative(terms[0].scale, first[0].scale) else None


def _same_source(one: Term, other: Term) -> bool:
    """Whether they are multiples of the same numbers."""
    if one.replayed and other.replayed:
        return one.key == other.key and one.book == other.book and one.mask == other.mask
    if one.numbers is not None and other.numbers is not None:  # all of the site's
        return one.numbers.data_ptr() == other.numbers.data_ptr() and one.numbers.dtype == other.numbers.dtype
    return one.factors is not None and one.factors is other.factors


def _same_number(one: float | Tensor, other: float | Tensor) -> bool:
    """0.0 is not -0.0 here. What lies on a GPU is not read: the same object is the same number."""
    if one is other:
        return True
    if _unread(one) or _unread(other):
        return False
    return float(one) == float(other) and math.copysign(1.0, one) == math.copysign(1.0, other)


def _negative(one: float | Tensor, other: float | Tensor) -> bool:
    return not (_unread(one) or _unread(other)) and float(one) == -float(other)


def _unread(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.device.type != "cpu"
