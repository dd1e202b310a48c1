"""One query: run the closure at some weights under common random numbers and read one number."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.core.common_random import common_random_numbers
from zotune.core.step import Closure
from zotune.core.weights import Weights
from zotune.errors import ClosureError

# What torch and Python raise where tensors have other shapes or histories than the closure counts on. What the user's own code
# raises to stop a run is something else, and goes through at once.
AMISS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError)


def ask(closure: Closure, weights: Weights, seed: int) -> Any:
    """The closure's loss at the weights as they are now: a Python float, or a 0-d float64 tensor on a GPU. No graph is built.

    The host does not wait for a GPU here: the forward passes of a wave are queued one after the other.

    Raises:
        ClosureError: the closure returned nothing, several elements, or something that is not a number.
    """
    # Under an autocast block around the step, torch keeps casts of weights that require grad; a changed weight would be
    # answered from the stale cast, and the two sides of a pair would agree exactly.
    torch.clear_autocast_cache()
    with torch.no_grad(), common_random_numbers(seed, weights.devices), _no_backward():
        answer = closure()
    torch.clear_autocast_cache()
    if isinstance(answer, Tensor) and answer.device.type != "cpu" and answer.numel() == 1:
        return answer.detach().to(torch.float64, copy=True).reshape(())  # a captured graph writes to one place always
    return as_number(answer)


BACKWARD = (
    "The closure calls backward() or torch.autograd.grad. ZO needs the loss alone, from one forward pass: leave out backward() "
    "and zero_grad(). (If the loss is made of derivatives: compute them inside `with torch.enable_grad():`. A Lightning module "
    "with automatic optimization: override its `backward` to do nothing.)"
)
_NO_GRAPH = ("does not require grad and does not have a grad_fn", "backward through the graph a second time")


@contextmanager
def _no_backward() -> Iterator[None]:
    """What torch says of a backward pass without a graph, in words that help."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_GRAPH):
            raise ClosureError(BACKWARD) from error
        raise


def ask_first(closure: Closure, weights: Weights, seed: int) -> None:
    """One forward at the current weights, before any perturbation.

    Raises:
        ClosureError: the loss is not a number, or the closure left gradients behind.
    """
    before = [slot.tensor.grad for slot in weights]
    check_here(float(ask(closure, weights, seed)))
    if any(slot.tensor.grad is not None and old is None for slot, old in zip(weights, before, strict=True)):
        for slot, old in zip(weights, before, strict=True):
            slot.tensor.grad = old
        raise ClosureError(BACKWARD)


def as_number(answer: Any) -> float:
    """One number from what a closure returned."""
    if isinstance(answer, np.ndarray) and answer.size == 1:
        answer = answer.item()
    if isinstance(answer, complex) or (isinstance(answer, Tensor) and answer.is_complex()):
        raise ClosureError("The closure returned a complex number; a loss is real: take its .real or .abs().")
    if isinstance(answer, Tensor):
        if answer.numel() != 1:
            raise ClosureError(
                f"The closure returned a tensor of shape {tuple(answer.shape)}; one number is needed. "
                "Reduce it, for example with .mean()."
            )
        return float(answer.detach().double().item())
    if isinstance(answer, bool) or not isinstance(answer, Real):
        raise ClosureError(
            f"The closure returned {type(answer).__name__}; a loss is needed, as a 0-d tensor or a float. "
            "Does it end with `return loss`?"
        )
    return float(answer)


def check_here(loss: float) -> None:
    """The loss at the unperturbed weights must be a number, or nothing can be learned."""
    if not math.isfinite(loss):
        raise ClosureError(
            f"The loss at the current weights is {loss}, before any perturbation. Check the data (empty labels?), and the "
            "precision of the forward pass: fp16 overflows where bf16 and fp32 do not."
        )
