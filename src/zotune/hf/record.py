"""What a run did, in numbers: for its logs, its model card, and `zotune.json` beside the saved model."""

from typing import Any

from zotune.core.options import options_of
from zotune.hf.building import kind_of
from zotune.optim.optimizer import ZO
from zotune.version import __version__


def make_record(trainer: Any, zo: ZO, *, tokens: int, tokens_forwarded: int, sources: dict[str, str]) -> dict[str, Any]:
    """Everything that the card tells; JSON values."""
    args, group = trainer.args, zo.param_groups[0]
    best = trainer.state.best_global_step if trainer.best_is_back else None
    return {
        "zotune": __version__,
        "method": zo.method.name,
        "method_options": _plain(options_of(zo.method)),
        "paper": zo.method.paper,
        "rule": zo.rule.name,
        "rule_options": _plain(options_of(zo.rule)),
        "steps": zo.step_number,
        "weights_of_step": zo.step_number if best is None else best,
        "refused_steps": zo.refused,
        "forwards": zo.forwards,
        "check_forwards": zo.engine.check_forwards,
        "batch": trainer.get_total_train_batch_size(args),
        "tokens": tokens,
        "tokens_forwarded": tokens_forwarded,
        "eps": float(group["eps"]),
        "lr": float(group.get("initial_lr", group["lr"])),  # a scheduler notes what it began with
        "lr_source": sources.get("learning_rate", "given"),
        "eps_source": sources.get("eps", "given"),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": float(group["weight_decay"]),
        "trained": kind_of(trainer.model).name,
        "trained_parameters": zo.weights.numel,
        "noise": zo.noise,
        "low_precision": zo.weights.low_precision.name,
        "seed": zo.seed,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        "ledger": zo.ledger is not None,
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in options.items()}


def numbers_to_log(zo: ZO) -> dict[str, float]:
    """What a trainer logs beside the loss: of the last step (rho, the projected gradient, and what else the method
    tells), and the counts of the run so far.
    """
    info = {} if zo.last is None else zo.last.estimate.info
    return {
        **{f"zo/{key}": float(value) for key, value in info.items()},
        "zo/eps": float(zo.param_groups[0]["eps"]),
        "zo/accepted": float(zo.last is None or zo.last.accepted),
        "zo/forwards": zo.forwards,
        "zo/refused": zo.refused,
    }
