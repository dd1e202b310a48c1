"""Seconds and peak memory of a block of work.

CUDA: torch's peak of allocated memory, above what was allocated when the block began. CPU: resident memory of the process,
above what was resident when the block began. On Linux the kernel's high-water mark is reset at the start, which every
process may do for itself, so the peak is exact however short it was. Elsewhere a high-water mark that cannot be reset is
read: it tells a peak only where this block went higher than everything before it.

What the block finds in memory does not count: the model's weights, above all. Weights that are mapped from a file and have
not been read yet do become resident in the block; evaluate the untrained model first.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Usage:
    """What a block of work took; filled in when it ends."""

    seconds: float = 0.0
    memory: int | None = None
    """Bytes at the peak, above what was in use at the start; None where it cannot be told."""
    how: str = ""
    """How the memory was measured."""


@contextmanager
def measure(device: torch.device | str = "cpu") -> Iterator[Usage]:
    """Measure the block: `with measure(device) as usage: ...`; read `usage` afterwards."""
    usage = Usage()
    kind = torch.device(device).type
    gc.collect()
    start = _reset_cuda(device) if kind == "cuda" else _reset_resident()
    began = time.perf_counter()
    try:
        yield usage
    finally:
        if kind == "cuda":
            torch.cuda.synchronize(device)
        usage.seconds = time.perf_counter() - began
        if kind == "cuda":
            usage.memory = torch.cuda.max_memory_allocated(device) - start[0]
            usage.how = "allocated on the GPU"
        else:
            usage.memory, usage.how = _resident_peak(*start)


def _reset_cuda(device: torch.device | str) -> tuple[int, bool]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), True


def _reset_resident() -> tuple[int, bool]:
    """Bytes in use now, and whether the high-water mark starts again from there."""
    _give_back_freed()
    try:
        RESET.write_text("5")
        return _status("VmHWM"), True
    except (OSError, StopIteration):
        return _high_water(), False


def _resident_peak(start: int, reset: bool) -> tuple[int | None, str]:
    if reset:
        return _status("VmHWM") - start, "resident, high-water mark of the block"
    grown = _high_water() - start
    if grown > 0:
        return grown, "resident, above the highest mark before the block"
    return None, "not known: the block stayed below an earlier high-water mark, which cannot be reset here"


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _high_water() -> int:
    import resource  # noqa: PLC0415 - not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _give_back_freed() -> None:
    """The C library keeps freed memory, which a block could use again without a trace: hand it back, where that is known."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
