"""The four-pass loop as the papers' code does it, to compare with. Written here from its description; not for use."""

from collections.abc import Callable

import numpy as np
import torch


class LiteralMeZO:
    """+eps, -2 eps, +eps and the update, each pass drawing the whole noise again from torch's generator."""

    def __init__(self, model: torch.nn.Module, lr: float, eps: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps = lr, eps

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        seed = np.random.randint(1_000_000_000)
        self._perturb(seed, 1)
        with torch.inference_mode():
            first = closure()
        self._perturb(seed, -2)
        with torch.inference_mode():
            second = closure()
        slope = ((first - second) / (2 * self.eps)).item()
        self._perturb(seed, 1)
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data - self.lr * (slope * z)
        return first

    def _perturb(self, seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + factor * z * self.eps


class ReusedBuffers(LiteralMeZO):
    """The same four passes without fresh memory: noise into one buffer, added in place. What is left is the generator."""

    def __init__(self, model: torch.nn.Module, lr: float, eps: float) -> None:
        super().__init__(model, lr, eps)
        largest = max(self.parameters, key=lambda p: p.numel())
        self._buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        seed = np.random.randint(1_000_000_000)
        losses = []
        for factor in (self.eps, -2 * self.eps):
            self._add(seed, factor)
            with torch.inference_mode():
                losses.append(closure())
        self._add(seed, self.eps)
        self._add(seed, -self.lr * ((losses[0] - losses[1]) / (2 * self.eps)).item())
        return losses[0]

    def _add(self, seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for p in self.parameters:
            p.data.add_(self._buffer[: p.numel()].view(p.shape).normal_(), alpha=factor)
