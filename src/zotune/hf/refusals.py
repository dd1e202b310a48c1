"""Settings of first-order training that would do nothing, or harm, in a forward-only run: each refused with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zotune.errors import ConfigError


@dataclass(frozen=True)
class Refusal:
    """A field of TrainingArguments, when it is refused, and why."""

    field: str
    wrong: Callable[[Any], bool]
    why: str


def _truthy(value: Any) -> bool:
    return bool(value)


NO_BACKWARD = "there is no backward pass for which activations would be computed again; leave it out"
FIRST_ORDER = (
    "it configures a first-order optimizer, and this run has none; `method` and `rule` say how the weights move, "
    "`method_options` and `rule_options` set their constants"
)
SHARDED = (
    "it shards parameters, gradients and optimizer state; a forward-only run has no gradients to shard, and its tensors "
    "must be whole. Start one replica per device with `torchrun --nproc-per-node N script.py`"
)
REFUSALS = (
    Refusal(
        "fp16",
        _truthy,
        "fp16=True is mixed precision with a gradient scaler, which fails where there are no gradients. Load the model in "
        "fp16 or bf16 instead (`dtype=torch.bfloat16`); zotune carries the bits that small updates need",
    ),
    Refusal("gradient_checkpointing", _truthy, NO_BACKWARD),
    Refusal("activation_checkpointing", _truthy, NO_BACKWARD),
    Refusal("activation_offloading", _truthy, NO_BACKWARD),
    Refusal(
        "max_grad_norm",
        _truthy,
        "there is no gradient whose norm could be clipped, and it would be ignored silently. Leave it at 0; rule 'sign' "
        "or 'adam' bounds the size of a step",
    ),
    Refusal("optim_args", _truthy, FIRST_ORDER),
    Refusal("optim_target_modules", _truthy, FIRST_ORDER),
    Refusal("deepspeed", _truthy, SHARDED),
    Refusal("fsdp", _truthy, SHARDED),
    Refusal("parallelism_config", _truthy, SHARDED),
)
ADAM_CONSTANTS = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")


def refuse_first_order(arguments: Any) -> None:
    """Raise a ConfigError that lists every setting which a forward-only run cannot honour.

    Fields that this version of transformers does not have are passed over.
    """
    wrong = [
        f"{refusal.field}={getattr(arguments, refusal.field)!r}: {refusal.why}."
        for refusal in REFUSALS
        if refusal.wrong(getattr(arguments, refusal.field, None))
    ]
    defaults = {field.name: field.default for field in fields(arguments)}
    wrong += [
        f"{name}={getattr(arguments, name)!r}: {FIRST_ORDER}."
        for name in ADAM_CONSTANTS
        if name in defaults and getattr(arguments, name) != defaults[name]
    ]
    if wrong:
        raise ConfigError("Settings that a forward-only run cannot honour:\n  " + "\n  ".join(wrong))


def refuse_data_parallel(count: int) -> None:
    """Raise a ConfigError if transformers would wrap the model in `nn.DataParallel`."""
    if count > 1:
        raise ConfigError(
            f"{count} GPUs are visible to one process, so transformers would wrap the model in nn.DataParallel, whose "
            "replicas are copied anew for every forward and do not see the perturbed weights reliably. Start one process per "
            f"GPU: torchrun --nproc-per-node {count} script.py; or make one visible: CUDA_VISIBLE_DEVICES=0."
        )


def refuse_sharding(trainer: Any) -> None:
    """Raise a ConfigError if the launcher, not the arguments, asked for DeepSpeed or FSDP."""
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise ConfigError(f"{name.removeprefix('is_').removesuffix('_enabled')}: {SHARDED}.")


def refuse_folding(optimizer: Any) -> None:
    """Raise a ConfigError if the optimizer lets moves wait: the trainer reads the model's tensors at any time."""
    every = getattr(getattr(optimizer, "folding", None), "every", 0)
    if every:
        raise ConfigError(
            f"fold_every={every} lets the model's own tensors lag behind between folds, and a trainer evaluates and saves "
            "them at any time. Use fold_every=0 here."
        )


def refuse_half_a_checkpoint(folder: Path | None) -> None:
    """Raise a ConfigError if a run is to go on from a checkpoint of weights alone: it would draw its first noise again."""
    if folder is not None and folder.is_dir() and not (folder / "optimizer.pt").is_file():
        raise ConfigError(
            f"{folder} holds no optimizer.pt, so no run can go on from it: save_only_model=True keeps the weights alone. Save "
            "whole checkpoints, or load that folder as the model of a new run (with another seed, so that its noise is new)."
        )
