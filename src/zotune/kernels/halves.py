"""Splitting fp32 numbers into a 16-bit float and 16 carried bits, and back: `core.weights` says what for.

bf16:  fp32 bits = stored bits * 2**16 + carried          exactly every fp32 number
fp16:  value     = stored + carried * ulp(stored) / 2**16  every fp32 number above 2**-13, 2**-40 absolute below
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from zotune.kernels.workspace import workspace


def _split_bf16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    bits = values.view(torch.int32)
    # The nearest bf16, halves away from zero: then what is left of the bits is their low half, as a signed number.
    high = workspace("bits", bits.numel(), torch.int32, bits.device).view(bits.shape)
    torch.add(bits, 0x8000, out=high).bitwise_right_shift_(16)
    stored.view(torch.int16).copy_(high)
    carried.copy_(bits)  # keeps the low 16 bits


def _join_bf16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    bits = workspace("bits", carried.numel(), torch.int32, carried.device).view(carried.shape)
    values.view(torch.int32).add_(bits.copy_(carried))


@lru_cache(maxsize=8)
def _fp16_units(device: torch.device) -> Tensor:
    """ulp / 2**16 of an fp16 number by its exponent field; the field 0 (subnormal) has the ulp of field 1."""
    exponent = torch.arange(32).clamp(min=1)
    return torch.ldexp(torch.ones(32), exponent - 25 - 16).to(device)


def _fp16_unit(stored: Tensor) -> Tensor:
    field = (stored.view(torch.int16).to(torch.int32) >> 10) & 31
    return _fp16_units(stored.device)[field]


def _split_fp16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    stored.copy_(values)
    rest = (values - stored.to(torch.float32)) / _fp16_unit(stored)  # exact: a power of two
    carried.copy_(rest.round().clamp(-32768, 32767))


def _join_fp16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    rest = carried.to(torch.float32) * _fp16_unit(stored)
    values.add_(rest.masked_fill_(carried == 0, -0.0))  # adding 0.0 would turn -0.0 into 0.0; -0.0 changes nothing


Halves = Callable[[Tensor, Tensor, Tensor], None]  # (values, stored, carried), all of one shape
SPLIT: dict[torch.dtype, Halves] = {torch.bfloat16: _split_bf16, torch.float16: _split_fp16}  # writes the last two
JOIN: dict[torch.dtype, Halves] = {torch.bfloat16: _join_bf16, torch.float16: _join_fp16}  # completes widened values
