"""The layerwise engine: stored weights are never written during a query.

Just before a module runs, its trained parameters are replaced by scratch tensors that hold the perturbed values; just
after, the parameters are put back. One module's scratch exists at a time, so a query needs little more memory than a
forward pass, and there is nothing to restore. Vocabulary-sized embeddings and output layers are done in pieces
(`engines.forms`).

Hooks see only what a module reads of itself. The first forward runs at the current weights and finds out which modules
own trained tensors; the first query runs under an audit (`engines.audit`), and tensors that something else reads as
well (a functional call, a penalty on the weights in the closure, nn.MultiheadAttention's output layer) are perturbed in
place from then on. `reason` says what was found.

A compiled model is perturbed in place altogether: hooks would be compiled into it, and the noise that they draw.

A slope (`engines.forward_mode`) is asked for in the same way, with dual tensors in the place of scratch.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from zotune.core.context import as_losses
from zotune.core.direction import Direction, Scalar
from zotune.core.site import Site
from zotune.core.step import Closure
from zotune.core.weights import Slot, Weights
from zotune.engines.audit import ReadAudit
from zotune.engines.check import compare_engines
from zotune.engines.examples import one_by_one
from zotune.engines.forms import form_for
from zotune.engines.forward_mode import ask_slope, check_slope, probe_scale
from zotune.engines.in_place import refuse_standing_still
from zotune.engines.query import AMISS, ask, ask_first
from zotune.engines.swapping import COMPILED, Swapping
from zotune.errors import EngineError, ZotuneError

# Waves before which the model is looked at anew, up to ten forwards each time: what a closure reads may change.
LOOKS = frozenset(8**k for k in range(2, 12))
Answer = TypeVar("Answer")


class Layerwise(Swapping):
    """Swaps perturbed scratch tensors into each module for the length of its forward."""

    name: ClassVar[str] = "layerwise"
    offers: ClassVar[frozenset[str]] = frozenset({"slope", "examples"})
    extra_memory: ClassVar[str] = "scratch for one module during a query"

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.reason = "not looked at the model yet"
        self.check_forwards = 0  # forwards spent on checking, beside those that the method asks for
        self.compares = True  # whether the first query is compared with the in-place engine's: for smooth losses
        self._owned: dict[tuple[int, int], tuple[nn.Module, Slot]] = {}  # by module and parameter, from all looks
        self._owners: set[str] | None = None  # names of what is owned; None: look again before the next query
        self._leaks: set[str] = set()
        self._unread: set[str] = set()
        self._tried: set[str] = set()  # tensors that hooks reached, as in place, when that was last compared
        self._slope_checked = False
        self._waves = 0  # answered; see LOOKS

    # ------------------------------------------------------------------------------------------------------------------
    # Answering

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Engine.losses`."""
        if not all(point.uniform and self._moves(point) for point in points):
            self.weights.settle()  # else every tensor is read through `Weights`, which writes late updates on the way
        moving = next((point for point in points if self._moves(point)), None)
        self._look_if_due(moving, closure, seed)
        answers = self._wave(points, closure, seed)
        if self._strange:  # in eval mode some modules read other tensors (the fast path of nn.TransformerEncoderLayer)
            self.check_forwards += len(answers)
            self._look(moving, closure, seed)
            answers = self._wave(points, closure, seed)
        refuse_standing_still(answers, points, self._unread, self.weights)
        return as_losses(answers)

    def slope(self, direction: Direction, closure: Closure, seed: int) -> tuple[float, float]:
        """The loss at the current weights and its derivative along a direction."""
        self.weights.settle()
        near = probe_scale(self.weights) * direction
        moving = near if self._moves(near) else None
        self._look_if_due(moving, closure, seed)
        query = partial(ask_slope, self, direction, closure, seed)
        answer = self._watched(query)
        if self._strange:
            self.check_forwards += 1
            self._look(moving, closure, seed)
            answer = self._watched(query)
        if not self._slope_checked:
            check_slope(self, direction, closure, seed, answer[1])
            self._slope_checked = True
        return answer

    def example_losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """The loss of each example at each point, by as many forwards as there are examples."""
        self.weights.settle()
        return one_by_one(self, points, closure, seed)

    def _wave(self, points: Sequence[Direction], closure: Closure, seed: int) -> list[float]:
        def loss(point: Direction) -> float:
            with self.at(point):
                return ask(closure, self.weights, seed)

        return [self._watched(partial(loss, point)) for point in points]

    def _watched(self, query: Callable[[], Answer]) -> Answer:
        self._met = set()
        answer = query()
        if not self._met <= (self._owners or set()):  # the closure took a new path through the model
            self._owners = None
        return answer

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the model

    def _look_if_due(self, point: Direction | None, closure: Closure, seed: int) -> None:
        if self._is_time() and point is not None and self._has_loss(closure, seed):
            self._look_again(point, closure, seed)
        elif self._owners is None:
            self._look(point, closure, seed)

    def _is_time(self) -> bool:
        """Whether the model is looked at anew before the wave that begins."""
        self._waves += 1
        return self._waves in LOOKS and not self._hookless

    def _has_loss(self, closure: Closure, seed: int) -> bool:
        """Whether there is anything to compare: not after a run has diverged, nor for a batch without labels."""
        self.check_forwards += 1
        return math.isfinite(ask(closure, self.weights, seed))

    def _look(self, point: Direction | None, closure: Closure, seed: int) -> None:
        try:
            self._survey(closure, seed)
            self._find_leaks(point, closure, seed)
        except BaseException:
            self._owners = None  # half a look would miss leaks: look again at the next query
            raise

    def _look_again(self, point: Direction, closure: Closure, seed: int) -> None:
        """What was true of the first query need not stay so: a penalty that begins later, another path for other batches."""
        self._slope_checked = False
        before = set(self.direct) if self._owners is not None else None
        self._look(point, closure, seed)
        late = set() if before is None else self.direct - before
        if late:
            warnings.warn(
                f"Since some query between the last two looks at the model {len(late)} tensors are read outside their modules "
                f"({_some(sorted(late))}): such reads saw them unperturbed. From now on they are perturbed in place; if this "
                "matters, start again with engine='in_place'.",
                stacklevel=2,
            )

    def _survey(self, closure: Closure, seed: int) -> None:
        """One forward at the current weights: is the loss a number, which modules own what, what is read at all?"""

        def look(module: nn.Module, args: Any = ()) -> None:
            if is_compiled(module):
                self._hookless = COMPILED
            self._modes.setdefault(id(module), (module, set()))[1].add(module.training)
            for parameter in module._parameters.values():
                slot = self.weights.by_tensor.get(id(parameter))
                if slot is not None:
                    self._owned[id(module), id(parameter)] = (module, slot)

        audit = ReadAudit(self.weights)
        with self._hooked(look), audit, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using .torch.compile", category=UserWarning)  # hooks fire twice
            ask_first(closure, self.weights, seed)
        self.check_forwards += 1
        if self._strange:
            self._strange, self._tried = False, set()  # in other modes, modules may do other things with their tensors
        self._owners = {slot.site.name for _, slot in self._owned.values()}
        self._unread = set(self.weights.slots) - audit.read
        self.direct = (set(self.weights.slots) - self._owners) | self._leaks
        if self._hookless:
            self.direct = set(self.weights.slots)
        self._forms = []
        for module, slot in self._owned.values():
            form = form_for(module, slot.site) if module._parameters.get("weight") is slot.tensor else None
            if form is not None:
                self._forms.append((module, slot, form))

    def _find_leaks(self, point: Direction | None, closure: Closure, seed: int) -> None:
        """One query under the audit: what still reads the stored tensors must be perturbed there. Then compare engines."""
        if point is None:
            self.reason = "only the current weights have been asked for"
            self._owners = None  # look again when there is something to perturb
            return
        hooked = set(self.weights.slots) - self.direct
        if hooked:
            self._audit = ReadAudit(self.weights.slots[name] for name in hooked)
            try:  # all tensors take part, also those that this point does not move
                with self.at(point + _Everywhere()), self._audit:
                    ask(closure, self.weights, seed)
                leaks = self._audit.read
            except AMISS as error:
                leaks, self._audit = set(self.weights.slots), None
                self._without_hooks(error, point, closure, seed)
            finally:
                self._audit = None
            self.check_forwards += 1
            if not self._hookless:
                self._leaks |= leaks
                self.direct |= leaks
            hooked -= leaks
        if hooked != self._tried:
            self._try_hooks(hooked, point, closure, seed)
        self.reason = self._hookless or _say(len(hooked), sorted(self.direct), sorted(self._unread))

    def _try_hooks(self, hooked: set[str], point: Direction, closure: Closure, seed: int) -> None:
        """Do they run outside the audit, and do they what they should? Code that was compiled before runs without them."""
        self._met = set()
        try:
            if self.compares:
                self.check_forwards += compare_engines(self, self.in_place, hooked, point, closure, seed)
            else:
                self.check_forwards += 1
                with self._hooked(self._enter):
                    ask(closure, self.weights, seed)
                if not hooked <= self._met:
                    self._hookless = COMPILED
        except EngineError:
            if hooked <= self._met and not self._hookless:
                raise
            self._hookless = self._hookless or COMPILED
        except AMISS as error:
            self._without_hooks(error, point, closure, seed)
        if self._hookless:
            self.direct, self._strange = set(self.weights.slots), False
        else:
            self._tried = hooked

    def _without_hooks(self, error: Exception, point: Direction, closure: Closure, seed: int) -> None:
        """The closure fails with other tensors in the place of parameters (it differentiates, say). Does it in place?

        Raises:
            Exception: what the closure raised, if it fails there too, or does not fail again with hooks.
        """
        if isinstance(error, ZotuneError):
            raise error
        try:
            with self.in_place.at(point, set(self.weights.slots)):
                ask(closure, self.weights, seed)
        except AMISS:
            raise error from None
        try:
            with self.at(point):
                ask(closure, self.weights, seed)
        except AMISS:
            self.check_forwards += 2
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
            why = f"with other tensors in the place of its parameters the closure fails ({what})"
            self._hookless = f"{why}, so all are perturbed in place"
            self.direct = set(self.weights.slots)
            return
        raise error


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, or this is what `torch.compile(module)` returns."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


class _Everywhere(Direction):
    """Zero that counts as moving every site."""

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """Nothing to add."""


def _say(hooked: int, direct: list[str], unread: list[str]) -> str:
    text = f"{hooked} tensors are reached by module hooks, so stored weights are not written during queries"
    if direct:
        text += f"; {len(direct)} are read outside their module and are perturbed in place ({_some(direct)})"
    if unread:
        text += f"; {len(unread)} were not seen to be read ({_some(unread)})"
    return text


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
