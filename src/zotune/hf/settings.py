"""What a forward-only run adds to TrainingArguments, and which of its defaults it replaces: one dataclass to mix in.

No library is needed here: `arguments.py` and `trl.py` put it together with the classes of transformers and TRL. The same
fields are read from Python, from YAML and from the command line (`HfArgumentParser`, `TrlParser`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from zotune.errors import ConfigError
from zotune.hf.refusals import refuse_first_order
from zotune.methods import make_method
from zotune.optim.pairing import check_pair
from zotune.optim.parameters import check_choices
from zotune.rules import make_rule
from zotune.runs.config import setting


@dataclass
class ZOSettings:
    """Fields for a class derived from this one and from TrainingArguments, in this order.

    `seed` of TrainingArguments also fixes all noise, `weight_decay` is the optimizer's, and
    `gradient_accumulation_steps` micro-batches make one batch: every query of a step goes through all of them.
    """

    method: str = setting("mezo", "How a gradient is estimated from losses; `zotune methods` lists the methods.")
    method_options: dict | str | None = setting(  # type: ignore[type-arg]
        None, 'Options of the method: a mapping, or text as "n=4,sides=1" or JSON.'
    )
    rule: str = setting("sgd", "How an estimate moves the weights; `zotune methods` lists the rules.")
    rule_options: dict | str | None = setting(  # type: ignore[type-arg]
        None, 'Options of the rule: a mapping, or text as "beta=0.9" or JSON.'
    )
    eps: float | None = setting(
        None, "Perturbation scale. Default: 1e-3 (1e-2 for bf16 weights); 1e-2 for LoRA, 1e-1 for a prefix (MeZO)."
    )
    noise: str = setting("normal", "normal (table), gaussian (exact) or rademacher.")
    low_precision: str = setting("carry", "How bf16 and fp16 weights take small updates: carry, plain or stochastic.")
    engine: str = setting("auto", "auto, batched, layerwise or in_place.")
    ledger: str | None = setting(
        "ledger.jsonl", "File that takes every loss, so that the run can be replayed; none for no ledger."
    )

    # Defaults of TrainingArguments that make no sense here.
    learning_rate: float | None = setting(
        None, "Default: that of the source for what is trained: 1e-6 for all weights, 5e-5 for LoRA, 1e-2 for a prefix."
    )
    lr_scheduler_type: str = setting("constant", "As in the papers; any schedule of transformers can be named.")
    max_grad_norm: float = setting(0.0, "Must stay 0: there is no gradient to clip.")
    bf16: bool = setting(False, "Forwards under bf16 autocast; the weights stay as loaded. Better: load them in bf16.")
    gradient_checkpointing: bool | None = setting(None, "Must stay off: there is no backward pass.")
    logging_nan_inf_filter: bool = setting(False, "Off, so that the logs show a loss that is not a finite number.")

    _OPTIONS: ClassVar[tuple[str, ...]] = ("method_options", "rule_options")

    def __post_init__(self) -> None:
        """Bring text to the types of the fields, refuse what cannot be honoured, then check as transformers does."""
        _read_numbers(self)
        for name in self._OPTIONS:
            setattr(self, name, read_options(name, getattr(self, name)))
        if isinstance(self.ledger, str) and self.ledger.lower() in ("", "none", "null"):
            self.ledger = None
        refuse_first_order(self)
        self._check_choices()
        super().__post_init__()  # type: ignore[misc]

    def _check_choices(self) -> None:
        method = make_method(self.method, self.method_options)  # type: ignore[arg-type]
        check_pair(method, make_rule(self.rule, self.rule_options))  # type: ignore[arg-type]
        check_choices(self.noise, self.low_precision, self.engine)
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be at least 0 and finite; got {self.learning_rate}.")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ConfigError(f"eps must be positive and finite; got {self.eps}.")


def read_options(name: str, given: Any) -> dict[str, Any]:
    """Options as a dict, from a mapping, from JSON, or from text as "n=4,sides=1".

    Raises:
        ConfigError: anything else.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = _parse(name, given.strip())
    if not isinstance(given, Mapping):
        raise ConfigError(f'{name} must be a mapping or text as "n=4,sides=1"; got {given!r}.')
    return {str(key): _number(value) for key, value in given.items()}


def _parse(name: str, text: str) -> Any:
    if text.startswith("{"):
        try:
            return yaml.safe_load(text)  # JSON, and `{n: 4}` too
        except yaml.YAMLError as error:
            raise ConfigError(f"{name} is neither JSON nor name=value: {text!r} ({error}).") from error
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not separator for _, separator, _ in pairs):
        raise ConfigError(f'{name} must read "name=value,name=value" or be JSON; got {text!r}.')
    try:
        return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:  # a list or a mapping, cut at its commas
        raise ConfigError(
            f"{name} must be JSON where a value is more than a number or a word; got {text!r}."
        ) from error


def _number(value: Any) -> Any:
    """YAML and JSON within text read 1e-6 as a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_numbers(arguments: Any) -> None:
    """Text to floats, for every field that is one: YAML reads `learning_rate: 1e-6` as text."""
    hints = get_type_hints(type(arguments))
    for each in fields(arguments):
        value, hint = getattr(arguments, each.name), hints[each.name]
        if isinstance(value, str) and float in (hint, *get_args(hint)) and str not in get_args(hint):
            try:
                setattr(arguments, each.name, float(value))
            except ValueError as error:
                raise ConfigError(f"{each.name} must be a number; got {value!r}.") from error
