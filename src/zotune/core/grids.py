"""Grids coarse enough that sums of products of what lies on them are exact fp64 numbers, in any order."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zotune.errors import ConfigError

MAX_RANK = 1 << 11  # 2 * 21 bits of two factors and 11 bits of a sum fill fp64's 53
SMALLEST = 2.0**-100  # numbers below it are on no grid: its units would leave fp32's exponents


@lru_cache(maxsize=MAX_RANK)
def grid_bits(rank: int) -> int:
    """Bits that each of two factors may have, so that a sum of `rank` products is exact in fp64 (and a factor in fp32)."""
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"The rank must be between 1 and {MAX_RANK}; got {rank}.")
    return min(24, (53 - math.ceil(math.log2(rank))) // 2)


def on_grid(values: Tensor, rank: int) -> Tensor:
    """Values rounded to multiples of 2**-bits of the power of two above the largest: (any shape), fp64 on the CPU.

    A relative change of the largest values of at most 2**-22, as of fp32 numbers.
    """
    values = values.detach().to("cpu", torch.float64)
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return values
    unit = ceiling_of(largest) * 2.0 ** -grid_bits(rank)
    return torch.round(values / unit) * unit


def ceiling_of(largest: float) -> float:
    """The power of two above a positive number."""
    return 2.0 ** math.frexp(largest)[1]


def on_grids(many: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[float]]:
    """`on_grid` of many fp32 tensors at once, in fp32 (the same numbers: all that happens is scaled by powers of two).

    Returns:
        The rounded tensors, and for each a power of two above its numbers (0 for a tensor of zeros).
    """
    if not many:
        return [], []
    many = list(many)
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(many))).tolist()
    ceilings = [ceiling_of(value) if value and math.isfinite(value) else 0.0 for value in largest]
    units = [max(ceiling, SMALLEST) * 2.0 ** -grid_bits(rank) for ceiling in ceilings]
    made = torch._foreach_mul(many, [1.0 / unit for unit in units])
    torch._foreach_round_(made)
    torch._foreach_mul_(made, units)
    return list(made), ceilings
