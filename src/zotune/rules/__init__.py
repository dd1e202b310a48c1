"""Rules: how an estimate moves the weights, one tensor at a time. The registry is a plain dict; add a line for a new rule."""

from typing import Any

from zotune.core.errors import ConfigError
from zotune.core.registry import check_name, check_options
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
    if not isinstance(rule, str):
        if options:
            raise ConfigError("Rule options go with a rule's name; a rule object already has its own.")
        return rule
    check_name("rule", rule, RULES)
    made: Rule = RULES[rule](**check_options("rule", rule, RULES[rule], options or {}))
    return made
