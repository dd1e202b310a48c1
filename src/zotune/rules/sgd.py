"""SGD: w <- w - lr * (g + weight_decay * w)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.direction import Direction
from zotune.core.site import Site
from zotune.rules.base import BaseRule, shrink, shrinks


@dataclass(frozen=True)
class SGD(BaseRule):
    """w <- w - lr * (g + weight_decay * w); no decay for biases and norms."""

    name: ClassVar[str] = "sgd"
    offers: ClassVar[frozenset[str]] = frozenset({"trial", "linear"})

    def displacements(
        self, sites: Sequence[Site], estimate: Estimate, group: dict[str, Any]
    ) -> Sequence[Direction | None]:
        """-lr * g, unless the weight decays too."""
        lr = float(group["lr"])
        moved = None if lr == 0.0 else -lr * estimate.direction  # one for all, so that kernels read it once
        return [None if shrinks(site, group) else moved for site in sites]

    def trial(self, direction: Direction, group: dict[str, Any]) -> Direction:
        """-lr * g"""
        return -float(group["lr"]) * direction

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        lr = float(group["lr"])
        if lr == 0.0:
            return  # adding 0 would still turn -0.0 into 0.0
        shrink(weight, site, group)
        estimate.direction.add_to(weight, site, -lr)
