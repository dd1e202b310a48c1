"""Sign: w <- w - lr * sign(g), element by element.

ZO-SGD-Sign of Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark",
ICML 2024, arXiv 2402.11592; signSGD with estimated gradients is Liu, Chen, Chen, Hong, ICLR 2019. Every number moves by
exactly lr, however large the losses are; where the estimate is 0 it stays. With one direction, sign(rho z) is
sign(rho) sign(z): a Rademacher direction. The released benchmark code takes the sign of rho alone and moves along
Gaussian z instead, which is a step of fixed length, not this rule.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.direction import Direction
from zotune.core.elementwise import Sign
from zotune.core.site import Site
from zotune.rules.base import BaseRule, shrink


@dataclass(frozen=True)
class SignSGD(BaseRule):
    """w <- (1 - lr * weight_decay) w - lr * sign(g)."""

    name: ClassVar[str] = "sign"
    offers: ClassVar[frozenset[str]] = frozenset({"trial"})

    def trial(self, direction: Direction, group: dict[str, Any]) -> Direction:
        """-lr * sign(g)"""
        return -float(group["lr"]) * Sign(direction)

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        lr = float(group["lr"])
        if lr == 0.0:
            return  # adding 0 would still turn -0.0 into 0.0
        shrink(weight, site, group)
        Sign(estimate.direction).add_to(weight, site, -lr)
