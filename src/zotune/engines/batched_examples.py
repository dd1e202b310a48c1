"""Directions that differ from example to example, for all examples in one forward (Flipout).

For z_i = u * (r_i s_i^T) a linear layer computes x_i (W + eps z_i)^T = x_i W^T + ((x_i * s_i) (eps u)^T) * r_i: one product
more for all examples and both sides of a pair, with one draw of u. Rows of embeddings and elements of norms get their
signs directly (`engines.batched_example_layers`). The body of the model runs for all points together where it can be
shared (`engines.batched_look`), what lies behind it once per point; a model without such a body runs once per point.

Rows must belong to examples, in their order: as many rows for each example, or as many tokens. What cannot be told is
an error that names the module. The first answers are compared with those of single examples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.direction import Direction
from zotune.core.signed import for_example
from zotune.core.step import Closure
from zotune.core.weights import Slot, Weights
from zotune.engines.batched_calls import Answer, Unsuited
from zotune.engines.batched_example_layers import ExampleCopied, ExampleWave, for_examples
from zotune.engines.batched_look import Body, Watch, find_body
from zotune.engines.batched_modules import Wave
from zotune.engines.batched_serving import Served
from zotune.engines.check import refuse_different_losses
from zotune.engines.examples import Noted, check_count
from zotune.engines.hooks import Hooks
from zotune.engines.layerwise import Layerwise
from zotune.engines.query import ask
from zotune.errors import EngineError

ADVICE = "Use engine='in_place', which runs once for each example, or a method without directions of examples."


class ServedExamples(Served):
    """The body of a model, made to answer for the examples of several points in one forward."""

    def __init__(self, body: Body, weights: Weights, by_size: bool, group: int) -> None:
        super().__init__(body, weights, by_size, nullcontext, bool)
        self.group = group  # rows of an example
        self.sizes: dict[str, int] = {}  # rows of one point
        self.wave = ExampleWave(weights, whole=self._wave)
        self.copied = [for_examples(each.module, each.slots, self.wave, each.seen) for each in self.copied]
        self._matrices = []  # no dense matrix of a point is ever made

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._share(args, kwargs)
        except Unsuited as error:
            raise EngineError(f"The examples cannot be answered for in one forward: {error}. {ADVICE}") from error

    def _prepare(self, points: Sequence[Direction]) -> None:
        self._wave.points = points  # the modules are told in `_run`, where the number of examples is known

    def _run(self, leaves: list[Any], spec: Any, numbers: range, rows: int, tokens: int) -> Answer:
        self.sizes = {"examples": rows, "tokens": tokens}
        self.wave.begin(self._wave.points, numbers, rows // self.group, self.sizes, self._wave.looking)
        for each in self.copied:
            each.prepare()
        return super()._run(leaves, spec, numbers, rows, tokens)


class ExampleRows:
    """Answers for `engine` when it is asked for losses of examples."""

    def __init__(self, engine: Layerwise, by_size: bool) -> None:
        self.engine = engine
        self.by_size = by_size
        self.served: ServedExamples | None = None
        self._why = ""  # there is no body
        self._behind: list[ExampleCopied] = []  # modules outside the body
        self._wave = ExampleWave(engine.weights, whole=Wave(engine.weights))
        self._inside: set[int] = set()  # modules that answer for examples, by id
        self._ran_in: list[tuple[nn.Module, bool]] | None = None  # modes of the modules when they were looked at
        self._examples = 0  # of the batch that is asked for
        self._sure = False

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Layerwise.example_losses`: (len(points), B)."""
        noted = Noted(closure)
        again = self.engine._is_time() and self.engine._has_loss(noted, seed)
        if again or self._ran_in is None or any(module.training is not mode for module, mode in self._ran_in):
            self._look(points, noted, seed)
        try:
            answers = self._answers(points, noted, seed)
        except EngineError:
            if self.served is None or not self.served.moved_on:
                raise
            self._look(points, noted, seed)
            answers = self._answers(points, noted, seed)
        if not self._sure and self.engine.compares:
            self._compare(answers, points, noted, seed)
        self._sure = True
        self.engine.reason = self._say()
        return answers

    def _say(self) -> str:
        text = f"one forward a point: {self._why}" if self.served is None else self.served.said
        everywhere = self._behind + ([] if self.served is None else self.served.copied)
        slow = sorted({type(each.module).__name__ for each in everywhere if each.way == "copies"})
        return text + (f"; example by example in {', '.join(slow)}" if slow else "")

    def _answers(self, points: Sequence[Direction], noted: Noted, seed: int) -> Tensor:
        found = []
        with self._guarded(), self.served.serving(points) if self.served is not None else nullcontext():
            for number, point in enumerate(points):
                if self.served is not None:
                    self.served.turn(number)
                with self._replaced(point):
                    ask(noted, self.engine.weights, seed)
                expected = self.served.wave.examples if self.served is not None else self._examples
                check_count(len(noted.last), expected)
                found.append(noted.last)
        if self.served is not None:
            self.engine.check_forwards += self.served.check_forwards
            self.served.check_forwards = 0
        return torch.stack(found)

    def _compare(self, answers: Tensor, points: Sequence[Direction], noted: Noted, seed: int) -> None:
        """The first and the last example's losses must be those of a forward at their own point."""
        for number in {0, answers.shape[1] - 1}:
            expected = []
            for point in points:
                Layerwise._wave(self.engine, [for_example(point, number)], noted, seed)
                expected.append(float(noted.last[number]))
            self.engine.check_forwards += len(points)
            refuse_different_losses(answers[:, number].tolist(), expected, self.engine.weights)

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the model

    def _look(self, points: Sequence[Direction], noted: Noted, seed: int) -> None:
        """Which modules hold trained tensors, and which part can run for several points at once?"""
        engine, self._ran_in, self.served, self._sure = self.engine, None, None, False
        moving = next((for_example(point, 0) for point in points if engine._moves(point)), None)
        engine._look(moving, noted, seed)
        if engine.direct:
            names = ", ".join(sorted(engine.direct)[:3])
            raise EngineError(f"{len(engine.direct)} tensors are read outside their module ({names}). {ADVICE}")
        before = [(module, module.training) for module, _ in engine._modes.values()]
        watch = Watch(engine.weights.devices)
        with watch.watching():
            ask(noted, engine.weights, seed)
        engine.check_forwards += 1
        self._examples = len(noted.last)
        try:
            body = find_body(watch.calls, engine.weights)
            rows = next(size[0] for size, own in zip(body.sizes, body.batched, strict=True) if own and size)
            if rows % self._examples:
                raise Unsuited(f"{type(body.module).__name__} gets {rows} rows for {self._examples} examples")
            self.served = ServedExamples(body, engine.weights, self.by_size, rows // self._examples)
        except Unsuited as error:
            self._why = str(error)
        self._find_behind()
        self._ran_in = before

    def _find_behind(self) -> None:
        inside = set() if self.served is None else {id(each.module) for each in self.served.copied}
        slots: dict[int, tuple[nn.Module, dict[str, Slot]]] = {}
        for module, slot in self.engine._owned.values():
            if id(module) not in inside:
                attribute = next(a for a, p in module._parameters.items() if p is slot.tensor)
                slots.setdefault(id(module), (module, {}))[1][attribute] = slot
        self._inside = inside | set(slots)
        self._behind = [
            for_examples(module, found, self._wave, [])
            for module, found in slots.values()
            if not self._only_holds(module, found)
        ]

    def _only_holds(self, module: nn.Module, slots: dict[str, Slot]) -> bool:
        """Whether a module merely holds tensors of its submodules under another name, as BERT's output layer does."""
        inner = [child for child in module.modules() if child is not module and id(child) in self._inside]
        below = {id(p) for child in inner for p in child._parameters.values()}
        if inner and any(id(slot.tensor) not in below for slot in slots.values()):
            raise EngineError(f"{type(module).__name__} holds trained tensors beside trained modules. {ADVICE}")
        return bool(inner)

    # ------------------------------------------------------------------------------------------------------------------
    # Behind the body, or without one

    @contextmanager
    def _replaced(self, point: Direction) -> Iterator[None]:
        """The modules outside the body answer for the examples of one point inside the block."""
        for each in self._behind:
            if "forward" in vars(each.module):
                raise EngineError(f"The forward of {type(each.module).__name__} is replaced by somebody else. {ADVICE}")
        began = False

        def answer(each: ExampleCopied, *args: Any, **kwargs: Any) -> Any:
            nonlocal began
            if not began:
                self._begin(point)
                began = True
            try:
                return each.outside(*args, **kwargs)
            except Unsuited as error:
                raise EngineError(f"Rows cannot be told to examples: {error}. {ADVICE}") from error

        try:
            for each in self._behind:
                vars(each.module)["forward"] = lambda *args, each=each, **kwargs: answer(each, *args, **kwargs)
            yield
        finally:
            for each in self._behind:
                vars(each.module).pop("forward", None)
                each.done()
            self._wave.forget()

    def _begin(self, point: Direction) -> None:
        examples, sizes = self._examples, {"examples": self._examples}
        if self.served is not None:
            examples, sizes = self.served.wave.examples, self.served.sizes
        self._wave.begin([point], range(1), examples, sizes, False)
        for each in self._behind:
            each.prepare()
            each.ready()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A module with trained tensors that was not there when the model was looked at would stay where it is."""

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in self._inside:
                return
            if any(id(p) in self.engine.weights.by_tensor for p in module._parameters.values()):
                self._ran_in = None  # look again
                raise EngineError(
                    f"{type(module).__name__} was not called when the model was looked at, and holds trained tensors. "
                    "All steps must take the same path through the model."
                )

        hook = Hooks(enter)
        try:
            yield
        finally:
            hook.remove()
