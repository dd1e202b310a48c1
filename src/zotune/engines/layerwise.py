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

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from zotune.core.context import as_losses
from zotune.core.direction import HERE, Direction, Scalar
from zotune.core.errors import EngineError
from zotune.core.site import Site
from zotune.core.step import Closure
from zotune.core.weights import Slot, Weights
from zotune.engines.audit import ReadAudit, memory_of
from zotune.engines.check import compare_engines
from zotune.engines.examples import one_by_one
from zotune.engines.forms import MIN_NUMEL, Form, form_for
from zotune.engines.forward_mode import ask_slope, check_slope, dual, probe_scale
from zotune.engines.in_place import InPlace, refuse_standing_still
from zotune.engines.query import ask, ask_first
from zotune.engines.scratch import Scratch
from zotune.kernels.workspace import workspace

COMPILED = "the model is compiled, so all tensors are perturbed in place: hooks would be compiled into it"
Answer = TypeVar("Answer")
IN_CACHE = 1 << 20  # elements of a piece on the CPU: written and multiplied before it leaves the cache
Replaced = list[tuple[str, nn.Parameter, Tensor]]  # attribute, parameter, scratch
Hooks = tuple[RemovableHandle, ...]


class Layerwise:
    """Swaps perturbed scratch tensors into each module for the length of its forward."""

    name: ClassVar[str] = "layerwise"
    offers: ClassVar[frozenset[str]] = frozenset({"slope", "examples"})
    extra_memory: ClassVar[str] = "scratch for one module during a query"

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.reason = "not looked at the model yet"
        self.check_forwards = 0  # forwards spent on checking, beside those that the method asks for
        self.compares = (
            True  # whether the first query is compared with the in-place engine's: for losses that are smooth
        )
        self.in_place = InPlace(weights, "for tensors that are read outside their module")
        self.direct: set[str] = set()  # sites that hooks do not reach: perturbed in place
        self._forms: list[tuple[nn.Module, Slot, Form]] = []
        self._formed: dict[int, tuple[nn.Module, Slot]] = {}  # by module: whose forward is replaced for this point
        self._owned: dict[tuple[int, int], tuple[nn.Module, Slot]] = {}  # by module and parameter, from all looks
        self._owners: set[str] | None = None  # names of what is owned; None: look again before the next query
        self._leaks: set[str] = set()
        self._modes: dict[int, tuple[nn.Module, set[bool]]] = {}  # train, eval or both: how a module was looked at
        self._strange = False  # a module ran in a mode in which it was not looked at
        self._compiled = False  # torch compiles something that was called: no hooks, all tensors are perturbed in place
        self._unread: set[str] = set()
        self._point: Direction = HERE
        self._only: Collection[str] | None = None
        self._tangents = False  # the point is not a displacement but the tangent of the current weights
        self._slope_checked = False
        self._audit: ReadAudit | None = None
        self._running: list[tuple[nn.Module, Replaced]] = []
        self._hooks: Hooks = ()
        self._met: set[str] = set()
        self._scratch = Scratch()
        # a form is a forward, which may get compiled; dynamo's noise differs
        self._fill_piece = torch.compiler.disable(self._fill)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------------------------------------------------
    # Answering

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """See `Engine.losses`."""
        moving = next((point for point in points if self._moves(point)), None)
        if self._owners is None:
            self._look(moving, closure, seed)
        answers = self._wave(points, closure, seed)
        if self._strange:  # in eval mode some modules read other tensors (the fast path of nn.TransformerEncoderLayer)
            self.check_forwards += len(answers)
            self._look(moving, closure, seed)
            answers = self._wave(points, closure, seed)
        refuse_standing_still(answers, points, self._unread, self.weights)
        return as_losses(answers)

    def slope(self, direction: Direction, closure: Closure, seed: int) -> tuple[float, float]:
        """The loss at the current weights and its derivative along a direction."""
        near = probe_scale(self.weights) * direction
        moving = near if self._moves(near) else None
        if self._owners is None:
            self._look(moving, closure, seed)
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

    @contextmanager
    def at(self, point: Direction, only: Collection[str] | None = None) -> Iterator[None]:
        """Modules called inside the block see the perturbed weights."""
        if not self._moves(point):
            yield
            return
        direct = self.direct if only is None else self.direct.intersection(only)
        swapped = nullcontext() if self._compiled else self._swapped(point, only)
        with self.in_place.at(point, direct) if direct else nullcontext(), swapped:
            yield

    @contextmanager
    def along(self, direction: Direction) -> Iterator[None]:
        """Inside a dual level: modules called inside the block see the current weights, with the direction as tangent."""
        self._tangents = True
        try:
            swapped = nullcontext() if self._compiled else self._swapped(direction, None)
            with self.in_place.along(direction, self.direct), swapped:
                yield
        finally:
            self._tangents = False

    @contextmanager
    def _swapped(self, point: Direction, only: Collection[str] | None) -> Iterator[None]:
        self._point, self._only = point, only
        with self._hooked(self._enter):
            try:
                self._install_forms()
                yield
            finally:
                for module, _ in self._formed.values():
                    vars(module).pop("forward", None)
                self._formed = {}
                for module, _ in reversed(self._running.copy()):  # only after an exception inside a hook
                    self._leave(module)
                self._running.clear()
                self._point, self._only = HERE, None

    def _moves(self, point: Direction) -> bool:
        return any(point.touches(slot.site) for slot in self.weights)

    # ------------------------------------------------------------------------------------------------------------------
    # Hooks

    @contextmanager
    def _hooked(self, enter: Callable[..., None]) -> Iterator[None]:
        self._hooks = self._register(enter)
        try:
            yield
        finally:
            self._unregister()

    def _register(self, enter: Callable[..., None]) -> Hooks:
        return (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(self._leave, always_call=True),
        )

    def _unregister(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def _enter(self, module: nn.Module, args: Any = ()) -> None:
        if torch.compiler.is_compiling():  # the closure itself is compiled, and this hook with it: look again
            self._compiled = self._strange = True
            return
        looked = self._modes.get(id(module))
        if looked is not None and module.training not in looked[1]:
            self._strange = True
        if not module._parameters:
            return
        replaced: Replaced = []
        self._running.append((module, replaced))
        for attribute, parameter in module._parameters.items():
            slot = self.weights.by_tensor.get(id(parameter))
            if slot is None or parameter is None:
                continue
            self._met.add(slot.site.name)
            if self._swaps(slot) and not self._has_form(module, slot):
                scratch = self._replacement(slot)
                module._parameters[attribute] = scratch  # type: ignore[assignment]
                replaced.append((attribute, parameter, scratch))

    def _leave(self, module: nn.Module, args: Any = (), output: Any = None) -> None:
        if not self._running or self._running[-1][0] is not module or torch.compiler.is_compiling():
            return
        _, replaced = self._running.pop()
        if not replaced:
            return
        outputs = (output,) if isinstance(output, Tensor) else tree_iter(output)
        kept = {memory_of(t) for t in outputs if isinstance(t, Tensor)}
        for attribute, parameter, scratch in replaced:
            module._parameters[attribute] = parameter
            if not self._tangents and memory_of(scratch) not in kept:  # a module may hand out its weight itself
                self._scratch.give(scratch)

    def _swaps(self, slot: Slot) -> bool:
        name = slot.site.name
        return name not in self.direct and (self._only is None or name in self._only) and self._point.touches(slot.site)

    def _replacement(self, slot: Slot) -> Tensor:
        if self._tangents:
            return dual(slot, slot.site, tuple(slot.tensor.shape), self._point)
        scratch = self._scratch.take(slot.tensor)
        self._fill(slot, slot.site, scratch)
        return scratch

    def _fill(self, slot: Slot, part: Site, out: Tensor) -> None:
        if self._audit is None and not torch.is_grad_enabled():
            self.weights.perturb(slot, part, self._point, out)
            return
        paused = self._audit.paused() if self._audit is not None else nullcontext()
        with torch.no_grad(), paused:  # the closure may have turned gradients on
            self.weights.perturb(slot, part, self._point, out)

    def _has_form(self, module: nn.Module, slot: Slot) -> bool:
        return id(module) in self._formed and self._formed[id(module)][1] is slot

    def _install_forms(self) -> None:
        for module, slot, form in self._forms:
            if not self._swaps(slot):
                continue
            limit = min(MIN_NUMEL, IN_CACHE) if slot.tensor.is_cpu else max(MIN_NUMEL, self.weights.numel // 100)

            def perturbed(part: Site, shape: tuple[int, ...], slot: Slot = slot) -> Tensor:
                if self._tangents:
                    return dual(slot, part, shape, self._point)
                out = workspace("piece", part.numel, slot.tensor.dtype, slot.tensor.device).view(shape)
                self._fill_piece(slot, part, out)
                return out

            def forward(
                module: nn.Module,
                input: Tensor,
                form: Form = form,
                slot: Slot = slot,
                perturbed: Any = perturbed,
                limit: int = limit,
            ) -> Tensor:
                return form(module, slot.site, perturbed, limit, input)

            self._replace_forward(module, slot, MethodType(forward, module))

    def _replace_forward(self, module: nn.Module, slot: Slot, forward: Callable[..., Any]) -> None:
        """Until the point is left; the module then reads the slot's stored tensor itself."""
        self._formed[id(module)] = (module, slot)
        vars(module)["forward"] = forward

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the model, once

    def _look(self, point: Direction | None, closure: Closure, seed: int) -> None:
        try:
            self._survey(closure, seed)
            self._find_leaks(point, closure, seed)
        except BaseException:
            self._owners = None  # half a look would miss leaks: look again at the next query
            raise

    def _survey(self, closure: Closure, seed: int) -> None:
        """One forward at the current weights: is the loss a number, which modules own what, what is read at all?"""

        def look(module: nn.Module, args: Any = ()) -> None:
            self._compiled |= is_compiled(module)
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
        self._strange = False
        self._owners = {slot.site.name for _, slot in self._owned.values()}
        self._unread = set(self.weights.slots) - audit.read
        self.direct = (set(self.weights.slots) - self._owners) | self._leaks
        if self._compiled:
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
            finally:
                leaks, self._audit = self._audit.read, None
            self.check_forwards += 1
            self._leaks |= leaks
            self.direct |= leaks
            hooked -= leaks
        if hooked:
            self._try_hooks(hooked, point, closure, seed)
        self.reason = COMPILED if self._compiled else _say(len(hooked), sorted(self.direct), sorted(self._unread))

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
                self._compiled |= not hooked <= self._met
        except EngineError:
            if hooked <= self._met and not self._compiled:
                raise
            self._compiled = True
        if self._compiled:
            self.direct, self._strange = set(self.weights.slots), False


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
