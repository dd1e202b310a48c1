"""A device that is not there: losses that count every time their value is read on the host.

`Remote` tensors live on the CPU and say that they lie on a GPU. Whatever is computed from them is remote too. Reading one
(`float`, `bool`, `tolist`, a boolean index, ...) is written down in `Remote.reads`, with the line of zotune that did it.
"""

import traceback
from typing import ClassVar

import torch
from torch import Tensor

READS = {
    "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__format__", "__index__", "__int__", "__repr__",
    "cpu", "item", "nonzero", "numpy", "tolist", "unique",
}  # fmt: skip


class Remote(Tensor):
    """A tensor that counts as lying on a GPU."""

    reads: ClassVar[list[str]] = []
    device = torch.device("cuda")  # what Python code is told

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Do what was asked; note what a GPU would have to be waited for."""
        name = getattr(func, "__name__", "")
        if name in READS or (name == "__getitem__" and _boolean(args[1])):
            cls.reads.append(_where(name))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*(_plain(arg) for arg in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def remote(value):
    """A remote copy of a tensor."""
    return value.detach().clone().as_subclass(Remote)


def _plain(value):
    return value.as_subclass(Tensor) if isinstance(value, Remote) else value


def _boolean(index):
    return any(
        isinstance(part, Tensor) and part.dtype == torch.bool
        for part in (index if isinstance(index, tuple) else (index,))
    )


def _where(name):
    frames = [frame for frame in traceback.extract_stack() if "/zotune/" in frame.filename]
    last = frames[-1] if frames else traceback.extract_stack()[0]
    return f"{name} in {last.filename.rpartition('/zotune/')[2]}:{last.lineno}"
