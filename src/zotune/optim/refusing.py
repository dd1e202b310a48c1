"""What torch lets one do with an optimizer, and ZO cannot: each is refused with what to do instead."""

from typing import Any

import torch

from zotune.errors import ConfigError


class Refusing(torch.optim.Optimizer):
    """An optimizer whose tensors are fixed when it is made, and that makes no gradients."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks an optimizer before it steps: the first moment to see that there is one."""
        raise ConfigError(
            "A gradient scaler (fp16 mixed precision) has nothing to scale: ZO makes no gradients, and the scaler would stop "
            "with 'No inf checks were recorded'. Step without it: bf16 autocast, or weights in fp16, need none."
        )

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError(
            "ZO cannot be copied or pickled as a whole: its noise and its state hang on the tensors that it was made with. "
            "Copy the model, make a ZO for the copy, and load state_dict() into it."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at construction: sites, noise and ledger are fixed then."""
        if hasattr(self, "weights"):
            raise ConfigError("ZO's tensors are fixed when it is made: give all groups to the constructor.")
        super().add_param_group(param_group)
