"""Recording the body's answers for several points, and serving them to the calls of the closure that follow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from zotune.core.common_random import put_back, random_state
from zotune.core.direction import Direction
from zotune.core.weights import Weights
from zotune.engines.batched_calls import Answer, Asked, Unsuited, repeat, unflatten
from zotune.engines.batched_layers import CopiedLinear, copied
from zotune.engines.batched_look import Body, watched_modules
from zotune.engines.batched_low_rank import Points
from zotune.engines.batched_modules import Wave
from zotune.engines.batched_sheets import FreshFactors
from zotune.engines.batched_size import copies_for


@dataclass(frozen=True)
class Shared:
    """What the body returned in one forward for several points, to the closure of one of them."""

    points: Sequence[Direction]
    copy: int  # whose turn it is
    leaves: list[Tensor]  # (copies * rows, ...)


class Served:
    """The body of a model, made to answer for several points in one forward."""

    def __init__(
        self,
        body: Body,
        weights: Weights,
        by_size: bool,
        unhooked: Callable[[], AbstractContextManager[None]],
        strange: Callable[[], bool],
    ) -> None:
        self.body = body
        self.by_size = by_size
        self.sure = False  # the answers have been compared with those of another engine
        self.broken = ""  # why it turned out that this body cannot be shared
        self.said = ""  # what became of the last wave
        self.moved_on = False  # the body was called in another way than when it was looked at
        self.together = 0  # points that shared a forward in this wave
        self._unhooked, self._strange = unhooked, strange
        self._wave = Wave(weights)
        self._points: Sequence[Direction] = ()
        self.check_forwards = 0  # spent on looking, since they were last counted
        self._taught = False  # how the modules take several copies
        self._alike: bool | None = None  # as many examples as tokens when the model was looked at
        self._watched: str | None = None  # why somebody would notice the copies
        self._now, self._called = 0, False
        self._first, self._last = 0, 0  # points first ... last - 1 have an answer
        self._answer: Answer | None = None
        self._asked: Asked | None = None
        self.copied = []
        for module in body.inside:
            found = {a: weights.by_tensor.get(id(p)) for a, p in module._parameters.items()}
            slots = {attribute: slot for attribute, slot in found.items() if slot is not None}
            if slots:
                self.copied.append(copied(module, slots, self._wave, body.rows.get(id(module), [])))
        self._matrices = [c for c in self.copied if isinstance(c, CopiedLinear)]
        sizes = [c.slots["weight"].tensor.numel() for c in self._matrices if "weight" in c.slots]
        self._wave.largest = max(sizes, default=0)

    # ------------------------------------------------------------------------------------------------------------------
    # A wave

    @contextmanager
    def serving(self, points: Sequence[Direction]) -> Iterator[None]:
        """The closure may be called for each point in turn, after `turn`."""

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self._forward(args, kwargs)

        self._points, self._last, self.together = points, 0, 0
        self.said, self.moved_on = "the body was not called", False
        self._watched = watched_modules(self.body.inside)
        vars(self.body.module)["forward"] = MethodType(forward, self.body.module)
        try:
            yield
        finally:
            vars(self.body.module).pop("forward", None)
            self._points, self._answer, self._asked = (), None, None
            self._wave.points, self._wave.low_rank = (), Points(())
            self._wave.fresh = FreshFactors(self._wave.low_rank)
            self._wave.columns.clear()

    def turn(self, number: int) -> None:
        """The closure is about to be called for this point."""
        self._now, self._called = number, False
        if number >= self._last:
            self._answer = self._asked = None

    @property
    def shared(self) -> Shared | None:
        """What the present point's closure gets its share of."""
        if self._answer is None:
            return None
        points = self._points[self._first : self._last]
        return Shared(points, self._now - self._first, [x for x in self._answer.leaves if isinstance(x, Tensor)])

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The body's forward: a share of the recording, a new recording, or as always (layer by layer)."""
        try:
            return self._share(args, kwargs)
        except Unsuited as error:
            self.said = str(error)
            return self.body.plain(*args, **kwargs)

    def _share(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again, self._called = self._called, True
        if self.broken or self._watched:
            raise Unsuited(self.broken or f"not batched: {self._watched}")
        if again:
            raise Unsuited("not batched: the closure calls the body twice")
        if torch.is_grad_enabled():
            raise Unsuited("not batched: the closure builds a graph")
        leaves, spec = self.body.arguments(args, kwargs)
        if self._answer is None or self._asked is None:
            self._record(leaves, spec)
        elif not self._asked.again(leaves, spec):
            raise Unsuited("not batched: the body gets other inputs from point to point")
        assert self._answer is not None
        return self._answer.part(self._now - self._first)

    # ------------------------------------------------------------------------------------------------------------------
    # A forward for several points

    def _record(self, leaves: list[Any], spec: TreeSpec) -> None:
        """Run the body for as many of the waiting points as its size allows."""
        sizes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
        known = spec == self.body.spec and [s is None for s in sizes] == [s is None for s in self.body.sizes]
        if not known or self._strange():
            self.moved_on = not known
            raise Unsuited("not batched: the model runs in another way than when it was looked at")
        rows, tokens = _rows(leaves, self.body.batched)
        self._prepare(self._points)
        low_rank = all(matrix.low_rank for matrix in self._matrices if True in matrix.moved.get("weight", ()))
        count = copies_for(tokens, len(self._points) - self._now, low_rank, self.by_size)
        if count == 1 and not low_rank:
            raise Unsuited(
                self.said if self._now else f"layer by layer, one point at a time: {tokens} tokens fill a forward"
            )
        if (not self._taught and sizes != self.body.sizes) or self._alike not in (None, rows == tokens):
            self.moved_on = True  # with one token in each example, rows of examples and of tokens look alike
            raise Unsuited("not batched: the model was looked at with a batch of another size")
        self._alike = rows == tokens
        try:
            if not self._taught:
                self._learn(leaves, spec, rows, tokens)
            self._answer = self._run(leaves, spec, range(self._now, self._now + count), rows, tokens)
        except Unsuited as error:
            self._doubt(str(error))
        except Exception as error:
            if self.sure:
                raise
            self._doubt(f"with several copies it raises {type(error).__name__} ({error})")
        self._asked = Asked.of(leaves, spec)
        self._first, self._last = self._now, self._now + count
        self.together = max(self.together, count)
        plural = "s" if count > 1 else ""
        self.said = f"{count} point{plural} in one forward of {type(self.body.module).__name__}, {tokens} tokens each"

    def _doubt(self, why: str) -> None:
        why = f"not batched: {type(self.body.module).__name__}: {why}"
        if not self.sure:
            self.broken = why
        raise Unsuited(why)

    def _prepare(self, points: Sequence[Direction]) -> None:
        """Once a wave: which points move which tensors, and how?"""
        if self._wave.points is not points:
            self._wave.points, self._wave.low_rank = points, Points(points)
            self._wave.fresh = FreshFactors(self._wave.low_rank)
            some = next(iter(self._wave.weights)).site
            self._wave.everywhere = all(point.uniform and point.touches(some) for point in points)
            for each in self.copied:
                each.prepare()

    def _learn(self, leaves: list[Any], spec: TreeSpec, rows: int, tokens: int) -> None:
        """Run two copies of the same point, once: which inputs have rows of every copy, and which layers share one?"""
        self._prepare([self._points[self._now]] * 2)
        self._wave.looking = True
        try:
            self._run(leaves, spec, range(2), rows, tokens)
        finally:
            self._wave.looking = False
        self._check_calls()
        self._prepare(self._points)
        self._taught, self.check_forwards = True, 2

    def _run(self, leaves: list[Any], spec: TreeSpec, numbers: range, rows: int, tokens: int) -> Answer:
        """Run the body for the points of these numbers."""
        wave, copies = self._wave, len(numbers)
        wave.first, wave.last = numbers.start, numbers.stop
        wave.sizes = {"examples": rows, "tokens": tokens}
        args, kwargs = unflatten(repeat(leaves, self.body.batched, rows, copies), spec)
        with self._unhooked(), self._replaced(), self._nothing_drawn():
            output = self.body.plain(*args, **kwargs)
        return Answer.of(output, rows, copies)

    @contextmanager
    def _nothing_drawn(self) -> Iterator[None]:
        """Copies would get masks of their own (dropout whose rate is 0 no longer, say): all points must see the same ones."""
        devices = self._wave.weights.devices
        before = random_state(devices)
        yield
        if not all(map(torch.equal, before, random_state(devices))):
            put_back(before, devices)
            why = "it draws random numbers (dropout), and all points must see the same ones"
            self.broken = f"not batched: {type(self.body.module).__name__}: {why}"
            raise Unsuited(why)

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """The trained modules of the body answer for several copies inside the block."""
        before = [(each.module, vars(each.module).get("forward")) for each in self.copied]  # a form, layer by layer
        try:
            for each in self.copied:
                each.ready()
            for each in self.copied:
                vars(each.module)["forward"] = each
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward
            for each in self.copied:
                each.done()
            self._wave.forget()

    def _check_calls(self) -> None:
        """Every module must have run as often as for one copy."""
        for each in self.copied:
            if each.ran != len(each.seen):
                name = type(each.module).__name__
                raise Unsuited(
                    f"{name} is called {each.ran} times for several copies and {len(each.seen)} times for one"
                )


def _rows(leaves: list[Any], batched: Sequence[bool]) -> tuple[int, int]:
    """Examples in a batch, and tokens: examples times positions."""
    tensors = [leaf for leaf, has_rows in zip(leaves, batched, strict=True) if has_rows]
    rows = max(int(tensor.shape[0]) for tensor in tensors)
    if any(tensor.shape[0] not in (1, rows) for tensor in tensors):
        raise Unsuited("not batched: its inputs have different numbers of rows")
    first = tensors[0]
    return rows, first.numel() // (first.shape[-1] if first.is_floating_point() else 1) if first.numel() else 0
