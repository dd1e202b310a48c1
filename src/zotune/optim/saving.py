"""What of an optimizer is written down: its settings in a ledger's header, its tensors in a state."""

from collections.abc import Mapping
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


def take_up_tensors(opt: Any, state_dict: Mapping[str, Any]) -> None:
    """Per-tensor states with the dtypes they were saved in (torch's own loading casts them to the parameter's)."""
    parameters = [parameter for group in opt.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and key != "step":
                opt.state[parameter][key] = value.detach().clone().to(parameter.device)
        opt.weights.by_tensor[id(parameter)].carried = opt.state[parameter].get("carried")


def refuse_lost_moves(state_dict: Mapping[str, Any], fold_every: int) -> None:
    """Raise a ConfigError if a state holds pending moves and the optimizer that is to take it up has no place for them."""
    if state_dict["param_groups"][0].get("zo_pending") and not fold_every:
        raise ConfigError(
            "This state holds moves that wait to be folded into the weights, and this optimizer folds at once. Make it "
            "with the fold_every of the run that was saved."
        )
