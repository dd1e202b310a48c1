"""Low-rank adapters."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from zotune.errors import ModelError
from zotune.extras import require
from zotune.tuning.base import BaseMode, is_masked_lm, refuse_adapters, without_peft_warning

EVERY = "all-linear"  # PEFT's word for every linear module but the output head


@dataclass(frozen=True)
class Lora(BaseMode):
    """Low-rank adapters (Hu et al. 2021) made by PEFT: W + (alpha / rank) B A, with A and B trained in fp32."""

    rank: int = 8
    alpha: float = 16.0
    targets: str | None = None
    """Names of modules, separated by commas, or `all-linear`; None: PEFT's for the architecture, query and value."""

    name: ClassVar[str] = "lora"
    lr: ClassVar[float] = 5e-5
    eps: ClassVar[float | None] = 1e-2
    source: ClassVar[str] = "MeZO's for LoRA on OPT, Table 16"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("rank", self.rank >= 1, "at least 1")
        self.check("alpha", self.alpha > 0, "positive")

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`. The random start of A is a function of `seed`; torch's generators are left as they were."""
        peft = require("peft", extra="hf", purpose="train LoRA adapters")
        refuse_adapters(model, self.name)
        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=self._targets(model),
            task_type=None if is_masked_lm(model) else "CAUSAL_LM",
        )
        with torch.random.fork_rng(), without_peft_warning():
            torch.manual_seed(seed)
            try:
                return peft.get_peft_model(model, settings).eval()
            except ValueError as error:
                raise ModelError(f"LoRA cannot be attached: {error} {_advice(model)}") from error

    def _targets(self, model: nn.Module) -> list[str] | str | None:
        if self.targets is None or self.targets.strip() == EVERY:
            return None if self.targets is None else EVERY
        names = [part.strip() for part in self.targets.split(",")]
        known = [name for name, _ in model.named_modules()]
        for name in names:  # PEFT asks for one match in all, and would pass over a misspelt second name
            if not any(module == name or module.endswith(f".{name}") for module in known):
                raise ModelError(f"LoRA cannot be attached: the model has no module {name!r}. {_advice(model)}")
        return names


def _advice(model: nn.Module) -> str:
    """Which names can be targets: the last parts of the names of all modules that hold a matrix."""
    found = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        }
    )
    return f"Name the modules: --mode-option targets=q_proj,v_proj. This model has {', '.join(found) or 'no matrix'}."
