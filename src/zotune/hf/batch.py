"""The loss of a whole batch, in its micro-batches: what the optimizer asks for at every point of a step."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Counters of TRL's trainers that their `compute_loss` raises at each call, and that must count a batch once.
COUNTERS = ("_total_train_tokens",)


class MicroBatch(NamedTuple):
    """A part of a batch, and what the loss is divided by."""

    inputs: Any
    items: Any  # num_items_in_batch, of the whole batch
    parts: int  # micro-batches of the whole batch


class WholeBatch:
    """A closure over the micro-batches of one batch.

    TRL's trainers file metrics at each call of `compute_loss`: those of all queries of a step are averaged in the logs,
    as the loss is; but a batch's tokens are counted once.
    """

    def __init__(self, trainer: Any, model: Any, parts: list[MicroBatch]) -> None:
        self.parts = parts
        self.forwards = 0
        self._trainer, self._model = trainer, model
        self._counters = {name: getattr(trainer, name) for name in COUNTERS if hasattr(trainer, name)}

    def loss(self) -> Tensor:
        """The loss under whatever weights the model has at the moment, 0-d float64, the same number on all processes."""
        trainer = self._trainer
        self.forwards += 1
        for name, value in self._counters.items():
            setattr(trainer, name, value)
        total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        for micro in self.parts:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(self._model, _copied(micro.inputs), num_items_in_batch=micro.items)
            loss = torch.as_tensor(loss).detach().to(trainer.args.device, torch.float64)
            total = total + (loss if self._is_scaled(micro) else loss / micro.parts)
        if trainer.accelerator.num_processes > 1:
            # the mean, also where each process' loss was scaled by their number (average_tokens_across_devices);
            # gathered and not reduced, so that all processes add in the same order and get the same bits
            total = trainer.accelerator.gather(total.reshape(1)).mean()
        return total

    def _is_scaled(self, micro: MicroBatch) -> bool:
        """Whether the loss is normalised over the whole batch already, as `Trainer.training_step` decides it."""
        said = getattr(self._trainer, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_model = self._trainer.model_accepts_loss_kwargs and micro.items is not None
        return bool(by_model or self._trainer.compute_loss_func is not None)


def _copied(inputs: Any) -> Any:
    """Inputs that `compute_loss` may take entries out of; a collator may also have made a tuple or a list."""
    return dict(inputs) if isinstance(inputs, Mapping) else copy.copy(inputs)
