"""Tuning modes: which numbers of a model are trained. The registry is a plain dict; add a line for a new mode.

A mode also brings the learning rate and eps that its source uses, since adapters live on another scale than weights.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from zotune.core.errors import ConfigError, ModelError
from zotune.core.registry import check_name, check_options, options_of
from zotune.extras import require


class Mode(Protocol):
    """Chooses and makes what is trained."""

    name: ClassVar[str]
    lr: ClassVar[float]
    eps: ClassVar[float | None]  # None: by the dtype of the trained tensors
    source: ClassVar[str]  # of lr and eps

    def attach(self, model: Any, seed: int) -> Any:
        """The model with exactly the numbers to train requiring grad."""
        ...


@dataclass(frozen=True)
class Full:
    """All weights."""

    name: ClassVar[str] = "full"
    lr: ClassVar[float] = 1e-6
    eps: ClassVar[float | None] = None
    source: ClassVar[str] = "MeZO's for full tuning of OPT, Table 16"

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`."""
        return model


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021) made by PEFT: W + (alpha / rank) B A, with A and B trained in fp32."""

    rank: int = 8
    alpha: float = 16.0
    targets: str | None = None  # module names, separated by commas; None: PEFT's for the architecture, query and value

    name: ClassVar[str] = "lora"
    lr: ClassVar[float] = 5e-5
    eps: ClassVar[float | None] = 1e-2
    source: ClassVar[str] = "MeZO's for LoRA on OPT, Table 16"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1; got {self.rank} (mode 'lora').")
        if not self.alpha > 0:
            raise ConfigError(f"alpha must be positive; got {self.alpha} (mode 'lora').")

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`. The random start of A is a function of `seed`; torch's generators are left as they were."""
        peft = require("peft", extra="hf", purpose="train LoRA adapters")
        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=None if self.targets is None else [part.strip() for part in self.targets.split(",")],
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), without_peft_warning():
            torch.manual_seed(seed)
            try:
                return peft.get_peft_model(model, settings).eval()
            except ValueError as error:
                raise ModelError(
                    f"LoRA cannot be attached: {error} Name the modules: --mode-option targets=q_proj,v_proj."
                ) from error


MODES: dict[str, type] = {
    "full": Full,
    "lora": Lora,
}


def make_mode(name: str, options: dict[str, Any] | None = None) -> Mode:
    """A mode from its name and options.

    Raises:
        ConfigError: unknown name or option, or an option out of range.
    """
    check_name("mode", name, MODES)
    made: Mode = MODES[name](**check_options("mode", name, MODES[name], options or {}))
    return made


def describe_mode(mode: Mode, seed: int) -> dict[str, Any]:
    """What a ledger's header says of a mode, so that the adapters can be made again."""
    return {"name": mode.name, "seed": seed, **options_of(mode)}


def mode_of(description: dict[str, Any] | None) -> tuple[Mode, int]:
    """A mode and its seed from what a ledger's header says; ledgers without a mode are of full tuning."""
    options = dict(description or {"name": "full", "seed": 0})
    seed = int(options.pop("seed"))
    return make_mode(options.pop("name"), options), seed


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT asks transformers for a name that is on its way out; users can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
