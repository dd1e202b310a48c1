"""The meta-gradient: how the loss after one zeroth-order step depends on the scales, and through them on the networks.

With v = nf sigma (.) u, rho = (L(theta + eps v) - L(theta - eps v)) / (2 eps) and theta' = theta - lr rho v, the networks
are to lower L(theta'). Per tensor all that is needed of the model is one number,

    h_i = <u_i, grad_i L(theta')>.

**As published** (Zhang et al. 2026, arXiv 2510.00419) rho, nf and the features are constants:

    d_i = dL/dsigma_i = -lr nf rho h_i                                                                            (1)

**Corrected.** nf = sqrt(W / S), W = sum w_j, S = sum w_j sigma_j^2, depends on the scales, dnf/dsigma_i = -nf w_i sigma_i / S:

    d_i = -lr nf (x_i - (w_i sigma_i / S) sum_j sigma_j x_j),      x_i = rho h_i                                  (2)

so that sum_i sigma_i d_i = 0: the loss does not depend on the size of the scales, and a step of the networks only moves
budget from tensor to tensor. The budget measures changes by sum_i w_i dsigma_i^2, so steepest descent follows d_i / w_i,
of which sum_i w_i sigma_i (d_i / w_i) = 0.

**Less noise.** Over u, x_i has mean nf sigma_i |g_i|^2 to leading order in lr (g the gradient at theta), and a standard
deviation larger by sqrt(sum_j (nf sigma_j)^2 |g_j|^2) / (nf sigma_i |g_i|): about the square root of the number of tensors. The
trajectory's own backward pass on the same batch tells h_i(theta) = <u_i, g_i> and |g_i|^2, hence

    x_i = rho (h_i - h_i(theta)) + nf sigma_i |g_i|^2                                                              (3)

has the same mean (rho h_i(theta) has mean nf sigma_i |g_i|^2 over u, up to eps^2), and noise only in its curvature part.

**Which lr.** Let A = sum s_i^2 |g_i|^2 and B = sum s_i^2 tr H_i with s = nf sigma (block-diagonal H, many dimensions). The mean
of (1) over u is -(lr/2) dA/ds_i + (lr^2/2) A dB/ds_i. At the best step for these scales, lr = 1/B, that is -(1/2) d(A/B)/ds_i:
the exact gradient of -A / (2 B), the decrease of the best step, although rho was held constant. For lr far below 1/B only
-(lr/2) dA/ds_i is left, which no curvature restrains. So `lr_update` should be the learning rate that the step will use.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.finetuner.networks import Networks

_FORGET = 0.9  # of the running size of meta-gradients
_CLIP = 3.0  # times that size: no tensor moves further in one step


@dataclass(frozen=True)
class Slopes:
    """What passes through the model say of one step. All (n,) fp64, in the order of the tensors."""

    rho: float
    moved: Tensor  # h_i at theta'
    here: Tensor | None = None  # h_i at theta, same batch and u; with `energy`
    energy: Tensor | None = None  # |g_i|^2 at theta


def published(sigma: Tensor, slopes: Slopes, *, lr: float, nf: float) -> Tensor:
    """(1): dL(theta')/dsigma_i with everything else held constant. (n,) fp64."""
    return -lr * nf * slopes.rho * slopes.moved


def budgeted(sigma: Tensor, slopes: Slopes, counts: Tensor, *, lr: float) -> Tensor:
    """(2), with (3) where `slopes` has what it takes: dL(theta')/dsigma_i with nf as a function of the scales. (n,) fp64.

    Args:
        sigma: (n,) fp64, before nf.
        slopes: of the step.
        counts: (n,) w_i.
        lr: length of the step.
    """
    size = float((counts * sigma.square()).sum())
    nf = math.sqrt(float(counts.sum()) / size)
    x = slopes.rho * slopes.moved
    if slopes.here is not None and slopes.energy is not None:
        x = slopes.rho * (slopes.moved - slopes.here) + nf * sigma * slopes.energy
    return -lr * nf * (x - counts * sigma / size * (sigma * x).sum())


def of_networks(networks: Networks, features: Tensor, d: Tensor) -> Tensor:
    """(n, 449) fp64: dL/dw1, b1, w2, b2 of each network from d_i = dL/dsigma_i.

    Args:
        networks: n of them.
        features: (n, 5), as they were asked.
        d: (n,).
    """
    x = features.double()
    w1, b1, w2, b2 = (array.double() for array in networks.arrays.values())
    hidden = torch.tanh((w1 * x[:, None, :]).sum(dim=2) + b1)  # (n, 64)
    out = d * torch.sign((w2 * hidden).sum(dim=1) + b2)  # (n,): sigma = |out of the last layer|
    inner = out[:, None] * w2 * (1 - hidden.square())  # (n, 64)
    outer = inner[:, :, None] * x[:, None, :]  # (n, 64, 5)
    return torch.cat([outer.flatten(1), inner, out[:, None] * hidden, out[:, None]], dim=1)


@dataclass
class Size:
    """The running size of meta-gradients, by which they are divided so that their scale does not matter.

    Their unit is lr_update times a squared gradient, 1e-6 times anything; added to weights of 0.1 in fp32, let alone fp16,
    most of them would round away. The size is the median of |d_i| over tensors: a few large ones do not set it.
    """

    total: float = 0.0
    weight: float = 0.0
    seen: int = field(default=0)

    def normalised(self, d: Tensor) -> Tensor:
        """d over its running size, each within +-3; zeros as long as there is none."""
        self.total = _FORGET * self.total + (1 - _FORGET) * float(d.abs().median())
        self.weight = _FORGET * self.weight + (1 - _FORGET)
        self.seen += 1
        size = self.total / self.weight
        return (d / size).clamp(-_CLIP, _CLIP) if size > 0 else torch.zeros_like(d)
