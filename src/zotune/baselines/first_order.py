"""First-order training with AdamW and gradient checkpointing, on the batches and the loss of zeroth-order runs.

The scorer shares prompts between options and computes no logits that the loss does not depend on, for this baseline as for
the others, so none is made to look slow.

Forward-equivalents: a backward pass costs one forward's worth of work for the gradients of activations, and one for those
of the weights, of which only the trained share is computed; checkpointing runs the forward once more. That makes
2 + share (+ 1) per step: 3 and 4 for full tuning, 2 and 3 for adapters. It is somewhat too much for checkpointing, which
spares the last matrix of each layer, and far too much for a mode that trains only what is on top of the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from zotune.baselines.meter import Usage, measure
from zotune.core.site import canonical_name
from zotune.errors import ClosureError, ConfigError, DataError, ParameterError
from zotune.evaluation.evaluate import Evaluation, evaluate
from zotune.rules.base import decays
from zotune.runs.config import SCHEDULES
from zotune.runs.training import batch_at
from zotune.tasks.encoding import Encoded
from zotune.tasks.module_modes import has_prefix, passing_back
from zotune.tasks.scoring import OptionScorer

Progress = Callable[[int, float], None]
"""Called after each step with the number of steps taken and the batch's loss."""

FIRST_ORDER: dict[str, tuple[float, str]] = {
    "full": (1e-5, "MeZO's for Adam on OPT, Table 16 (of 1e-5, 5e-5, 8e-5)"),
    "lora": (2e-4, "Hu et al. 2021 for GPT-3"),
    "prefix": (1e-2, "not from a paper: search"),
    "prompt": (1e-2, "not from a paper: search"),
    "head": (1e-4, "not from a paper: search"),
    "norm_bias": (1e-3, "of the grid of BitFit, Ben Zaken et al. 2022"),
}
"""Learning rate of AdamW by mode, and where it is from."""
LOW = (torch.bfloat16, torch.float16)


class Scorer(Protocol):
    """`OptionScorer` or `MaskedScorer`."""

    model: nn.Module
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """The mean loss of a batch, with a graph if gradients are on."""
        ...

    def scores(self, batch: Sequence[Encoded]) -> Tensor:
        """(B, K)."""
        ...


@dataclass(frozen=True)
class FirstOrder:
    """What a first-order run leaves."""

    records: list[dict[str, float]]
    """One a step: step (from 1), loss of its batch, lr, forwards (forward-equivalents so far)."""
    forwards: float
    """Forward-equivalents in all, in passes over one batch."""
    usage: Usage
    """Of the training alone."""
    lr: float
    lr_source: str
    evaluation: Evaluation | None
    """On the held-out examples, if there were any."""


def train_first_order(
    scorer: Scorer,
    train: Sequence[Encoded],
    *,
    mode: str = "full",
    steps: int,
    batch_size: int = 8,
    lr: float | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    checkpointing: bool = True,
    micro_batch: int | None = None,
    seed: int = 0,
    heldout: Sequence[Encoded] | None = None,
    progress: Progress | None = None,
) -> FirstOrder:
    """Train what requires grad in the scorer's model with AdamW; the learning rate falls linearly to zero.

    Args:
        scorer: holds the model, in its mode already (`make_mode(name).attach`, before the scorer is made).
        train: encoded examples; the same seed takes the same batches as a zeroth-order run with that `data_seed`.
        mode: names the default learning rate in `FIRST_ORDER`; what is trained is what requires grad.
        steps: updates to make.
        batch_size: examples per update.
        lr: at the start; None takes the mode's.
        weight_decay: AdamW's, of the tensors that zeroth-order rules decay: no biases and norms.
        clip: largest norm of the gradient (1 is the Trainer's default); None for no limit.
        checkpointing: keep the inputs of layers and run these again in the backward pass, instead of keeping all.
        micro_batch: examples per forward and backward pass; changes nothing but memory and rounding.
        seed: of the batches' order and of dropout. Global generators are put back.
        heldout: evaluated on at the end.
        progress: called after each step.

    Raises:
        ConfigError: a setting is out of range or does not go with this model.
        ParameterError: nothing to train, or trained tensors of 16 bits.
        DataError: no training examples.
        ClosureError: the loss is not a finite number.
    """
    default, source = _default_lr(mode)
    rate = default if lr is None else lr
    _check(scorer, train, steps=steps, batch_size=batch_size, micro_batch=micro_batch, lr=rate)
    trained = [p for p in scorer.model.parameters() if p.requires_grad]
    _check_trained(trained)
    _check_checkpointing(scorer.model, checkpointing)
    each = forward_equivalents(scorer.model, checkpointing)
    records: list[dict[str, float]] = []
    with measure(scorer.device) as usage, _training(scorer.model, checkpointing), _seeded(scorer.device, seed):
        optimizer = _adamw(scorer.model, rate, weight_decay)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * SCHEDULES["linear"](step / steps)
            batch = [train[index] for index in batch_at(step, len(train), batch_size, seed)]
            loss = _accumulate(scorer, batch, micro_batch or batch_size)
            if not math.isfinite(loss):
                raise ClosureError(f"the loss is {loss} at step {step}; lower lr (now {group['lr']:g}).")
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            records.append({"step": step + 1, "loss": loss, "lr": group["lr"], "forwards": (step + 1) * each})
            if progress is not None:
                progress(step + 1, loss)
    outcome = None if heldout is None else evaluate(cast(OptionScorer, scorer), heldout, batch_size=2 * batch_size)
    return FirstOrder(records, steps * each, usage, rate, source if lr is None else "given", outcome)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether `train_first_order` may be asked for gradient checkpointing on this model, in its mode."""
    try:
        _check_checkpointing(model, True)
    except ConfigError:
        return False
    return True


def check_trainable(model: nn.Module) -> None:
    """Raise a ParameterError unless something requires grad, and none of it has 16 bits; before any work."""
    _check_trained([p for p in model.parameters() if p.requires_grad])


def forward_equivalents(model: nn.Module, checkpointing: bool) -> float:
    """Forward passes that one forward and backward pass are worth; see the top of this file."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return 2 + trained / sum(p.numel() for p in parameters) + checkpointing


def _accumulate(scorer: Scorer, batch: Sequence[Encoded], size: int) -> float:
    """Add the gradient of the batch's mean loss to `.grad`, in parts; return that loss.

    A part weighs as many terms as it has examples, unless the scorer has a `weight` of its own (a loss of tokens has).
    """
    weight: Callable[[Sequence[Encoded]], int] = getattr(scorer, "weight", len)
    total = 0.0
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        loss = scorer.loss(part) * (weight(part) / weight(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(canonical_name(name)) else spared).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay)


@contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Train mode and gradients; afterwards modules are in their own modes again, and no gradient is left."""
    try:
        with passing_back(model, train=True, checkpointing=checkpointing), torch.enable_grad():
            yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Dropout by the seed; generators as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _default_lr(mode: str) -> tuple[float, str]:
    if mode not in FIRST_ORDER:
        raise ConfigError(f"there is no first-order learning rate for mode {mode!r}; known: {', '.join(FIRST_ORDER)}.")
    return FIRST_ORDER[mode]


def _check(scorer: Scorer, train: Sequence[Encoded], *, lr: float, **counts: int | None) -> None:
    if not train:
        raise DataError("there are no examples to train on; at least one is needed.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not (math.isfinite(lr) and lr >= 0):
        raise ConfigError(f"lr must be a number of at least 0, got {lr}.")
    if scorer.autocast == torch.float16:
        raise ConfigError(
            "first-order training under fp16 autocast needs a scaled loss, or small gradients vanish; use bf16 autocast."
        )


def _check_trained(trained: Sequence[nn.Parameter]) -> None:
    if not trained:
        raise ParameterError("no parameter requires grad. Attach a mode to the model before making the scorer.")
    if low := [p.dtype for p in trained if p.dtype in LOW]:
        raise ParameterError(
            f"{len(low)} trained tensors are {low[0]}: of AdamW's updates of the size of lr nearly none arrives in 16 bits, "
            "and this baseline would look worse than it is. Load the model in fp32 (with autocast, if you like), or "
            "train an adapter."
        )


def _check_checkpointing(model: Any, checkpointing: bool) -> None:
    if not checkpointing:
        return
    if has_prefix(model):
        raise ConfigError(
            "gradient checkpointing does not go with a prefix: layers that run again would read keys and values twice. "
            "Set checkpointing=False."
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(inner).__name__} has no gradient checkpointing. Set checkpointing=False.")
