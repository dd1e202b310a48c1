"""Which numbers to compute with, and why."""

from dataclasses import dataclass

import torch

from zotune.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Dtype of the weights, dtype of the forward's matrix products if another, and the reason in words."""

    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ConfigError("The device 'meta' holds no numbers, so nothing can be computed on it. Name cpu or cuda.")
    return device


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(ask is not None and ask() and fast is not None and fast())


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of a run.

    Args:
        name: a key of `zotune.runs.config.PRECISIONS`.
        device: where the model runs.

    On a CPU with bf16 products, bf16 forwards of SmolLM2-135M take about a third of the time of fp32 ones at 16 x 64
    tokens (docs/speed_16x64.json). With fp32 weights under autocast the projected gradient at eps 1e-3 is off by about a third
    of its size, less than half of what bf16 weights make of it (docs/rounding.json).
    """
    if name == "autocast":
        return Precision(torch.float32, torch.bfloat16, "fp32 weights, forwards under bf16 autocast (given)")
    if name in _DTYPES:
        return Precision(_DTYPES[name], None, f"{name} weights and forwards (given)")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return Precision(
                torch.bfloat16, None, "bf16 weights with carried bits: the memory of bf16 inference and a half"
            )
        return Precision(torch.float32, None, "fp32: this GPU has no bf16")
    if native_bf16():
        why = "fp32 weights, forwards under bf16 autocast: this CPU has bf16 products, about 3 times as fast"
        return Precision(torch.float32, torch.bfloat16, why)
    return Precision(torch.float32, None, "fp32: this CPU has no bf16 products")
