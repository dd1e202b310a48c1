"""Small buffers that are used again and again: on the CPU, fresh memory costs more than the arithmetic done in it."""

import threading

import torch
from torch import Tensor

_local = threading.local()


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
    held: dict[tuple[str, torch.dtype], Tensor] = vars(_local).setdefault("held", {})
    buffer = held.get((role, dtype))
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # else only inference mode could write to it again
            buffer = held[role, dtype] = torch.empty(numel, dtype=dtype)
    return buffer[:numel]
