"""Small buffers that are used again and again: on the CPU, fresh memory costs more than the arithmetic done in it."""

import threading

import torch
from torch import Tensor

_local = threading.local()
VIEWS = 256  # lengths that are remembered


class _Held(dict[tuple[str, int, torch.dtype], Tensor]):
    """The tensors handed out: the same for the same question, and buffers that they are parts of."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __missing__(self, name: tuple[str, int, torch.dtype]) -> Tensor:
        role, numel, dtype = name
        with torch.inference_mode(False):  # else only inference mode could write to it again
            buffer = self.buffers.get((role, dtype))
            if buffer is None or buffer.numel() < numel:
                self.clear()  # views would keep the old buffer
                buffer = self.buffers[role, dtype] = torch.empty(numel, dtype=dtype)
            if len(self) >= VIEWS:
                self.clear()
            made = self[name] = buffer[:numel]
        return made


def workspace(role: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of unknown content, valid until the same role is asked for again on this thread.

    Args:
        role: what it is for; two roles never share memory.
        numel: elements.
        dtype: of the elements.
        device: other devices than the CPU have caching allocators of their own and get fresh memory.
    """
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    held: _Held | None = getattr(_local, "held", None)
    if held is None:
        held = _local.held = _Held()
    return held[role, numel, dtype]
