"""Sums of numbers and of their squares in one fixed order, so that no thread, device or instruction set is seen.

Numbers are taken in pieces of PIECE, rows of 64 below each other. In a piece neighbouring rows are added, then neighbouring
sums of two, and so on; then the left half of the last row and its right half. What a short piece lacks counts as 0.
"""

import torch
from torch import Tensor

PIECE = 1 << 15
ROW = 64


def piece_sums(values: Tensor, pivot: float) -> Tensor:
    """(ceil(n / PIECE), 2) fp64: for each piece the sum of x - pivot and that of its square.

    Args:
        values: (n,) fp32 or fp64, contiguous.
        pivot: near the numbers, so that squares do not cancel.
    """
    x = values.to(torch.float64) - pivot
    x = torch.nn.functional.pad(x, (0, -len(x) % PIECE)).view(-1, PIECE // ROW, ROW)
    return torch.stack((_tree(x), _tree(x.square())), dim=1)


def _tree(x: Tensor) -> Tensor:
    """(pieces, rows, columns) -> (pieces,)."""
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    row = x[:, 0]
    while row.shape[1] > 1:
        half = row.shape[1] // 2
        row = row[:, :half] + row[:, half:]
    return row[:, 0]
