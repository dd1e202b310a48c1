"""Swapping perturbed scratch tensors into modules while they run: the hooks of the layerwise engine.

Just before a module runs, its trained parameters are replaced by scratch that holds the perturbed values; just after, they
are put back. Large embeddings and output layers get another forward (`engines.forms`) for as long as a point is asked for.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from zotune.core.direction import HERE, Direction
from zotune.core.site import Site
from zotune.core.weights import Slot, Weights
from zotune.engines.audit import ReadAudit, memory_of
from zotune.engines.forms import MIN_NUMEL, Form
from zotune.engines.forward_mode import dual
from zotune.engines.hooks import Hooks
from zotune.engines.in_place import InPlace
from zotune.engines.scratch import Scratch
from zotune.kernels.workspace import workspace

IN_CACHE = 1 << 20  # elements of a piece on the CPU: written and multiplied before it leaves the cache
COMPILED = "the model is compiled, so all tensors are perturbed in place: hooks would be compiled into it"
THREADS = "trained modules run in several threads, so all tensors are perturbed in place"
Replaced = list[tuple[str, nn.Parameter, Tensor]]  # attribute, parameter, scratch


class Swapping:
    """Which point modules see, and how it gets into them."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.in_place = InPlace(weights, "for tensors that are read outside their module")
        self.direct: set[str] = set()  # sites that hooks do not reach: perturbed in place
        self._forms: list[tuple[nn.Module, Slot, Form]] = []
        self._formed: dict[int, tuple[nn.Module, Slot]] = {}  # by module: whose forward is replaced for this point
        self._modes: dict[int, tuple[nn.Module, set[bool]]] = {}  # train, eval or both: how a module was looked at
        self._strange = False  # a module ran in a mode in which it was not looked at
        self._hookless = ""  # why there are no hooks, and all tensors are perturbed in place
        self._point: Direction = HERE
        self._only: Collection[str] | None = None
        self._tangents = False  # the point is not a displacement but the tangent of the current weights
        self._audit: ReadAudit | None = None
        self._running: list[tuple[nn.Module, Replaced]] = []
        self._hooks: Hooks | None = None
        self._met: set[str] = set()  # names of what the modules that ran hold
        self._scratch = Scratch()
        # a form is a forward, which may get compiled; dynamo's noise differs
        self._fill_piece = torch.compiler.disable(self._fill)  # type: ignore[no-untyped-call]

    @contextmanager
    def at(self, point: Direction, only: Collection[str] | None = None) -> Iterator[None]:
        """Modules called inside the block see the perturbed weights."""
        if not self._moves(point):
            yield
            return
        direct = self.direct if only is None else self.direct.intersection(only)
        swapped = nullcontext() if self._hookless else self._swapped(point, only)
        with self.in_place.at(point, direct) if direct else nullcontext(), swapped:
            yield

    @contextmanager
    def along(self, direction: Direction) -> Iterator[None]:
        """Inside a dual level: modules called inside the block see the current weights, with the direction as tangent."""
        self._tangents = True
        try:
            swapped = nullcontext() if self._hookless else self._swapped(direction, None)
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
                self.weights.finish()

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
        return Hooks(enter, self._leave, always=True, elsewhere=self._elsewhere)

    def _unregister(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    def _elsewhere(self, module: nn.Module, args: Any = ()) -> None:
        """A module runs in another thread. If it holds trained tensors, the closure may be spread over threads."""
        if any(id(parameter) in self.weights.by_tensor for parameter in module._parameters.values()):
            self._hookless, self._strange = THREADS, True

    def _enter(self, module: nn.Module, args: Any = ()) -> None:
        if torch.compiler.is_compiling():  # the closure itself is compiled, and this hook with it: look again
            self._hookless, self._strange = COMPILED, True
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
