"""Values of bf16 tensors read and written by the compiled kernels, and their moments."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from zotune.kernels.moments import PIECE
from zotune.kernels.native_packing import check, threads_for

_ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def declare(library: Any) -> None:
    """Tell ctypes what the functions take."""
    for function in (library.zotune_read, library.zotune_write):
        function.argtypes, function.restype = [_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _INT], None
    library.zotune_moments.argtypes = [_ADDRESS, _INT, _COUNT, ctypes.c_double, _ADDRESS, _INT]
    library.zotune_moments.restype = None


def in_memory(*tensors: Tensor | None) -> bool:
    """Whether these lie in the CPU's memory, one number after the other."""
    return all(tensor is None or (tensor.is_cpu and tensor.is_contiguous()) for tensor in tensors)


def copy_values(function: Any, stored: Tensor, carried: Tensor | None, values: Tensor) -> None:
    """`zotune_read` or `zotune_write`."""
    count = stored.numel()
    check(stored, torch.bfloat16, count)
    check(values, torch.float32, count)
    if carried is not None:
        check(carried, torch.int16, count)
    low = None if carried is None else carried.data_ptr()
    function(stored.data_ptr(), low, values.data_ptr(), count, threads_for(count))


def moments(library: Any, values: Tensor, pivot: float) -> Tensor:
    """See `Backend.moments`."""
    count = values.numel()
    sums = torch.empty(-(-count // PIECE), 2, dtype=torch.float64)
    wide = values.dtype == torch.float64
    check(values, torch.float64 if wide else torch.float32, count)
    library.zotune_moments(values.data_ptr(), wide, count, pivot, sums.data_ptr(), threads_for(count))
    return sums
