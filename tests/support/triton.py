"""Triton's interpreter beside compiled kernels, in one process.

Triton decides when a kernel is defined whether it will be interpreted. So the modules of the back end are imported once
under TRITON_INTERPRET=1, for tensors on the CPU, and once without, for a GPU.
"""

import importlib
import os
import sys
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

_MODULES = [f"zotune.kernels.triton_{part}" for part in ("draws", "jit", "noise", "many")]

DEVICES = [
    pytest.param("cpu", id="interpreter"),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        id="gpu",
    ),
]


@lru_cache(maxsize=2)
def kernels(device):
    """The back end's modules by their short names (`draws`, `jit`, `noise`, `many`), for tensors on a device."""
    pytest.importorskip("triton")
    settings = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    kept = {name: module for name, module in sys.modules.items() if name not in _MODULES}
    with mock.patch.dict(os.environ, settings), mock.patch.dict(sys.modules, kept, clear=True):
        made = [importlib.import_module(name) for name in _MODULES]
        new = {name: module for name, module in sys.modules.items() if name not in kept and name not in _MODULES}
    sys.modules.update(new)  # what they imported on the way stays imported
    return SimpleNamespace(**{module.__name__.rpartition("_")[2]: module for module in made})


@lru_cache(maxsize=2)
def backend(device):
    """The Triton back end for tensors on a device."""
    return kernels(device).many.Triton()
