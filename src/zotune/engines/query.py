"""One query: run the closure at some weights under common random numbers and read one number."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zotune.core.common_random import common_random_numbers
from zotune.core.errors import ClosureError
from zotune.core.step import Closure
from zotune.core.weights import Weights


def ask(closure: Closure, weights: Weights, seed: int) -> Any:
    """The closure's loss at the weights as they are now: a Python float, or a 0-d float64 tensor on a GPU. No graph is built.

    The host does not wait for a GPU here: the forward passes of a wave are queued one after the other.

    Raises:
        ClosureError: the closure returned nothing, several elements, or something that is not a number.
    """
    # Under an autocast block around the step, torch keeps casts of weights that require grad; a changed weight would be
    # answered from the stale cast, and the two sides of a pair would agree exactly.
    torch.clear_autocast_cache()
    with torch.no_grad(), common_random_numbers(seed, weights.devices):
        answer = closure()
    torch.clear_autocast_cache()
    if isinstance(answer, Tensor) and answer.device.type != "cpu" and answer.numel() == 1:
        return answer.detach().to(torch.float64, copy=True).reshape(())  # a captured graph writes to one place always
    return as_number(answer)


def as_number(answer: Any) -> float:
    """One number from what a closure returned."""
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
