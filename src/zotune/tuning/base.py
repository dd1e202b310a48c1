"""What a mode is, and what several modes share."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from zotune.core.options import Options
from zotune.errors import ModelError

Named = Sequence[tuple[str, Tensor]]  # (canonical name, tensor)
Groups = list[dict[str, Any]]  # parameter groups as ZO takes them


class Mode(Protocol):
    """Chooses and makes what is trained."""

    name: ClassVar[str]
    lr: ClassVar[float]
    eps: ClassVar[float | None]  # None: by the dtype of the trained tensors
    source: ClassVar[str]  # of lr and eps

    def attach(self, model: Any, seed: int) -> Any:
        """The model with exactly the numbers to train requiring grad.

        What is made is a function of the model, the mode's options and `seed`, and no global generator moves, so that
        a ledger's header is enough to attach the mode again.

        Raises:
            ModelError: this mode cannot be had on this model.
        """
        ...

    def groups(self, named: Named, eps: float | None = None) -> Groups | None:
        """Parameter groups with their own eps, where the scales of what is trained differ; None for one group.

        ZO makes of them a scale of the direction: on a group, directions are multiplied by its eps over the first
        group's, in the probes and in the update alike.

        Args:
            named: canonical names and tensors, as they are before the first step; those to train are taken.
            eps: of the first group; None takes ZO's default.
        """
        ...


class BaseMode(Options):
    """A mode is a frozen dataclass; its fields are its options."""

    part: ClassVar[str] = "mode"
    lr: ClassVar[float]
    eps: ClassVar[float | None]
    source: ClassVar[str]

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`."""
        raise NotImplementedError

    def groups(self, named: Named, eps: float | None = None) -> Groups | None:
        """See `Mode.groups`."""
        return None


def refuse_adapters(model: Any, mode: str) -> None:
    """Raise a ModelError if the model carries PEFT adapters already: adapters on adapters cannot be saved and found again."""
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"mode {mode!r} is given a model that carries an adapter already. Merge it into the weights first: "
            "peft.PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)."
        )


def is_masked_lm(model: Any) -> bool:
    """Whether the model fills in masks (RoBERTa, BERT) instead of predicting the next token."""
    return type(model).__name__.endswith("ForMaskedLM")


def train_only(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Freeze everything but these parameters."""
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT asks transformers for a name that is on its way out, and tells of GPT-2's transposed matrices that it handles
    them: users can do nothing about either.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
