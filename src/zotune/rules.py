"""Rules: how an estimate moves the weights, one tensor at a time."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.errors import ConfigError
from zotune.core.site import Site
from zotune.core.step import Rule

# Tensors whose canonical name contains one of these are not decayed. MeZO's code lists bias, layer_norm and layernorm,
# which leaves out LLaMA's final `model.norm`; here every norm counts.
NO_DECAY = ("bias", "norm", "ln_")


def decays(name: str) -> bool:
    """Whether weight decay applies to a tensor of this canonical name."""
    return not any(part in name.lower() for part in NO_DECAY)


@dataclass(frozen=True)
class SGD:
    """w <- w - lr * (g + weight_decay * w); no decay for biases and norms."""

    name: ClassVar[str] = "sgd"
    extra_state: ClassVar[str] = "none"

    def __call__(
        self, weight: Tensor, site: Site, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """See `Rule`."""
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if lr == 0.0:
            return  # adding 0 would still turn -0.0 into 0.0
        if decay and decays(site.name):
            weight.mul_(1.0 - lr * decay)
        estimate.direction.add_to(weight, site, -lr)


RULES: dict[str, type] = {
    "sgd": SGD,
}


def make_rule(rule: "str | Rule") -> Rule:
    """A rule from its name, or the rule itself."""
    if not isinstance(rule, str):
        return rule
    if rule not in RULES:
        raise ConfigError(f"Unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    made: Rule = RULES[rule]()
    return made
