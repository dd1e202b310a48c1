"""What most rules share: weight decay, nothing to remember, and full-size buffers where something is."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.direction import Direction
from zotune.core.noise import CHUNK
from zotune.core.options import Options
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.kernels.workspace import workspace

# Tensors whose canonical name contains one of these are not decayed. MeZO's code lists bias, layer_norm and layernorm,
# which leaves out LLaMA's final `model.norm`; here every norm counts.
NO_DECAY = ("bias", "norm", "ln_")


def decays(name: str) -> bool:
    """Whether weight decay applies to a tensor of this canonical name."""
    return not any(part in name.lower() for part in NO_DECAY)


class BaseRule(Options):
    """A rule that remembers nothing. A rule is a dataclass; its fields are its options."""

    part: ClassVar[str] = "rule"
    extra_state: ClassVar[str] = "none"
    offers: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Rule.extra_bytes`."""
        return 0

    def prepare(self, estimate: Estimate) -> Estimate:
        """See `Rule.prepare`."""
        return estimate

    def displacements(
        self, sites: Sequence[Site], estimate: Estimate, group: dict[str, Any]
    ) -> Sequence[Direction | None]:
        """See `Rule.displacements`."""
        return [None] * len(sites)

    def trial(self, direction: Direction, group: dict[str, Any]) -> Direction:
        """See `Rule.trial`."""
        raise ConfigError(f"Rule {self.name!r} cannot be tried: it remembers earlier steps.")

    def state_dict(self) -> dict[str, Any]:
        """See `Rule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rule.load_state_dict`."""


def shrinks(site: Site, group: dict[str, Any]) -> bool:
    """Whether weight decay changes a site."""
    return float(group["weight_decay"]) != 0.0 and decays(site.name)


def shrink(weight: Tensor, site: Site, group: dict[str, Any]) -> None:
    """w <- w - lr * weight_decay * w, not for biases and norms."""
    if shrinks(site, group):
        weight.mul_(1.0 - float(group["lr"]) * float(group["weight_decay"]))


def pieces(weight: Tensor, site: Site, estimate: Estimate) -> Iterator[tuple[Tensor, Site, Tensor]]:
    """(weights, site, estimated gradient) of a (part of a) site, a chunk at a time: three flat views or buffers.

    The gradient is valid until the next piece. A weight that is not contiguous comes whole.
    """
    if not weight.is_contiguous():
        gradient = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        estimate.direction.add_to(gradient, site)
        yield weight, site, gradient
        return
    flat = weight.view(-1)
    for offset, part in site.chunks(CHUNK):
        gradient = workspace("gradient", part.count, weight.dtype, weight.device)
        gradient.zero_()
        estimate.direction.add_to(gradient, part)
        yield flat[offset : offset + part.count], part, gradient


def move(weight: Tensor, site: Site, group: dict[str, Any], step: Tensor) -> None:
    """w <- (1 - lr * weight_decay) w - lr * step; lr 0 changes no bit.

    Product and sum are rounded one after the other, as where directions are added: a fused operation rounds once, and
    not every device and vector length has one.
    """
    lr = float(group["lr"])
    if lr == 0.0:
        return  # adding 0 would still turn -0.0 into 0.0
    shrink(weight, site, group)
    weight.sub_(step * lr)


def buffer_bytes(sites: Sequence[Site], count: int) -> int:
    """Bytes of `count` full-size buffers for sites whose values are fp32 (fp16 and bf16 weights too); fp64 takes twice that."""
    return 4 * count * sum(site.numel for site in sites)


def buffer(state: dict[str, Any], key: str, weight: Tensor, site: Site) -> Tensor:
    """The part of a full-size buffer that belongs to a piece; zeros at first. It has the dtype of the values: fp32 or fp64."""
    whole = state.get(key)
    if whole is None:
        whole = state[key] = torch.zeros(prod(site.shape), dtype=weight.dtype, device=weight.device)
    part: Tensor = whole[site.start : site.start + site.count]
    return part.view(weight.shape)
