"""Tuning modes: which numbers of a model are trained. The registry is a plain dict; add a line for a new mode.

A mode also brings the learning rate and eps that its source uses, since adapters live on another scale than weights.
"""

from typing import Any

from zotune.core.options import options_of
from zotune.core.registry import make
from zotune.tuning.base import BaseMode, Mode, without_peft_warning
from zotune.tuning.full import Full
from zotune.tuning.lora import Lora
from zotune.tuning.parts import Head, NormBias
from zotune.tuning.virtual import Prefix, Prompt

MODES: dict[str, type[BaseMode]] = {
    "full": Full,
    "lora": Lora,
    "prefix": Prefix,
    "prompt": Prompt,
    "head": Head,
    "norm_bias": NormBias,
}

__all__ = [
    "MODES",
    "BaseMode",
    "Full",
    "Head",
    "Lora",
    "Mode",
    "NormBias",
    "Prefix",
    "Prompt",
    "describe_mode",
    "make_mode",
    "mode_of",
    "without_peft_warning",
]


def make_mode(name: str, options: dict[str, Any] | None = None) -> Mode:
    """A mode from its name and options.

    Raises:
        ConfigError: unknown name or option, or an option out of range.
    """
    made: Mode = make("mode", MODES, name, options)
    return made


def describe_mode(mode: Mode, seed: int) -> dict[str, Any]:
    """What a ledger's header says of a mode, so that the adapters can be made again."""
    return {"name": mode.name, "seed": seed, **options_of(mode)}


def mode_of(description: dict[str, Any] | None) -> tuple[Mode, int]:
    """A mode and its seed from what a ledger's header says; ledgers without a mode are of full tuning."""
    options = dict(description or {"name": "full", "seed": 0})
    seed = int(options.pop("seed"))
    return make_mode(options.pop("name"), options), seed
