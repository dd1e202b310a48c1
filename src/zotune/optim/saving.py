"""What of an optimizer is written down: its settings in a ledger's header, its tensors in a state."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.core.options import options_of
from zotune.errors import ConfigError
from zotune.version import __version__


def describe(opt: Any) -> dict[str, Any]:
    """Settings and versions of a `ZO`. How rarely low-rank moves are folded is said with the rule: it changes the last bits."""
    rule_options = options_of(opt.rule)
    if opt.folding.every and opt.folding.low_rank:
        rule_options["fold_every"] = opt.folding.every
    return {
        "ledger": 1,
        "zotune": __version__,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "method": {"name": opt.method.name, **options_of(opt.method)},
        "rule": {"name": opt.rule.name, **rule_options} if rule_options else opt.rule.name,
        "seed": opt.seed,
        "noise": opt.noise,
        "low_precision": opt.weights.low_precision.name,
        "sites": None,
        "tensors": len(opt.weights.slots),
        "parameters": opt.weights.numel,
        "groups": None,
    }


NO_STATE: dict[str, Any] = {"zo_method": {}, "zo_rule": {}, "zo_pending": [], "zo_kind": {}}  # between two savings


def parts_of_state(opt: Any) -> dict[str, Any]:
    """What a state holds beside torch's own: entries of its first group."""
    return {
        "zo_method": opt.method.state_dict(),
        "zo_rule": opt.rule.state_dict(),
        "zo_pending": opt.folding.state_dict(),
        "zo_kind": kind_of(opt),
    }


def kind_of(opt: Any) -> dict[str, Any]:
    """What a state must have in common with the `ZO` that takes it up: else its numbers would be read as other ones."""
    return {
        "method": opt.method.name,
        "rule": opt.rule.name,
        "noise": opt.noise,
        "low_precision": opt.weights.low_precision.name,
        "parameters": opt.weights.numel,
        "dtypes": sorted({str(slot.dtype).removeprefix("torch.") for slot in opt.weights}),
    }


def refuse_other_kind(opt: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise a ConfigError for the state of another kind of optimizer, or of other tensors, before anything is taken up."""
    groups = state_dict["param_groups"]
    if not groups or "zo_step" not in groups[0]:
        raise ConfigError("This is not the state of a zotune.ZO: it says nothing of steps, seed and method.")
    kind = kind_of(opt)
    differ = [
        f"{name} {was!r}, not {kind[name]!r}" for name, was in groups[0].get("zo_kind", {}).items() if was != kind[name]
    ]
    if differ:
        raise ConfigError(
            f"This state was saved with {'; '.join(differ)}. Make ZO as the run that was saved did, or begin anew with its "
            "weights alone."
        )
    for saved, group in zip(groups, opt.param_groups, strict=False):  # another number of groups is torch's own error
        if saved.get("param_names", group["param_names"]) != group["param_names"]:
            pairs = zip_longest(saved["param_names"], group["param_names"])
            was, now = next(pair for pair in pairs if pair[0] != pair[1])
            raise ConfigError(
                f"This state is of other tensors, or of the same in another order: it has {was!r} where this ZO has {now!r}. "
                "Give ZO the model's named_parameters() as the run that was saved did."
            )


def take_up(opt: Any, state_dict: Mapping[str, Any]) -> None:
    """After torch's own loading: the parts, and per-tensor states with the dtypes they were saved in (not the parameter's)."""
    parameters = [parameter for group in opt.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and key != "step":
                opt.state[parameter][key] = value.detach().clone().to(parameter.device)
        opt.weights.by_tensor[id(parameter)].carried = opt.state[parameter].get("carried")
    saved = opt.param_groups[0]
    opt.method.load_state_dict(saved["zo_method"])
    opt.rule.load_state_dict(saved["zo_rule"])
    opt.folding.load_state_dict(saved.get("zo_pending", []))


def refuse_lost_moves(state_dict: Mapping[str, Any], fold_every: int) -> None:
    """Raise a ConfigError if a state holds pending moves and the optimizer that is to take it up has no place for them."""
    if state_dict["param_groups"][0].get("zo_pending") and not fold_every:
        raise ConfigError(
            "This state holds moves that wait to be folded into the weights, and this optimizer folds at once. Make it "
            "with the fold_every of the run that was saved."
        )
