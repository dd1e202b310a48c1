"""Low-rank products of the compiled kernels: one call where thin products of torch cost several times their arithmetic."""

import struct
from typing import Any

import torch
from torch import Tensor

from zotune.kernels.native_packing import threads_for
from zotune.kernels.workspace import workspace

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_THIN = struct.Struct("@PPPPPqqqqqqqqq")
FOUR = 4  # rows that are taken at once, as in native.c
LINE = 64  # numbers: rooms of two threads share no line of the cache


def add_thin(library: Any, y: Tensor, x: Tensor, kept: Tensor, fresh: Tensor) -> None:
    """y += (x @ kept.T) @ fresh of each copy of the rows; sums in fp32.

    Args:
        library: native.c.
        y: (C * n, out) fp32 or bf16, contiguous; changed in place.
        x: (C * n, in) of the same dtype, contiguous.
        kept: (rank, in) fp32, contiguous.
        fresh: (C, rank, out) fp32; each copy's contiguous, or the transpose of what is.
    """
    copies, rank, out = fresh.shape
    rows, width = x.shape
    turned = not fresh[0].is_contiguous()
    fits = (
        y.shape == (rows, out)
        and kept.shape == (rank, width)
        and x.dtype == y.dtype
        and kept.dtype == fresh.dtype == torch.float32
        and rows % copies == 0
        and y.is_contiguous()
        and x.is_contiguous()
        and kept.is_contiguous()
        and not (turned and not fresh[0].t().is_contiguous())
    )
    if not fits or not (y.is_cpu and x.is_cpu and kept.is_cpu and fresh.is_cpu):
        raise ValueError(
            f"No thin product of {tuple(x.shape)}, {tuple(kept.shape)} and {tuple(fresh.shape)} like these."
        )
    threads = threads_for(rows * (width + out) * rank)
    each = -(-(width + (rank + 1) * out + FOUR * rank) // LINE) * LINE
    room = workspace("thin", threads * each, torch.float32, y.device)
    packed = _THIN.pack(
        y.data_ptr(), x.data_ptr(), kept.data_ptr(), fresh.data_ptr(), room.data_ptr(),
        rows, rows // copies, width, out, rank, fresh.stride(0), each, DTYPES[y.dtype], turned,
    )  # fmt: skip
    library.zotune_thin(packed, threads)
