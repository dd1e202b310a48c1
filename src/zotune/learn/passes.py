"""Backward passes of which one number per tensor is kept.

As soon as a tensor's gradient is complete it is multiplied with the replayed direction, summed, and freed: of all
gradients only the largest lives at a time, beside what flows between layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from zotune.core.common_random import common_random_numbers
from zotune.core.direction import Direction
from zotune.core.noise import CHUNK
from zotune.core.weights import Slot, Weights
from zotune.tasks.encoding import Encoded
from zotune.tasks.module_modes import has_prefix, passing_back
from zotune.tasks.objectives import Objective

Backward = Callable[[], float]  # passes forward and backward over one batch and returns its loss


def backward_of(objective: Objective, batch: Sequence[Encoded], micro_batch: int | None) -> Backward:
    """A function that adds the gradient of the batch's loss to `.grad`, a part of the batch at a time."""
    size = micro_batch or len(batch)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    weights = [objective.weight(part) for part in parts]

    def backward() -> float:
        total = 0.0
        for part, weight in zip(parts, weights, strict=True):
            loss = objective.loss(part) * (weight / sum(weights))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    return backward


def slopes(weights: Weights, backward: Backward, seed: int, u: Direction) -> Tensor:
    """(n,) fp64: <u_i, grad_i L> at the weights as they are; every gradient is freed at once."""
    found = {slot.site.name: 0.0 for slot in weights}

    def read(slot: Slot, gradient: Tensor) -> bool:
        found[slot.site.name] += along(slot, gradient, u)
        return False

    run(weights, backward, seed, read)
    return torch.tensor(list(found.values()), dtype=torch.float64)


def run(weights: Weights, backward: Backward, seed: int, read: Callable[[Slot, Tensor], bool]) -> float:
    """Pass forward and backward once and return the loss.

    Args:
        weights: the trained tensors.
        backward: passes over a batch.
        seed: of dropout; global generators are put back.
        read: is given each tensor's gradient when it is complete, in micro-batches once for each; says whether to keep it.
            It may change the tensor: nothing later in the pass reads it.
    """

    def hook(slot: Slot) -> Callable[[Tensor], None]:
        def complete(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                if not read(slot, parameter.grad):
                    parameter.grad = None

        return complete

    with ExitStack() as stack:
        for slot in weights:
            handle = slot.tensor.register_post_accumulate_grad_hook(hook(slot))  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(common_random_numbers(seed, weights.devices))
        return backward()


def along(slot: Slot, gradient: Tensor, u: Direction) -> float:
    """<u_i, gradient>, in chunks of the replayed direction; products in fp32 or better, their sum in fp64."""
    if not u.touches(slot.site):
        return 0.0
    flat = gradient.reshape(-1)
    kind = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    total = 0.0
    for offset, part in slot.site.chunks(CHUNK):
        made = u.realise(part, kind, gradient.device).view(-1)
        total += float((made * flat[offset : offset + part.count].to(kind)).sum(dtype=torch.float64))
    return total


def energy(gradient: Tensor) -> float:
    """Squared norm, summed in fp64."""
    kind = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    flat = gradient.reshape(-1)
    return sum(
        float(flat[start : start + CHUNK].to(kind).square().sum(dtype=torch.float64))
        for start in range(0, flat.numel(), CHUNK)
    )


def has_dropout(model: Any) -> bool:
    """Whether any dropout of the model is on: modules with p > 0, or a rate in its configuration."""
    if any("Dropout" in type(module).__name__ and getattr(module, "p", 0.0) > 0 for module in model.modules()):
        return True
    settings = vars(getattr(model, "config", None) or object).items()
    return any(
        ("drop" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
        for name, value in settings
    )


@contextmanager
def graph_mode(model: Any, *, dropout: bool, checkpointing: bool) -> Iterator[None]:
    """Dropout on or off, layers checkpointed if wanted; each module's own mode back afterwards.

    Transformers checkpoint in train mode alone, so that is the mode without dropout too, if the model has none; if it has,
    passes without dropout keep their activations. So do all with a prefix: layers that run again would read its keys twice.
    """
    train = dropout or not has_dropout(model)
    with passing_back(model, train=train, checkpointing=checkpointing and train and not has_prefix(model)):
        yield
