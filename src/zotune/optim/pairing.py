"""Which methods, rules and moves that wait go together: said before any work starts."""

from collections.abc import Iterable, Sequence
from typing import Any

from zotune.core.direction import Combination, Direction, Scaled
from zotune.core.step import Method, Rule
from zotune.errors import ConfigError


def check_pair(method: Method, rule: Rule) -> None:
    """Raise a ConfigError if the rule cannot do what the method asks of it, or the other way round."""
    if "trial" in method.needs - rule.offers:
        raise ConfigError(
            f"Method {method.name!r} tries what the rule would do before it does it. Rule {rule.name!r} cannot be tried: it "
            "remembers earlier steps, so that the opposite step does not undo a step. Use rule 'sgd' or 'sign'."
        )
    if "recipe" in rule.needs and not method.has_recipe:
        raise ConfigError(
            f"Rule {rule.name!r} remembers estimates as a few numbers each, and those of method {method.name!r} hold tensors. "
            "Use rule 'momentum', which keeps a buffer."
        )


def trial_of(method: Method, rule: Rule, groups: Sequence[dict[str, Any]], direction: Direction) -> Direction:
    """Where the rule would move the weights, on all groups: for methods that try steps.

    Raises:
        ConfigError: a group's weights decay.
    """
    if any(float(group["weight_decay"]) for group in groups):
        raise ConfigError(
            f"Method {method.name!r} tries steps of the rule, which weight decay would falsify: set it to 0."
        )
    trials = [rule.trial(direction, group) for group in groups]
    if len(trials) == 1:
        return trials[0]
    names = [dict.fromkeys(group["param_names"], 1.0) for group in groups]
    return Combination(tuple((1.0, Scaled(t, n, otherwise=0.0)) for t, n in zip(trials, names, strict=True)))


def check_folding(fold_every: int, method: Method, rule: Rule, groups: Iterable[dict[str, Any]]) -> None:
    """Raise a ConfigError if moves are to wait that cannot."""
    if fold_every == 0:
        return
    if fold_every < 0:
        raise ConfigError(f"fold_every must be at least 0 steps (0: nothing waits, 50 is usual); got {fold_every}.")
    advice = "Leave it at 0, or"
    if "slope" in method.needs:
        raise ConfigError(
            f"fold_every={fold_every} leaves stored weights behind, and method {method.name!r} differentiates at the stored "
            f"weights. {advice} use a method that asks for losses alone."
        )
    if "linear" not in rule.offers:
        raise ConfigError(
            f"fold_every={fold_every} writes moves later, and those of rule {rule.name!r} are not multiples of the "
            f"estimate. {advice} use rule sgd."
        )
    if any(float(group["weight_decay"]) for group in groups):
        raise ConfigError(
            f"fold_every={fold_every} writes moves later, and weight decay moves every number by itself. {advice} set "
            "weight_decay to 0."
        )


def may_be_late(method: Method, rule: Rule, groups: Iterable[dict[str, Any]]) -> bool:
    """Whether each move can wait, without another bit, for the query that reads the tensor next: see `Folding`."""
    if method.low_rank or "slope" in method.needs or "linear" not in rule.offers:
        return False
    return not any(float(group["weight_decay"]) for group in groups)
