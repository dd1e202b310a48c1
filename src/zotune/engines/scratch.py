"""Buffers that are used again: fresh memory costs more than the arithmetic done in it."""

import torch
from torch import Tensor


class Scratch:
    """Hands out uninitialised tensors and takes them back. At most one free buffer per dtype and device is kept."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, like: Tensor) -> Tensor:
        """A contiguous tensor of the shape, dtype and device of `like`."""
        buffer = self._free.pop((like.dtype, like.device), None)
        if buffer is None or buffer.numel() < like.numel():
            buffer = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)

    def give(self, scratch: Tensor) -> None:
        """Take a tensor back; the larger of two buffers stays."""
        whole = scratch if scratch._base is None else scratch._base
        key = (whole.dtype, whole.device)
        if key not in self._free or self._free[key].numel() < whole.numel():
            self._free[key] = whole.view(-1)
