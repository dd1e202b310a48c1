"""The networks of a ZO Fine-tuner: one per tensor, five numbers in, one scale out.

    sigma_i = | w2 . tanh(W1 x + b1) + b2 |        x = (mean, variance, loss at +, loss at -, sigma of the step before)

W1 is 64 x 5, so a network holds 449 numbers. Networks are kept as four arrays over all tensors.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.ledger import bytes_of
from zotune.core.noise import stream
from zotune.core.site import site_id
from zotune.errors import FinetunerError
from zotune.kernels.philox import words

HIDDEN = 64
FEATURES = ("mean", "variance", "loss_plus", "loss_minus", "sigma_before")
BOUNDS = (5**-0.5, 5**-0.5, 64**-0.5, 64**-0.5)  # torch.nn.Linear draws w1, b1, w2, b2 from U(-bound, bound)
SIZES = (HIDDEN * len(FEATURES), HIDDEN, HIDDEN, 1)  # numbers of one network in w1, b1, w2, b2
NUMBERS = sum(SIZES)  # 449


@dataclass(frozen=True, eq=False)
class Networks:
    """n networks, the i-th for the tensor `names[i]` (canonical). The arrays may be fp32, fp16 or bf16."""

    names: tuple[str, ...]
    w1: Tensor  # (n, 64, 5)
    b1: Tensor  # (n, 64)
    w2: Tensor  # (n, 64)
    b2: Tensor  # (n,)

    def __post_init__(self) -> None:
        """Check shapes, dtypes and numbers."""
        n = len(self.names)
        shapes = {"w1": (n, HIDDEN, len(FEATURES)), "b1": (n, HIDDEN), "w2": (n, HIDDEN), "b2": (n,)}
        for key, array in self.arrays.items():
            if tuple(array.shape) != shapes[key] or not array.is_floating_point() or array.dtype != self.w1.dtype:
                raise FinetunerError(
                    f"{key} of {n} networks must be floating point of one dtype and of shape {shapes[key]}; got "
                    f"{tuple(array.shape)}, {array.dtype}."
                )
        if len(set(self.names)) < n:
            twice = sorted(name for name in set(self.names) if self.names.count(name) > 1)
            raise FinetunerError(f"Each tensor has one network; there are several for {', '.join(twice)}.")
        finite = self.flat().isfinite().all(dim=1)
        if not bool(finite.all()):
            broken = [name for name, good in zip(self.names, finite.tolist(), strict=True) if not good]
            raise FinetunerError(f"Networks must hold finite numbers; those for {', '.join(broken)} do not.")

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The four arrays by name."""
        return {"w1": self.w1, "b1": self.b1, "w2": self.w2, "b2": self.b2}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def flat(self) -> Tensor:
        """(n, 449) fp64: each network's w1, b1, w2, b2 in a row."""
        return torch.cat([array.reshape(len(self.names), -1).double() for array in self.arrays.values()], dim=1)

    def digest(self) -> str:
        """Names and bits of the networks in 16 hex digits."""
        made = hashlib.sha256(json.dumps([self.names, str(self.w1.dtype)]).encode())
        for array in self.arrays.values():
            made.update(bytes_of(array))
        return made.hexdigest()[:16]

    def sigma(self, features: Tensor, index: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """What networks number `index` answer.

        Args:
            features: (k, 5) in the order of `FEATURES`.
            index: k numbers of networks.
            dtype: each layer's output is rounded to it, as a module of that dtype would. Sums are fp64, so that no
                order of summation is seen.

        Returns:
            (k,) fp32, none negative.
        """

        def rounded(values: Tensor) -> Tensor:
            return values.to(dtype).double()

        w1, b1, w2, b2 = (rounded(array[list(index)]) for array in self.arrays.values())
        hidden = rounded(torch.tanh(rounded((w1 * rounded(features)[:, None, :]).sum(dim=2) + b1)))
        return rounded((w2 * hidden).sum(dim=1) + b2).abs().float()


def from_flat(names: Sequence[str], flat: Tensor) -> Networks:
    """Networks of rows of 449 numbers: w1, b1, w2, b2."""
    w1, b1, w2, b2 = flat.split_with_sizes(SIZES, dim=1)
    shape = (len(names), HIDDEN, len(FEATURES))
    return Networks(
        tuple(names), w1.reshape(shape).contiguous(), b1.contiguous(), w2.contiguous(), b2[:, 0].contiguous()
    )


def untrained(names: Sequence[str], seed: int) -> Networks:
    """Networks as torch.nn.Linear initialises them, of counter-based noise: a name's network depends on name and seed."""
    key = stream(seed, "untrained networks").key
    blocks = torch.arange(math.ceil(NUMBERS / 4))
    rows = []
    for name in names:
        unit = ((words(key, site_id(name), blocks) >> 8).double().view(-1)[:NUMBERS] + 0.5) * 2.0**-24  # of (0, 1)
        parts = [(2.0 * part - 1.0) * bound for part, bound in zip(unit.split_with_sizes(SIZES), BOUNDS, strict=True)]
        rows.append(torch.cat(parts).float())
    return from_flat(names, torch.stack(rows))
