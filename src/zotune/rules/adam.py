"""Adam on the estimate, as `torch.optim.Adam` computes it, with AdamW's weight decay.

Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; ZO-Adam of Zhang et al. 2024, arXiv 2402.11592:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    w <- w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + delta)

t counts accepted steps from 1; delta is Adam's epsilon (eps is the perturbation here). The first step is that of `sign`. The
estimates rho z of one direction are as large in one coordinate as in another, so that what v differs by is chance, which
averages out: over coordinates sqrt(v) varies by 75 % after one step, 33 % after 10, 11 % after 100 and 4 % after 1000
(beta2 0.999). From then on Adam acts like momentum with a normalised length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.site import Site
from zotune.rules.base import BaseRule, buffer, buffer_bytes, move, pieces


@dataclass(frozen=True)
class Adam(BaseRule):
    """Bias-corrected first and second moments; decoupled weight decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-8

    name: ClassVar[str] = "adam"
    extra_state: ClassVar[str] = "2 fp32 numbers per parameter (mean and mean square of the estimates)"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        self.check("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self.check("delta", self.delta > 0, "positive, since estimates can be 0")

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Rule.extra_bytes`."""
        return buffer_bytes(sites, 2)

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        t = float(state.get("step", 0.0)) + 1.0
        first, second = 1.0 - self.beta1**t, 1.0 - self.beta2**t
        for w, part, g in pieces(weight, site, estimate):
            m, v = buffer(state, "mean", w, part), buffer(state, "square", w, part)
            m.mul_(self.beta1).add_(g * (1.0 - self.beta1))
            v.mul_(self.beta2).add_(g.mul_(g).mul_(1.0 - self.beta2))
            move(w, part, group, (m / first).div_((v / second).sqrt_().add_(self.delta)))
