"""Train and eval mode of a model's modules: set for a while, and each module's own back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to them, modules are in their own modes again afterwards, which may differ within a model."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off in every module."""
    with kept_modes(model):
        model.eval()
        yield


@contextmanager
def passing_back(model: Any, *, train: bool, checkpointing: bool) -> Iterator[None]:
    """For backward passes: train or eval mode, and layers checkpointed if wanted (transformers do so in train mode alone)."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers renamed it
    with kept_modes(model):
        if checkpointing:
            getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        model.train(train)
        try:
            yield
        finally:
            if checkpointing:
                getattr(model, f"{kind}_checkpointing_disable")()


def has_prefix(model: Any) -> bool:
    """Whether PEFT puts keys and values before the text: layers that run again in a backward pass would read them twice."""
    return "PREFIX" in str(getattr(getattr(model, "active_peft_config", None), "peft_type", ""))
