"""The batched engine: both signs of a pair, and several directions, in one forward with as many copies of the batch.

A closure returns one number, so copies cannot be told apart behind the loss. Therefore the *body* of the model (see
`engines.batched_look`) is recorded and served: the closure is called once for each point, as always; when it first calls
the body, the body runs for several points together, and the closure gets the first point's share of what comes out; the
closure's next calls get the other shares, if they ask the body the same. What lies behind the body runs once per point,
layer by layer; large output layers for all points at once, if few rows are asked for (`engines.batched_ahead`). Attention,
norms and activations are shared by the copies; a pair's matrices are made from one draw of noise; low-rank points of not
too many rows need no perturbed matrix at all.

Where this cannot be done, the wave or the call is answered layer by layer, and `reason` says why. "auto" also chooses by
size: many tokens fill the machine as they are, and copies would only hold more activations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.direction import Direction
from zotune.core.step import Closure
from zotune.core.weights import Slot, Weights
from zotune.engines.batched_ahead import AheadOfTime
from zotune.engines.batched_calls import Unsuited
from zotune.engines.batched_examples import ExampleRows
from zotune.engines.batched_look import Watch, find_body
from zotune.engines.batched_low_rank import Points, ThinProducts, thin_terms
from zotune.engines.batched_serving import Served
from zotune.engines.check import refuse_different_losses
from zotune.engines.layerwise import Layerwise
from zotune.engines.query import AMISS, ask
from zotune.errors import EngineError, ZotuneError

FAR = 1000.0  # times a point: a displacement that changes what a model computes altogether


class Batched(Layerwise):
    """Several points in one forward of the model's body; layer by layer where that cannot be."""

    name: ClassVar[str] = "batched"
    extra_memory: ClassVar[str] = (
        "activations of the points that share a forward, scratch for two modules during a query"
    )
    by_size: ClassVar[bool] = False  # whether to batch is decided by the size of the batch

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.served: Served | None = None
        self._searched = False  # for a body
        self._found = self.reason  # what hooks reach
        self._ran_in: list[tuple[nn.Module, bool]] = []  # modules, and their modes before the search
        self._sides: dict[int, ThinProducts] = {}  # of low-rank points behind the body, by module
        self._examples = ExampleRows(self, self.by_size)
        self._ahead = AheadOfTime(weights)
        self._own_forwards = False  # inside a wave in which layers behind the body have forwards of their own

    # ------------------------------------------------------------------------------------------------------------------
    # Answering

    def example_losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """The loss of each example at each point, with one more product in each layer for all of them."""
        self.weights.settle()
        return self._examples.losses(points, closure, seed)

    def _wave(self, points: Sequence[Direction], closure: Closure, seed: int) -> list[float]:
        if not any(self._moves(point) for point in points):
            return super()._wave(points, closure, seed)
        answers = self._shared_wave(points, closure, seed)
        if self.served is not None and self.served.moved_on:  # look at the model as it runs now, and ask again
            self.check_forwards += len(answers)
            self._searched = False
            answers = self._shared_wave(points, closure, seed)
        if self.served is not None:
            self._say(self.served.said)
        return answers

    def _shared_wave(self, points: Sequence[Direction], closure: Closure, seed: int) -> list[float]:
        if not self._searched or any(module.training is not mode for module, mode in self._ran_in):
            self._search(closure, seed)
        if self.served is None or self.served.broken:
            return super()._wave(points, closure, seed)
        served = self.served
        try:
            answers = self._served_wave(served, points, closure, seed)
        except AMISS as error:
            if served.sure or not served.together or isinstance(error, ZotuneError):
                raise
            answers = self._without_copies(error, served, points, closure, seed)
        self.check_forwards += served.check_forwards
        served.check_forwards = 0
        if served.together and not served.sure and not served.broken and not self._strange:
            return self._compare(served, answers, points, closure, seed)
        return answers

    def _served_wave(self, served: Served, points: Sequence[Direction], closure: Closure, seed: int) -> list[float]:
        answers: list[float] = []
        with served.serving(points), self._behind_the_body():
            for number, point in enumerate(points):
                served.turn(number)
                answers += super()._wave([point], closure, seed)
        return answers

    def _without_copies(
        self, error: Exception, served: Served, points: Sequence[Direction], closure: Closure, seed: int
    ) -> list[float]:
        """The closure failed with its share of several copies. If that is why, the answers without.

        Raises:
            Exception: `error`, or what the closure raises without copies.
        """
        answers = super()._wave(points, closure, seed)
        try:
            self._served_wave(served, points, closure, seed)
        except AMISS:
            self.check_forwards += 2 * len(points)
            served.broken = f"not batched: with several copies the closure raises {type(error).__name__} ({error})"
            served.said = served.broken
            return answers
        raise error

    def _compare(
        self, served: Served, answers: list[float], points: Sequence[Direction], closure: Closure, seed: int
    ) -> list[float]:
        """The first batched answers against those layer by layer. Returns the ones that hold."""
        if self.compares:
            expected = super()._wave(points, closure, seed)
            self.check_forwards += len(points)
            try:
                refuse_different_losses(answers, expected, self.weights)
                self._refuse_mixing(served, expected, points, closure, seed)
            except EngineError as error:
                if not self.by_size:
                    raise
                served.broken = f"not batched: {error}"
                served.said = served.broken
                return expected
        served.sure = True
        return answers

    def _refuse_mixing(
        self, served: Served, expected: list[float], points: Sequence[Direction], closure: Closure, seed: int
    ) -> None:
        """A point's answer must not depend on the copy beside it: here that one is far away.

        Neighbours differ so little that rows which mix (statistics of the batch, numbers kept beside the output) hide in
        the rounding of their losses, and yet spoil the slope.
        """
        number = next(k for k, point in enumerate(points) if self._moves(point))
        said, together = served.said, served.together
        with served.serving([points[number], FAR * points[number]]), self._behind_the_body():
            served.turn(0)
            answer = super()._wave([points[number]], closure, seed)
        mixed, served.said, served.together = served.together > 1, said, together
        self.check_forwards += 1
        if mixed:
            near = [expected[number], *expected]  # the spread of the losses, as where they were compared
            refuse_different_losses([*answer, *expected], near, self.weights)

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the model

    def _look(self, point: Direction | None, closure: Closure, seed: int) -> None:
        super()._look(point, closure, seed)
        self._searched, self._found = False, self.reason

    def _search(self, closure: Closure, seed: int) -> None:
        """One forward at the current weights: which part of the model can answer for several points?"""
        self.served, self._ran_in = None, []
        try:
            if self.direct:
                raise Unsuited("tensors are read outside their module")
            watch = Watch(self.weights.devices)
            before = {id(module): module.training for module, _ in self._modes.values()}
            with watch.watching():
                ask(closure, self.weights, seed)
            self.check_forwards += 1
            self._ran_in = [(module, before[id(module)]) for module, _ in self._modes.values()]
            body = find_body(watch.calls, self.weights)
            self.served = Served(body, self.weights, self.by_size, self._unhooked, self._in_another_mode)
        except Unsuited as error:
            self._say(f"not batched: {error}")
        self._searched = True

    def _say(self, text: str) -> None:
        self.reason = f"{text}; {self._found}"

    def _in_another_mode(self) -> bool:
        """Hooks are off inside the body: whether its modules run in modes that were looked at is asked before."""
        called = () if self.served is None else self.served.body.rows
        for number in called:
            module, modes = self._modes.get(number, (None, ()))
            if module is not None and module.training not in modes:
                self._strange = True
        return self._strange

    @contextmanager
    def _unhooked(self) -> Iterator[None]:
        """Nothing is swapped inside the block."""
        hooked = self._hooks is not None
        self._unregister()
        try:
            yield
        finally:
            if hooked:
                self._hooks = self._register(self._enter)

    # ------------------------------------------------------------------------------------------------------------------
    # Output layers behind the body

    @contextmanager
    def _behind_the_body(self) -> Iterator[None]:
        self._own_forwards = True
        try:
            yield
        finally:
            self._own_forwards = False
            self._ahead.forget()

    def _install_forms(self) -> None:
        super()._install_forms()
        if not self._own_forwards or self.served is None:
            return
        inside = {id(module) for module in self.served.body.inside}
        for module, slot in self._owned.values():
            if id(module) in inside or type(module) is not nn.Linear or module._parameters["weight"] is not slot.tensor:
                continue
            if not self._swaps(slot) or ("forward" in vars(module) and id(module) not in self._formed):
                continue
            thin = thin_terms(Points([self._point]), slot.site, transposed=False)
            if thin is not None:
                sides = self._sides.setdefault(id(module), ThinProducts())
                sides.ready(thin, 0, 1, slot.tensor, {})
                self._replace_forward(module, slot, MethodType(_thin_forward(sides), module))
            if id(module) in self._formed:
                self._replace_forward(module, slot, self._ahead_of_time(module, slot, vars(module)["forward"]))

    def _ahead_of_time(self, layer: nn.Linear, slot: Slot, alone: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        """A forward that answers for all points of the body's forward, where that can be."""

        def forward(input: Tensor) -> Tensor:
            shared = None if self.served is None else self.served.shared
            made = self._ahead.output(layer, slot, input, shared)
            return alone(input) if made is None else made

        return torch.compiler.disable(forward)  # type: ignore[no-untyped-call]


def _thin_forward(sides: ThinProducts) -> Callable[[nn.Linear, Tensor], Tensor]:
    def forward(module: nn.Linear, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        made = F.linear(rows, module.weight, module.bias)
        sides.add(made, rows)
        return made.view(*input.shape[:-1], made.shape[-1])

    return forward


class Auto(Batched):
    """Batched where that costs less, else layer by layer: decided by the size of the batch, never by a clock."""

    name: ClassVar[str] = "auto"
    by_size: ClassVar[bool] = True
