"""Training a part of the model's own weights: the output head, or norms and biases.

These tensors keep the model's dtype. In a bf16 or fp16 model their low-order bits are carried beside them, as in full
tuning, so small updates arrive; the modules go on computing in one dtype, and the saved folder holds the whole model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from zotune.errors import ModelError
from zotune.tuning.base import BaseMode, refuse_adapters, train_only


@dataclass(frozen=True)
class Head(BaseMode):
    """The output head alone. A head that is tied to the embedding is untied first: a copy is trained, the embedding stays."""

    name: ClassVar[str] = "head"
    lr: ClassVar[float] = 1e-5
    eps: ClassVar[float | None] = None
    source: ClassVar[str] = "not from a paper: ten times MeZO's for full tuning, not measured; search"

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`. Nothing is random here."""
        refuse_adapters(model, self.name)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), nn.Parameter):
            raise ModelError(
                f"{type(model).__name__} does not name an output head with a weight, so mode 'head' has nothing to "
                "train. Choose mode 'norm_bias' or 'lora'."
            )
        _untie(model, head)
        train_only(model, list(head.parameters()))
        return model


def _untie(model: Any, head: nn.Module) -> None:
    """Give the head copies of what it shares, and say so in the configuration, which is saved with the model."""
    others = {id(p) for m in model.modules() if m is not head for p in m._parameters.values()}
    shared = [name for name, parameter in head._parameters.items() if id(parameter) in others and parameter is not None]
    for name in shared:  # the matrix with the embedding; RoBERTa's bias with its own second name
        parameter = head._parameters[name]
        assert parameter is not None
        setattr(head, name, nn.Parameter(parameter.detach().clone()))
    if shared:
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        for config in (model.config, text):
            config.tie_word_embeddings = False


@dataclass(frozen=True)
class NormBias(BaseMode):
    """Norm weights and all biases, as BitFit (Ben Zaken et al. 2022) with the norms: 0.1 % of a model or less."""

    name: ClassVar[str] = "norm_bias"
    lr: ClassVar[float] = 1e-4
    eps: ClassVar[float | None] = None
    source: ClassVar[str] = "not from a paper: a hundred times MeZO's for full tuning, not measured; search"

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`. Nothing is random here."""
        refuse_adapters(model, self.name)
        trained = {
            id(parameter): parameter
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name == "bias" or "norm" in type(module).__name__.lower()
        }
        if not trained:
            raise ModelError(f"{type(model).__name__} has neither biases nor norm weights. Choose mode 'lora'.")
        train_only(model, list(trained.values()))
        return model
