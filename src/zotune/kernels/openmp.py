"""The threads of the compiled kernels are torch's own: two pools would fight for the cores.

libgomp, and the Intel and LLVM runtimes on Linux, start a team by `GOMP_parallel`. The kernels are given its address in the
library that torch has loaded, so they are built without OpenMP and follow `torch.set_num_threads`.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True)
class Runtime:
    """Addresses of the three functions, or none of them; and a few words about where they are from."""

    addresses: tuple[int, ...]
    reason: str


def find_runtime() -> Runtime:
    """The OpenMP runtime that torch runs on."""
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        return Runtime((), "one thread: torch itself does not run on OpenMP")
    for path in _libraries():
        addresses = _addresses(path)
        if addresses:
            return Runtime(addresses, f"torch's own OpenMP threads ({path.name})")
    addresses = _addresses(None)
    if addresses:
        return Runtime(addresses, "the OpenMP threads that this process has loaded")
    return Runtime((), "one thread: torch's OpenMP runtime was not found in this process")


def _libraries() -> list[Path]:
    """OpenMP libraries that come with torch."""
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    return sorted(path for folder in folders for path in folder.glob("lib*omp*") if ".so" in path.name)


def _addresses(path: Path | None) -> tuple[int, ...]:
    """Addresses in a library that is loaded already (none is loaded here), or anywhere in the process."""
    if sys.platform == "win32":
        return ()
    try:
        library = ctypes.CDLL(None) if path is None else ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in NAMES]
    except (OSError, AttributeError):
        return ()
    return tuple(address for address in found if address is not None)
