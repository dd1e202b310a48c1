"""Which part of a model can answer for several points in one forward? Found out from one call of the closure.

That part, the *body*, is the largest module that is called once, with one row per example in what it takes and returns.
In a language model it is the decoder without the output layer. Everything behind it (output layer, loss) runs as often
as the closure is called.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from zotune.core.weights import Weights
from zotune.engines.batched_calls import CACHE, SHARED, Shape, Unsuited, flatten, shapes_of
from zotune.engines.hooks import Hooks

WIDER = 2  # a linear layer at the end that gives this many times more than it takes is an output layer


@dataclass
class Call:
    """One call of one module: when, and shapes of what went in and came out."""

    module: nn.Module
    begin: int  # calls are numbered as they begin and end
    end: int
    inputs: list[Shape]
    outputs: list[Shape]
    spec: TreeSpec
    uncached: bool  # its key-value cache can be switched off
    reads_on: bool  # it was asked for its key-value cache
    random: bool  # drew random numbers
    writes: bool  # changed its own buffers


@dataclass
class Body:
    """The part of the model that runs once for several copies."""

    module: nn.Module
    spec: TreeSpec  # how its arguments are put together
    sizes: list[tuple[int, ...] | None]  # of the tensors among their leaves
    batched: tuple[bool, ...]  # which of the leaves have a row per example
    uncached: bool  # pass use_cache=False: nobody reads on after a loss
    rows: dict[int, list[int]]  # of the first tensor in each call of each module inside, by id
    inside: list[nn.Module] = field(default_factory=list)

    @property
    def plain(self) -> Any:
        """Its own forward."""
        return type(self.module).forward.__get__(self.module)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
        """The leaves of a call's arguments."""
        return flatten(args, kwargs | {"use_cache": False} if self.uncached else kwargs)


class Watch:
    """Notes every call of every module while the closure runs."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.calls: list[Call] = []
        self._cuda = [d for d in devices if d.type == "cuda"]
        self._open: list[tuple[nn.Module, int, int, int]] = []
        self._clock = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block."""
        hooks = Hooks(self._begin, self._end, with_kwargs=True)
        try:
            yield
        finally:
            hooks.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._clock += 1
        self._open.append((module, self._clock, self._randomness(), _writes(module)))

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        while self._open:  # a call that was cut short by an exception has no end
            began, begin, randomness, writes = self._open.pop()
            if began is module:
                break
        else:
            return
        self._clock += 1
        uncached, reads_on = _can_do_without_cache(module, args, kwargs), kwargs.get("use_cache") is True
        if uncached:
            kwargs = kwargs | {"use_cache": False}
        call = Call(
            module,
            begin,
            self._clock,
            shapes_of(args, kwargs),
            shapes_of(output, {}),
            flatten(args, kwargs)[1],
            uncached,
            reads_on,
            randomness != self._randomness(),
            writes != _writes(module),
        )
        self.calls.append(call)

    def _randomness(self) -> int:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]
        return hash(tuple(state.numpy().tobytes() for state in states))


def _writes(module: nn.Module) -> int:
    return sum(b._version for b in module._buffers.values() if b is not None and not b.is_inference())


def _can_do_without_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if use_cache=False can be given and only saves memory.

    transformers looks for several sequences packed into a row where there are position numbers and no cache.
    """
    try:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):  # a scripted module
        return False
    return "use_cache" in names and len(args) <= 1 and kwargs.get("position_ids") is None


# ----------------------------------------------------------------------------------------------------------------------
# Choosing


def find_body(calls: list[Call], weights: Weights) -> Body:
    """The largest module that several copies can share.

    Raises:
        Unsuited: there is none; the message is about the module that comes nearest.
    """
    sizes = {id(call.module): _trained(call.module, weights) for call in calls}
    holders = [call for call in calls if sizes[id(call.module)]]
    if not holders:
        raise Unsuited("no module that holds trained tensors was called")
    holders.sort(key=lambda call: (-sizes[id(call.module)], call.begin))
    nearest, why = -1, ""
    for call in holders:
        found = _unfit(call, calls, weights)
        if found is None:
            return _body(call, calls)
        bare = _own(call.module, weights) and why  # a single layer is no body, and that says nothing
        if sizes[id(call.module)] * 2 >= sizes[id(holders[0].module)] and call.begin > nearest and not bare:
            nearest, why = call.begin, f"{type(call.module).__name__}: {found}"
    raise Unsuited(why)


def _trained(module: nn.Module, weights: Weights) -> int:
    return sum(p.numel() for p in module.parameters() if id(p) in weights.by_tensor)


def _own(module: nn.Module, weights: Weights) -> bool:
    return any(id(p) in weights.by_tensor for p in module._parameters.values())


def _unfit(call: Call, calls: list[Call], weights: Weights) -> str | None:
    """Why a module cannot be the body; None if it can."""
    inner = [other for other in calls if call.begin < other.begin and other.end < call.end]
    checks = (
        _own(call.module, weights) and "it holds trained tensors itself",
        sum(other.module is call.module for other in calls) > 1 and "it is called more than once",
        _unfit_shapes(call),
        _is_head(call, inner) and "it ends in an output layer",
        call.reads_on and "it is asked for its key-value cache",
        call.random and "it draws random numbers (dropout), and all points must see the same ones",
        any(other.writes for other in [call, *inner]) and "it keeps statistics of its batches",
        any(o.end < call.begin and _own(o.module, weights) for o in calls) and "trained modules run before it",
        watched_modules(call.module.modules()),
        _unfit_modules(call.module, weights),
    )
    return next((why for why in checks if why), None)


def _unfit_shapes(call: Call) -> str | None:
    for leaf in call.inputs:
        if leaf.size is None and not leaf.constant:
            return f"it takes a {leaf.kind}" + (f" ({leaf.name})" if leaf.name else "")
    for leaf in call.outputs:
        if leaf.size is None and not leaf.constant and CACHE not in leaf.kind:
            return f"it returns a {leaf.kind}"
    sizes = [leaf.size for leaf in call.outputs if leaf.size is not None]
    rows = sizes[0][0] if sizes and sizes[0] else None
    taken = any(s.size and s.size[0] == rows and s.name not in SHARED for s in call.inputs)
    if rows is None or not taken or any(not size or size[0] != rows for size in sizes):
        return "what it takes and returns has not one row per example"
    return None


def _is_head(call: Call, inner: list[Call]) -> bool:
    """Logits of all copies together would be the memory; and an output layer is done in pieces better than in copies."""
    linear = [other for other in [*inner, call] if isinstance(other.module, nn.Linear)]
    if not linear:
        return False
    last = max(linear, key=lambda other: other.end)
    assert isinstance(last.module, nn.Linear)
    widths = {leaf.size[-1] for leaf in call.outputs if leaf.size}
    return last.module.out_features > WIDER * last.module.in_features and last.module.out_features in widths


def watched_modules(modules: Iterable[nn.Module]) -> str | None:
    """Why somebody would see several copies who expects one; looked at again before each wave."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"hooks are registered on {type(module).__name__}"
        if module._compiled_call_impl is not None or "forward" in vars(module):
            return f"the forward of {type(module).__name__} is replaced or compiled"
    return None


def _unfit_modules(body: nn.Module, weights: Weights) -> str | None:
    for module in body.modules():
        if not module._modules or not _own(module, weights):
            continue
        if any(_trained(child, weights) for child in module.children()):
            return f"{type(module).__name__} holds trained tensors beside trained modules"
    return None


def _body(call: Call, calls: list[Call]) -> Body:
    rows = next(leaf.size[0] for leaf in call.outputs if leaf.size)
    batched = tuple(bool(s.size) and s.size[0] == rows and s.name not in SHARED for s in call.inputs)  # type: ignore[index]
    seen: dict[int, list[int]] = {}
    for other in sorted(calls, key=lambda other: other.begin):
        if call.begin < other.begin and other.end < call.end:
            first = next((s.size[0] for s in other.inputs if s.size), -1)
            seen.setdefault(id(other.module), []).append(first)
    sizes = [s.size for s in call.inputs]
    return Body(call.module, call.spec, sizes, batched, call.uncached, seen, list(call.module.modules()))
