"""Rules: how an estimate moves the weights, one tensor at a time. The registry is a plain dict; add a line for a new rule."""

from typing import Any

from zotune.core.registry import make
from zotune.core.step import Rule
from zotune.rules.adam import Adam
from zotune.rules.adamm import AdaMM
from zotune.rules.jaguar import Jaguar
from zotune.rules.momentum import Momentum
from zotune.rules.momentum_replayed import MomentumReplayed
from zotune.rules.sgd import SGD
from zotune.rules.sign import SignSGD

RULES: dict[str, type] = {
    "sgd": SGD,
    "sign": SignSGD,
    "momentum": Momentum,
    "momentum_replayed": MomentumReplayed,
    "adam": Adam,
    "adamm": AdaMM,
    "jaguar": Jaguar,
}


def make_rule(rule: "str | Rule", options: dict[str, Any] | None = None) -> Rule:
    """A rule from its name and options, or the rule itself.

    Raises:
        ConfigError: unknown name or option (the nearest known one is suggested), or an option out of range.
    """
    made: Rule = make("rule", RULES, rule, options)
    return made
