"""JAGUAR sign: the sign of a slowly moving average, kept for all tensors, renewed where the estimate looked.

JAGUAR SignSGD (Petrov et al., "Leveraging Coordinate Momentum in SignSGD and Muon: Memory-Optimized Zero-Order", arXiv
2506.04430), in the form that the ZO-LDSD code uses:

    a <- beta a + (1 - beta) g        on tensors that the step's directions touch; the others keep theirs
    w <- w - lr * sign(a)             on all tensors

With a method that probes all tensors at once this is signSGD with momentum. It is meant for methods that probe a few
tensors a step: the rest goes on moving by what is remembered of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.site import Site
from zotune.rules.base import BaseRule, buffer, buffer_bytes, move, pieces


@dataclass(frozen=True)
class Jaguar(BaseRule):
    """a <- beta a + (1 - beta) g where probed; w <- (1 - lr * weight_decay) w - lr sign(a) everywhere."""

    beta: float = 0.9

    name: ClassVar[str] = "jaguar"
    extra_state: ClassVar[str] = "1 fp32 number per parameter (the average of the estimates)"

    def __post_init__(self) -> None:
        """Check the range."""
        self.check("beta", 0 <= self.beta < 1, "in [0, 1)")

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Rule.extra_bytes`."""
        return buffer_bytes(sites, 1)

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        touched = estimate.direction.touches(site)
        for w, part, g in pieces(weight, site, estimate):
            a = buffer(state, "average", w, part)
            if touched:
                a.mul_(self.beta).add_(g.mul_(1.0 - self.beta))
            move(w, part, group, a.sign())
