"""The optimizer of a trainer: from its arguments, what its model trains, and the source of the defaults."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from zotune.core.ledger import Ledger, weights_hash
from zotune.core.site import canonical_name
from zotune.errors import ConfigError
from zotune.hf.settings import ZOSettings
from zotune.optim.optimizer import ZO
from zotune.rules.base import decays
from zotune.tuning import BaseMode, Full, Lora, Prefix, Prompt

# PEFT's names of kinds of adapters; kinds that no source speaks of take LoRA's numbers
KINDS: dict[str, type[BaseMode]] = {"LORA": Lora, "PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}


def kind_of(model: Any) -> type[BaseMode]:
    """What is trained: all weights, or a kind of PEFT adapter. Brings a learning rate and an eps with their source."""
    settings = getattr(model, "peft_config", None)
    if not settings:
        return Full
    names = {str(getattr(each.peft_type, "value", each.peft_type)) for each in settings.values()}
    return KINDS.get(names.pop(), Lora) if len(names) == 1 else Lora


def complete(arguments: ZOSettings, model: Any) -> dict[str, str]:
    """Fill in the learning rate and eps that were left open; returns where both come from, in words."""
    kind = kind_of(model)
    sources = {
        "learning_rate": "given" if arguments.learning_rate is not None else kind.source,
        "eps": "given" if arguments.eps is not None else kind.source if kind.eps is not None else "for these weights",
    }
    if arguments.learning_rate is None:
        arguments.learning_rate = kind.lr
    if arguments.eps is None:
        arguments.eps = kind.eps
    return sources


def build_optimizer(
    arguments: Any,
    model: nn.Module,
    decayed: Collection[str],
    ledger: Ledger | None,
    options: dict[str, Any] | None = None,
    cls: type[ZO] = ZO,
) -> ZO:
    """Make ZO over what the model trains.

    Args:
        arguments: completed settings.
        model: whose parameters that require grad are trained.
        decayed: names of the parameters that weight decay applies to.
        ledger: of the run.
        options: further arguments of ZO that win over the settings.
        cls: ZO, or a class derived from it.
    """
    options = dict(options or {})
    decay = options.pop("weight_decay", arguments.weight_decay)  # of those that decay, where ZO's own is of all
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    made = cls(
        _groups(trained, decayed, decay),
        **{
            "method": arguments.method,
            "method_options": arguments.method_options,
            "rule": arguments.rule,
            "rule_options": arguments.rule_options,
            "lr": arguments.learning_rate,
            "eps": arguments.eps,
            "seed": arguments.seed,
            "noise": arguments.noise,
            "low_precision": arguments.low_precision,
            "engine": _engine(arguments),
            "ledger": ledger,
            **options,
        },
    )
    arguments.eps = float(made.param_groups[0]["eps"])
    return made


def _engine(arguments: Any) -> str:
    """A compiled model must keep its parameters: swapping them would compile it again for every module."""
    if arguments.engine == "auto" and getattr(arguments, "torch_compile", False):
        return "in_place"
    return str(arguments.engine)


def _groups(trained: Sequence[tuple[str, Tensor]], decayed: Collection[str], decay: float) -> list[dict[str, Any]]:
    """One group where the rules' own choice (no biases, no norms) is the trainer's; else one for each."""
    differ = [name for name, _ in trained if (name in decayed) != decays(canonical_name(name))]
    if not decay or not differ:
        return [{"params": trained, "weight_decay": decay}]
    parts: list[tuple[Callable[[str], bool], float]] = [
        (lambda name: name in decayed, decay),
        (lambda name: name not in decayed, 0.0),
    ]
    groups = [{"params": [pair for pair in trained if has(pair[0])], "weight_decay": value} for has, value in parts]
    return [group for group in groups if group["params"]]


def describe_base(model: Any) -> dict[str, Any]:
    """What the ledger's header says of the weights that the run begins with."""
    named = [(canonical_name(name), tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    config = getattr(model, "config", None)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in named}
    described: dict[str, Any] = {"model": str(getattr(config, "_name_or_path", "")), "weights": weights_hash(named)}
    return {**described, "dtype": dtypes.pop()} if len(dtypes) == 1 else described


def unwrapped(optimizer: Any) -> ZO:
    """The ZO inside whatever accelerate put around it.

    Raises:
        ConfigError: it is another optimizer.
    """
    inner = optimizer
    while not isinstance(inner, ZO) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if inner is None:
        raise ConfigError("There is no optimizer yet: it is made when training begins.")
    if not isinstance(inner, ZO):
        raise ConfigError(
            f"A forward-only trainer needs zotune.ZO as its optimizer, got {type(inner).__name__}: there are no gradients "
            "for another one. Leave `optimizers` out, or pass (zotune.ZO(model.named_parameters(), ...), scheduler)."
        )
    return inner
