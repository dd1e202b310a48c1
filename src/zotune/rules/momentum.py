"""Momentum (heavy ball): m <- beta * m + g, w <- w - lr * m.

Polyak 1964; ZO-SGD-MMT of Zhang et al. 2024, arXiv 2402.11592. m starts at 0 and nothing is damped, so a constant
gradient ends up moving the weights by lr / (1 - beta) a step: divide lr by 10 when going from `sgd` to beta = 0.9.
`momentum_replayed` is the same without the buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.site import Site
from zotune.rules.base import BaseRule, buffer, buffer_bytes, move, pieces


@dataclass(frozen=True)
class Momentum(BaseRule):
    """m <- beta m + g; w <- (1 - lr * weight_decay) w - lr m."""

    beta: float = 0.9

    name: ClassVar[str] = "momentum"
    extra_state: ClassVar[str] = "1 fp32 number per parameter (the momentum)"

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
        for w, part, g in pieces(weight, site, estimate):
            m = buffer(state, "momentum", w, part)
            m.mul_(self.beta).add_(g)
            move(w, part, group, m)
