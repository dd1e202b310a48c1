"""The model's way through training while its optimizer is learned: SGD with momentum, restarted now and then.

As torch.optim.SGD after clip_grad_norm_, at a rate that falls linearly to 0 over each window; then the weights return to
the base model's, read from a file tensor by tensor. Kept: one momentum in fp32, and, unless backward passes are run twice,
the gradient for the length of a visit (its norm must be known before any of it is used).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.core.site import Site
from zotune.core.weights import Slot, Weights
from zotune.errors import DataError
from zotune.extras import require
from zotune.learn.passes import Backward, along, energy, run


class Trajectory:
    """Moves the model; `file_start` has filed its start."""

    def __init__(
        self, weights: Weights, *, lr: float, momentum: float, clip: float | None, window: int, gradients: str
    ) -> None:
        """See `LearnConfig`; `window` is the number of visits between restarts."""
        self.weights = weights
        self.lr, self.momentum, self.clip, self.window = lr, momentum, clip, window
        self.twice = gradients == "twice"
        self.done = 0  # visits in this window
        self.buffers: dict[str, Tensor] = {}

    @property
    def rate(self) -> float:
        """The learning rate of the next visit."""
        return self.lr * max(0.0, 1.0 - self.done / self.window)

    def visit(self, backward: Backward, seed: int, u: Any = None) -> tuple[Tensor, Tensor] | None:
        """One step on one batch.

        Returns:
            With a direction u: h_i = <u_i, g_i> and |g_i|^2, both (n,) fp64, of the weights before the step.
        """
        found: dict[str, tuple[float, float]] = {}

        def read(slot: Slot, gradient: Tensor) -> bool:
            found[slot.site.name] = (0.0 if u is None else along(slot, gradient, u), energy(gradient))
            return not self.twice

        def read_whole(slot: Slot, gradient: Tensor) -> bool:
            return True  # the last micro-batch completes it

        if self.twice:
            run(self.weights, backward, seed, read)
        else:
            run(self.weights, backward, seed, read_whole)
            for slot in self.weights:
                if slot.tensor.grad is not None:
                    read(slot, slot.tensor.grad)
        share = self._share(sum(squared for _, squared in found.values()))
        self._move(backward, seed, share)
        self.done += 1
        if u is None:
            return None
        both = [found.get(slot.site.name, (0.0, 0.0)) for slot in self.weights]
        here, squared = torch.tensor(both, dtype=torch.float64).unbind(1)
        return here, squared

    def restart(self, start: Path) -> None:
        """Back to the base model's weights, momentum forgotten, schedule anew."""
        read = require("safetensors", extra="hf", purpose="read the base model's weights").safe_open
        self.buffers, self.done = {}, 0
        try:
            with read(start, framework="pt") as held, torch.no_grad():
                for slot in self.weights:
                    slot.tensor.copy_(held.get_tensor(slot.site.name))
                    slot.carried = None
        except (
            Exception
        ) as error:  # the library has an error of its own for a damaged file, and others for a missing one
            raise DataError(
                f"{start} cannot be read ({error}). Delete its folder, and begin again: the run restarts from these weights."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Momentum and place in the window."""
        return {"done": self.done, "buffers": dict(self.buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.done = int(state["done"])
        devices = {slot.site.name: slot.tensor.device for slot in self.weights}
        self.buffers = {name: buffer.to(devices[name]) for name, buffer in state["buffers"].items()}

    # ------------------------------------------------------------------------------------------------------------------

    def _share(self, squared: float) -> float:
        """What clipping leaves of the gradient, as torch.nn.utils.clip_grad_norm_ computes it."""
        if self.clip is None:
            return 1.0
        return min(1.0, self.clip / (squared**0.5 + 1e-6))

    def _move(self, backward: Backward, seed: int, share: float) -> None:
        rate = self.rate
        if self.twice:

            def apply(slot: Slot, gradient: Tensor) -> bool:
                self._apply(slot, gradient, share, rate)
                return False

            run(self.weights, backward, seed, apply)
            return
        with torch.no_grad():
            for slot in self.weights:
                if slot.tensor.grad is not None:
                    self._apply(slot, slot.tensor.grad, share, rate)
                    slot.tensor.grad = None

    def _apply(self, slot: Slot, gradient: Tensor, share: float, rate: float) -> None:
        """m <- momentum m + share g;  w <- w - rate m"""
        buffer = self.buffers.get(slot.site.name)
        if buffer is None:
            buffer = self.buffers[slot.site.name] = torch.zeros_like(gradient, dtype=_wide(gradient.dtype))
        buffer.mul_(self.momentum).add_(gradient.to(buffer.dtype), alpha=share)
        flat = buffer.reshape(-1)

        def change(values: Tensor, part: Site) -> None:
            values.sub_(rate * flat[part.start : part.start + part.count].view(values.shape).to(values.dtype))

        self.weights.update(slot, change)


def file_start(weights: Weights, path: Path) -> None:
    """Write the trained tensors as they are, for restarts."""
    save = require("safetensors.torch", extra="hf", purpose="keep the base model's weights").save_file
    temporary = path.with_name(f".{path.name}.tmp")
    save({slot.site.name: slot.tensor.detach().contiguous() for slot in weights}, temporary)
    temporary.replace(path)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
