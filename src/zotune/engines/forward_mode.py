"""Forward-mode differentiation: the loss at the current weights and its exact derivative along a direction, in one pass.

Inside `torch.autograd.forward_ad.dual_level` a tensor may carry a tangent; every operation passes on value and tangent
together. Weights get the direction's values as tangents, and the tangent of the loss is grad L . z. No graph is built, so
activations are freed as in any forward pass. A weight that hooks reach is replaced by a dual tensor over the same memory
for the length of its module's forward; any other stored tensor is given its tangent where it is, by copying a dual tensor
of its own values into it: the bits stay, and torch drops the tangent when the level ends.

Fused kernels have no forward-mode formulas: attention runs as plain matrix products, and nn.TransformerEncoderLayer does not
take its fast path, for the length of the query.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.core.common_random import common_random_numbers
from zotune.core.direction import Direction
from zotune.core.noise import CHUNK
from zotune.core.site import Site
from zotune.core.step import Closure
from zotune.core.weights import LOW_PRECISION, Slot, Weights
from zotune.engines.audit import ReadAudit
from zotune.engines.query import as_number, ask
from zotune.errors import ClosureError, EngineError
from zotune.kernels.workspace import workspace

_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
ADVICE = (
    "Forward-mode differentiation needs a closure that computes the loss by differentiable operations and returns the "
    "loss tensor itself: no .item(), float(), .detach(), .data or torch.inference_mode() on the way. Methods such as "
    "'mezo' ask for losses only and take any closure."
)
FAR_OFF = 0.1  # share by which a slope may differ from central differences that agree among themselves


class Differentiating(Protocol):
    """An engine that can give its weights tangents."""

    weights: Weights
    check_forwards: int

    def at(self, point: Direction, only: Collection[str] | None = None) -> AbstractContextManager[None]:
        """The closure sees the perturbed weights inside the block."""
        ...

    def along(self, direction: Direction) -> AbstractContextManager[None]:
        """Inside the block, and inside a dual level, the closure sees the current weights with the direction as tangent."""
        ...


def probe_scale(weights: Weights) -> float:
    """How far to look along a standard normal direction when a slope is checked: about the usual eps."""
    return 2.0**-7 if any(slot.tensor.dtype in LOW_PRECISION for slot in weights) else 2.0**-10


def dual(slot: Slot, part: Site, shape: tuple[int, ...], direction: Direction) -> Tensor:
    """The stored values of a part of a weight, with the direction's values as tangent. Only a slice of a tensor is copied."""
    values = slot.stored(part).detach().view(shape)
    if values.untyped_storage().nbytes() > values.nbytes:
        values = values.clone()  # torch would make a tangent as large as the storage that the slice lies in
    return _make_dual(values, _tangent(part, values, direction))


def attach(slot: Slot, direction: Direction) -> None:
    """Give a stored tensor its tangent until the dual level ends. Its own values are written over themselves."""
    slot.tensor.copy_(dual(slot, slot.site, tuple(slot.tensor.shape), direction))


def _tangent(part: Site, values: Tensor, direction: Direction) -> Tensor:
    """The direction on a part, rounded to the weight's dtype: a tangent has the dtype of its value."""
    out = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
    if values.dtype not in LOW_PRECISION:
        direction.add_to(out, part)
        return out
    for offset, piece in part.chunks(CHUNK):
        wide = workspace("tangent", piece.numel, torch.float32, values.device).zero_()
        direction.add_to(wide, piece)
        out.view(-1)[offset : offset + piece.numel].copy_(wide)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Asking


def ask_slope(engine: Differentiating, direction: Direction, closure: Closure, seed: int) -> tuple[float, float]:
    """The loss at the current weights and its derivative along a direction, under the same random numbers as other queries.

    Raises:
        ClosureError: the closure does not return a loss that was differentiated.
        EngineError: torch has no forward-mode formula for an operation of the model.
    """
    torch.clear_autocast_cache()  # see `engines.query.ask`
    try:
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            _plain_kernels(),
            common_random_numbers(seed, engine.weights.devices),
            engine.along(direction),
        ):
            answer = closure()
            loss, derivative = as_number(answer), _derivative(answer)
    except RuntimeError as error:  # NotImplementedError is one
        if not isinstance(error, ClosureError) and _is_about_forward_mode(error):
            raise _explained(error) from error
        raise
    finally:
        torch.clear_autocast_cache()
    if derivative is None and not math.isfinite(loss):
        derivative = math.nan  # no number, no slope: the step is refused as with any other method
    if derivative is None:
        _refuse_lost_tangent(engine, direction, closure, seed)
        derivative = 0.0  # the loss does not depend on the tensors that the direction moves
    return loss, derivative


def _derivative(answer: Any) -> float | None:
    """The tangent of what a closure returned, if it has one."""
    if not isinstance(answer, Tensor):
        raise ClosureError(f"The closure returned a {type(answer).__name__}, which carries no derivative. {ADVICE}")
    tangent = forward_ad.unpack_dual(answer).tangent  # type: ignore[no-untyped-call]
    return None if tangent is None else float(tangent.detach().double().item())


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention by matrix products and encoder layers operation by operation: the fused ones have no forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _is_about_forward_mode(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(words in text for words in ("forward ad", "forward mode ad", "forward-mode"))


def _explained(error: RuntimeError) -> EngineError:
    return EngineError(
        f"torch cannot differentiate this forward pass in forward mode: {str(error).splitlines()[0]} What helps: attention by "
        "attn_implementation='sdpa' or 'eager', with no kernel selected in the closure; nn.LSTM and nn.GRU under `with "
        "torch.backends.mkldnn.flags(enabled=False)` (on CUDA torch.backends.cudnn) in the closure; a `jvp` for a custom "
        "autograd.Function; or a method that asks for losses only, such as 'mezo'."
    )


def _refuse_lost_tangent(engine: Differentiating, direction: Direction, closure: Closure, seed: int) -> None:
    """A loss without tangent is right only if the closure reads nothing that the direction moves: look."""
    audit = ReadAudit(engine.weights)
    with audit:
        ask(closure, engine.weights, seed)
    engine.check_forwards += 1
    moved = sorted(name for name in audit.read if direction.touches(engine.weights.slots[name].site))
    if moved:
        raise ClosureError(
            f"The loss carries no derivative, though the closure reads {len(moved)} of the tensors that the direction moves "
            f"({', '.join(moved[:3])}). {ADVICE}"
        )
    if not audit.read:
        raise ClosureError(
            f"The closure reads none of the {len(engine.weights.slots)} trained tensors: its slope is 0 along any direction. "
            "Does it run the model whose parameters were given to ZO?"
        )


def check_slope(engine: Differentiating, direction: Direction, closure: Closure, seed: int, slope: float) -> None:
    """Compare with central differences, once: warn if those of four widths agree with each other and not with the slope.

    Parts of a forward pass can lose their tangents without an error: reentrant checkpointing, `.data`, a `.detach()`. Most
    models are through after two widths; the others tell rounding noise (a bf16 forward) from a slope that is not the loss's.
    """
    scale = probe_scale(engine.weights)
    unit = max(torch.finfo(slot.tensor.dtype).eps for slot in engine.weights)
    found: list[float] = []
    for width in (scale, scale / 2, 2 * scale, 4 * scale):
        plus, minus = (_loss_at(engine, by * direction, closure, seed) for by in (width, -width))
        engine.check_forwards += 2
        found.append((plus - minus) / (2 * width))
        allowed = FAR_OFF * abs(found[-1]) + 10 * (max(found) - min(found)) + 8 * unit * abs(plus) / scale
        if len(found) > 1 and not abs(slope - found[-1]) > allowed:  # numbers that are not finite say nothing
            return
    differences = ", ".join(f"{value:.6g}" for value in found)
    warnings.warn(
        f"Forward mode gives the slope {slope:.6g} where central differences give {differences}: a part of the forward pass "
        "seems to lose its tangents (reentrant gradient checkpointing, .data, .detach(), a step function). Training would "
        f"follow another gradient than the loss's. {ADVICE}",
        stacklevel=2,
    )


def _loss_at(engine: Differentiating, point: Direction, closure: Closure, seed: int) -> float:
    with engine.at(point):
        return ask(closure, engine.weights, seed)
