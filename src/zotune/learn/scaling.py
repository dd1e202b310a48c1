"""Features on a common scale, without changing what the networks of a folder are.

Means of weights are about 1e-3, variances 1e-4, losses 1: raw, as published, the first two say nothing to a network whose
first layer is drawn from +-0.447. A network of (x - a) b is a network of x with other numbers in its first layer,

    W1 ((x - a) b) + b1  =  (W1 b) x + (b1 - W1 (a b)),

so networks are trained on scaled features and saved as networks of raw ones: the same files, the same path to scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.finetuner.networks import FEATURES, Networks


@dataclass(frozen=True)
class Scaling:
    """(n, 5) fp64 each: features are taken as (x - offset) * factor."""

    offset: Tensor
    factor: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, 5) fp64."""
        return (features.double() - self.offset) * self.factor

    def fold(self, networks: Networks) -> Networks:
        """Networks that answer to raw features what these answer to scaled ones (to rounding of their dtype)."""
        w1 = networks.w1.double()
        shift = (w1 * (self.offset * self.factor)[:, None, :]).sum(dim=2)
        return Networks(
            networks.names,
            (w1 * self.factor[:, None, :]).to(networks.w1.dtype),
            (networks.b1.double() - shift).to(networks.w1.dtype),
            networks.w2.clone(),
            networks.b2.clone(),
        )


def unscaled(count: int) -> Scaling:
    """Raw features, as published."""
    shape = (count, len(FEATURES))
    return Scaling(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


def of_start(moments: Sequence[tuple[float, float]]) -> Scaling:
    """Mean and variance relative to what they are at the start, in units of the tensor's mean square; the others raw.

    Args:
        moments: mean and variance of each tensor of the base model. Tensors that are all 0 keep raw moments.
    """
    made = unscaled(len(moments))
    for i, (mean, variance) in enumerate(moments):
        square = mean * mean + variance
        made.offset[i, :2] = torch.tensor([mean, variance], dtype=torch.float64)
        if square > 0:
            made.factor[i, :2] = torch.tensor([square**-0.5, 1 / square], dtype=torch.float64)
    return made
