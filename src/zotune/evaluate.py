"""Accuracy of a model on held-out examples, and the honest baseline beside it: the same model with its prior corrected.

A small model often says the same option whatever it reads, so its zero-shot accuracy is near chance although its
scores do tell the classes apart. Training moves that prior first. The *prior-corrected* baseline adds to the scores
one bias per option, fitted on training rows with the weights untouched; what training brings beyond it was learned.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.core.errors import ConfigError, DataError
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer

Progress = Callable[[int, int], None]
"""Called with the number of examples done and the number of all."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of N examples, in their order, and what follows from them."""

    scores: Tensor  # (N, K) on the CPU, -inf where an example has fewer than K options
    labels: Tensor  # (N,) int64
    accuracy: float
    standard_error: float
    """Of the accuracy: sqrt(p (1 - p) / N), for N examples drawn at random."""
    mean_loss: float
    """Mean cross entropy of the right option under softmax(scores), in nats."""

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> "Evaluation":
        """Summarise scores (N, K) and labels (N,); of options with equal scores the first one counts as chosen."""
        accuracy = float((scores.argmax(1) == labels).double().mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(labels))
        loss = float(nn.functional.cross_entropy(scores.double(), labels))
        return cls(scores, labels, accuracy, error, loss)


def evaluate(
    scorer: OptionScorer, encoded: Sequence[Encoded], *, batch_size: int = 32, progress: Progress | None = None
) -> Evaluation:
    """Score examples in batches of similar length, without gradients and with dropout off; both are put back after.

    Args:
        scorer: holds the model.
        encoded: N examples.
        batch_size: examples in a forward pass; it changes memory and speed, not results (but for rounding).
        progress: called after each batch.

    Raises:
        DataError: there are no examples.
        ConfigError: batch_size is not positive.
    """
    if not encoded:
        raise DataError("there are no examples to evaluate on; at least one is needed.")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].length)
    options = max(len(example.option_ids) for example in encoded)
    rows: list[Tensor] = [torch.empty(0)] * len(encoded)
    with torch.no_grad(), _eval_mode(scorer.model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            scores = scorer.scores([encoded[index] for index in chosen]).cpu()
            scores = nn.functional.pad(scores, (0, options - scores.shape[1]), value=-math.inf)
            for index, row in zip(chosen, scores, strict=True):
                rows[index] = row
            if progress is not None:
                progress(start + len(chosen), len(order))
    return Evaluation.of(torch.stack(rows), torch.tensor([example.label for example in encoded]))


def fit_prior_correction(scores: Tensor, labels: Tensor) -> Tensor:
    """Fit one bias per option on training rows: the minimiser of the cross entropy of softmax(scores + bias).

    The problem is convex, and strictly so with the first bias held at 0; Newton's method in fp64 with a line search
    finds the optimum, at which the mean predicted probability of each option equals its share of the labels.

    Args:
        scores: (N, K), of rows the model may learn from, weights untouched.
        labels: (N,).

    Returns:
        bias (K,) in fp64, bias[0] = 0.

    Raises:
        DataError: an option is never right in these rows (its best bias would be minus infinity), rows differ in their
            number of options, or a score is not finite.
    """
    options = scores.shape[1]
    if not bool(torch.isfinite(scores).all()):
        raise DataError("a bias per option needs finite scores and as many options in every row; here some are not.")
    count = torch.bincount(labels, minlength=options)
    if absent := [option for option in range(options) if count[option] == 0]:
        raise DataError(
            f"option {absent[0]} is never right in the {len(labels)} rows given, so no bias can be fitted for it. "
            "Give more training rows, with every label among them."
        )
    fixed, share = scores.double(), count.double() / len(labels)
    bias = torch.zeros(options, dtype=torch.float64)
    for _ in range(100):  # a handful suffices; the bound only keeps a loop from being endless
        probability = (fixed + bias).softmax(1)
        slope = (probability.mean(0) - share)[1:]
        if slope.abs().max() < 1e-12:
            break
        curvature = probability.mean(0).diag() - probability.T @ probability / len(labels)
        step = torch.zeros_like(bias)
        step[1:] = torch.linalg.solve(curvature[1:, 1:], slope)
        bias = _line_search(fixed, labels, bias, step)
    return bias


def _line_search(scores: Tensor, labels: Tensor, bias: Tensor, step: Tensor) -> Tensor:
    """Go down along ``-step``, halving it until the loss does not rise; at rounding level, stay."""

    def loss(candidate: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores + candidate, labels)

    start = loss(bias)
    for halving in range(40):
        candidate = bias - step * 0.5**halving
        if loss(candidate) <= start:
            return candidate
    return bias


def prior_corrected(evaluation: Evaluation, bias: Tensor) -> Evaluation:
    """Return the evaluation with ``bias`` (K,), fitted on training rows, added to the scores.

    Raises:
        DataError: the number of options differs.
    """
    if bias.shape != evaluation.scores.shape[1:]:
        raise DataError(f"the bias has {bias.numel()} options and the scores have {evaluation.scores.shape[1]}.")
    return Evaluation.of(evaluation.scores.double() + bias.double(), evaluation.labels)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off in every module; each one's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
