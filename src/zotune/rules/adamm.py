"""AdaMM: Adam whose second moment never shrinks, without bias correction.

Chen, Liu, Xu, Li, Lin, Hong, Cox, "ZO-AdaMM: Zeroth-Order Adaptive Momentum Method for Black-Box Optimization", NeurIPS
2019, arXiv 1910.06513, in the form that the ZO-LDSD code uses:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    v_max <- max(v_max, v)
    w <- w - lr * m / (sqrt(v_max) + delta)

Without bias correction the first step has length lr (1 - beta1) / sqrt(1 - beta2): 3.2 lr in each coordinate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.site import Site
from zotune.rules.base import BaseRule, buffer, buffer_bytes, move, pieces


@dataclass(frozen=True)
class AdaMM(BaseRule):
    """First moment over the square root of the largest second moment so far; decoupled weight decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-10

    name: ClassVar[str] = "adamm"
    extra_state: ClassVar[str] = "3 fp32 numbers per parameter (mean, mean square, largest mean square)"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self.check("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self.check("delta", self.delta > 0, "positive, since estimates can be 0")

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Rule.extra_bytes`."""
        return buffer_bytes(sites, 3)

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        for w, part, g in pieces(weight, site, estimate):
            m, v, largest = (buffer(state, key, w, part) for key in ("mean", "square", "largest"))
            m.mul_(self.beta1).add_(g * (1.0 - self.beta1))
            v.mul_(self.beta2).add_(g.mul_(g).mul_(1.0 - self.beta2))
            torch.maximum(largest, v, out=largest)
            move(w, part, group, m / largest.sqrt().add_(self.delta))
