"""Forward-only twins of TRL's trainers: supervised fine-tuning and direct preference optimisation."""

from dataclasses import dataclass
from typing import Any, ClassVar

from zotune.extras import require
from zotune.hf.mixin import ZOMixin
from zotune.hf.settings import ZOSettings

trl = require("trl", extra="trl", purpose="train with SFTTrainer or DPOTrainer")
SFTConfig: Any = trl.SFTConfig
SFTTrainer: Any = trl.SFTTrainer
DPOConfig: Any = trl.DPOConfig
DPOTrainer: Any = trl.DPOTrainer


@dataclass
class ZOSFTConfig(ZOSettings, SFTConfig):  # type: ignore[misc]
    """trl.SFTConfig with the settings of `ZOSettings`; no gradient checkpointing, no autocast."""


class ZOSFTTrainer(ZOMixin, SFTTrainer):  # type: ignore[misc]
    """trl.SFTTrainer with forward passes only: chat templates, packing, completion-only losses and adapters as there."""

    arguments: ClassVar[type[Any]] = ZOSFTConfig


@dataclass
class ZODPOConfig(ZOSettings, DPOConfig):  # type: ignore[misc]
    """trl.DPOConfig with the settings of `ZOSettings`; no gradient checkpointing, no autocast.

    `precompute_ref_log_probs=True` halves the work: otherwise the reference model reads the batch in every query again.
    """


class ZODPOTrainer(ZOMixin, DPOTrainer):  # type: ignore[misc]
    """trl.DPOTrainer with forward passes only.

    The reference is never perturbed: it is another model, or, with adapters, this one with its adapters disabled.
    """

    arguments: ClassVar[type[Any]] = ZODPOConfig
