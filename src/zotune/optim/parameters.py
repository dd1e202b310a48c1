"""What may be handed to ZO, what is refused before any work starts, and what the parameter groups say."""

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zotune.core.noise import check_kind
from zotune.core.registry import check_name
from zotune.core.site import canonical_name
from zotune.core.weights import STORAGES
from zotune.engines import CHOICES
from zotune.errors import ConfigError, ParameterError

HYPERPARAMETERS = ("lr", "eps", "weight_decay")
TRAINABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rounding noise of the slope over the slope is about this constant over eps. Measured elsewhere for bf16 forwards of
# SmolLM2-135M on text: 3.8 % at eps 1e-2, 36 % at 1e-3, 335 % at 1e-4 (benchmarks/rounding.py, on random tokens, finds up
# to three times as much). fp16 rounds 2**3 times finer, fp32 2**16 times.
SLOPE_NOISE = {torch.bfloat16: 3.6e-4, torch.float16: 3.6e-4 / 2**3, torch.float32: 3.6e-4 / 2**16, torch.float64: 0.0}


def named_groups(params: Any) -> list[dict[str, Any]]:
    """Parameter groups of (canonical name, tensor) pairs that require grad.

    Args:
        params: tensors, (name, tensor) pairs, or dicts with "params" holding either.

    Raises:
        ParameterError: nothing trainable, or a tensor that cannot be perturbed.
    """
    if isinstance(params, torch.nn.Module):
        raise ParameterError("ZO takes parameters, not a module: pass model.named_parameters().")
    if isinstance(params, Tensor):
        raise ParameterError("ZO takes an iterable of tensors, got one tensor: wrap it in a list.")
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    made, frozen = [], 0
    for number, group in enumerate(groups):
        given = group["params"]
        pairs = list(_pairs([given] if isinstance(given, Tensor) else given, f"group{number}." if number else ""))
        kept = [(canonical_name(name), tensor) for name, tensor in pairs if tensor.requires_grad]
        frozen += len(pairs) - len(kept)
        for name, tensor in kept:
            _check(name, tensor)
        if kept:
            made.append({**group, "params": kept})
    if not made:
        raise ParameterError(
            f"No trainable parameters: got {frozen} tensors, none with requires_grad. "
            "Set requires_grad_(True) on what should be trained, or attach an adapter."
        )
    return made


def _pairs(given: Iterable[Any], prefix: str) -> Iterable[tuple[str, Tensor]]:
    for index, item in enumerate(given):
        name, tensor = item if isinstance(item, tuple) else (f"{prefix}param{index}", item)
        if not isinstance(tensor, Tensor):
            raise ParameterError(f"Parameters must be tensors or (name, tensor) pairs; got {type(tensor).__name__}.")
        yield name, tensor


def _check(name: str, tensor: Tensor) -> None:
    if type(tensor.data) is not Tensor:
        raise ParameterError(
            f"{name} is a {type(tensor.data).__name__}, a packed or sharded tensor that cannot be perturbed in place. "
            "Train an adapter (LoRA, prefix) or the norms and biases beside it."
        )
    if tensor.is_meta:
        raise ParameterError(f"{name} is on the meta device: it has no values. Load the model onto a device first.")
    if tensor.dtype not in TRAINABLE:
        raise ParameterError(
            f"{name} has dtype {tensor.dtype}; trainable are fp32, fp64, bf16 and fp16. Packed (quantised) weights cannot "
            "be perturbed: train an adapter (LoRA, prefix) or the norms and biases beside them."
        )


def default_eps(tensors: Iterable[Tensor]) -> float:
    """1e-3, as MeZO's for full tuning; 1e-2 if a tensor is bf16, whose forward drowns smaller differences."""
    return 1e-2 if any(tensor.dtype == torch.bfloat16 for tensor in tensors) else 1e-3


def warn_small_eps(tensors: Iterable[Tensor], eps: float) -> None:
    """Warn with a number if rounding drowns the slope."""
    noise, dtype = max((SLOPE_NOISE[t.dtype] / eps, str(t.dtype)) for t in tensors)
    if noise > 0.5:
        warnings.warn(
            f"eps={eps:g} is small for {dtype} weights: rounding noise of the projected gradient is about {noise:.0%} of it "
            "(measured on SmolLM2-135M). Use eps=1e-2, or keep the weights in fp32.",
            stacklevel=4,
        )


def whole(name: str, given: Any) -> int:
    """A whole number that was given for the setting `name`; a ConfigError if it is none."""
    try:
        return operator.index(given)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number; got {given!r}.") from None


def check_hyperparameters(groups: Iterable[dict[str, Any]]) -> None:
    """Raise a ConfigError if a group's lr, eps or weight decay is out of range."""
    checks: list[tuple[str, Callable[[float], bool], str]] = [
        ("lr", lambda v: v >= 0, "at least 0; 1e-7 to 1e-5 is usual for full tuning, 1e-5 to 1e-3 for LoRA"),
        ("eps", lambda v: v > 0, "positive; 1e-3 to 1e-2 is usual for weights of scale 0.02 to 0.2"),
        ("weight_decay", lambda v: v >= 0, "at least 0"),
    ]
    for group in groups:
        for key, good, needed in checks:
            given = group[key]
            number = isinstance(given, Real) or (isinstance(given, Tensor) and given.numel() == 1)
            if not (number and math.isfinite(float(given)) and good(float(given))):
                raise ConfigError(f"{key} must be {needed}; got {given!r}.")


def check_choices(noise: str, low_precision: str, engine: str) -> None:
    """Raise a ConfigError for a name that is not known: where settings are read, long before a `ZO` is made of them."""
    check_kind(noise)
    check_name("low_precision", low_precision, STORAGES)
    check_name("engine", engine, CHOICES)


def hyperparameters_of(groups: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """What a ledger says of each group."""
    return [{key: float(group[key]) for key in HYPERPARAMETERS} for group in groups]


def eps_factors(groups: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Groups with their own eps: the direction is scaled on their tensors."""
    eps = float(groups[0]["eps"])
    if all(float(group["eps"]) == eps for group in groups):
        return None
    return {name: float(group["eps"]) / eps for group in groups for name in group["param_names"]}
