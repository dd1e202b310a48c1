"""How good a model's answers are on held-out examples, and the honest baselines beside it.

A small model often says the same option whatever it reads, so its zero-shot accuracy is near chance although its
scores do tell the classes apart. Training moves that prior first. The *prior-corrected* baseline adds to the scores
one bias per option, fitted on training rows with the weights untouched; what training brings beyond it was learned.
*Surface-form calibration* needs no training rows: it takes from each option what the model thinks of it without the
question.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.errors import ConfigError, DataError
from zotune.tasks.encoding import Encoded
from zotune.tasks.layout import count_rows
from zotune.tasks.module_modes import eval_mode
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.shared_prompt import SharedPrompt, worthwhile

Progress = Callable[[int, int], None]
"""Called with the number of examples done and the number of all."""


ROWS_PER_EXAMPLE = 4
"""An evaluation's forward pass has at most this many sequences per example of its batch size, whatever the options."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of N examples, in their order, and what follows from them."""

    scores: Tensor  # (N, K) on the CPU, -inf where an example has fewer than K options
    labels: Tensor  # (N,) int64
    accuracy: float
    standard_error: float
    """Of the accuracy: sqrt(p (1 - p) / N), for N examples drawn at random."""
    mean_loss: float
    """Mean cross entropy of the taught option under softmax(scores), in nats."""
    right: tuple[tuple[int, ...], ...] | None = None
    """All right options of each example, where some have several."""

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor, right: tuple[tuple[int, ...], ...] | None = None) -> "Evaluation":
        """Summarise scores (N, K) and labels (N,); of options with equal scores the first one counts as chosen."""
        chosen = scores.argmax(1)
        if right is None:
            correct = chosen == labels
        else:
            correct = torch.tensor([option in options for option, options in zip(chosen.tolist(), right, strict=True)])
        accuracy = float(correct.double().mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(labels))
        loss = float(nn.functional.cross_entropy(scores.double(), labels))
        return cls(scores, labels, accuracy, error, loss, right)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson 1927), which stays inside [0, 1] and is never empty."""
        return wilson_interval(self.accuracy, len(self.labels))


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The shares p for which the one seen among ``count`` lies within z standard errors sqrt(p (1 - p) / count)."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def evaluate(
    scorer: OptionScorer, encoded: Sequence[Encoded], *, batch_size: int = 32, progress: Progress | None = None
) -> Evaluation:
    """Score examples in batches of similar length, without gradients and with dropout off; both are put back after.

    Args:
        scorer: holds the model.
        encoded: N examples.
        batch_size: examples in a forward pass; it changes memory and speed, not results (but for rounding). Examples
            with many options of several tokens come in smaller batches, if need be one example in parts.
        progress: called after each batch.

    Raises:
        DataError: there are no examples, or they have one option each.
        ConfigError: batch_size is not positive.
    """
    check_asked(encoded, batch_size)
    if all(len(example.option_ids) == 1 for example in encoded):
        raise DataError("every example has one option, so there is nothing to choose; use evaluate_generation.")
    options = max(len(example.option_ids) for example in encoded)
    rows: list[Tensor] = [torch.empty(0)] * len(encoded)
    done = 0
    with torch.no_grad(), eval_mode(scorer.model):
        shared = SharedPrompt(scorer) if any(map(worthwhile, encoded)) else None
        if shared is not None and not shared.works:
            shared = None
        for chosen in _batches(encoded, batch_size, alone=shared is not None):
            scores = _scores(scorer, shared, [encoded[index] for index in chosen], batch_size)
            scores = nn.functional.pad(scores, (0, options - scores.shape[1]), value=-math.inf)
            for index, row in zip(chosen, scores, strict=True):
                rows[index] = row
            done += len(chosen)
            if progress is not None:
                progress(done, len(encoded))
    right = tuple(example.all_right for example in encoded) if any(example.right for example in encoded) else None
    return Evaluation.of(torch.stack(rows), torch.tensor([example.label for example in encoded]), right)


def check_asked(encoded: Sequence[Encoded], batch_size: int) -> None:
    """Raise a DataError if there are no examples, a ConfigError if the batch size is not positive."""
    if not encoded:
        raise DataError("there are no examples to evaluate on; at least one is needed.")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")


def _batches(encoded: Sequence[Encoded], batch_size: int, alone: bool) -> Iterator[list[int]]:
    """Indices of examples of similar length: at most ``batch_size``, and not many more rows than that.

    With ``alone``, examples for which it is worth to read the prompt once come one by one.
    """
    batch: list[int] = []
    rows = 0
    for index in sorted(range(len(encoded)), key=lambda index: encoded[index].length):
        if alone and worthwhile(encoded[index]):
            yield [index]
            continue
        more = count_rows(encoded[index])
        if batch and (len(batch) == batch_size or rows + more > ROWS_PER_EXAMPLE * batch_size):
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += more
    if batch:
        yield batch


def _scores(scorer: OptionScorer, shared: SharedPrompt | None, batch: list[Encoded], batch_size: int) -> Tensor:
    """Scores (B, K) on the CPU; the options of a single example with too many rows are asked about in parts."""
    most_rows = ROWS_PER_EXAMPLE * batch_size
    if shared is not None and len(batch) == 1 and worthwhile(batch[0]):
        return shared.scores(batch[0], batch_size).cpu()
    if len(batch) > 1 or count_rows(batch[0]) <= most_rows:
        return scorer.scores(batch).cpu()
    prompt, options = batch[0].prompt_ids, batch[0].option_ids
    parts = [Encoded(prompt, options[start : start + most_rows], 0) for start in range(0, len(options), most_rows)]
    return torch.cat([scorer.scores([part]).cpu() for part in parts], dim=1)


def evaluate_calibrated(
    scorer: OptionScorer,
    encoded: Sequence[Encoded],
    calibration: Sequence[Encoded],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Score options by how much the question raises them: surface-form calibration (Holtzman et al. 2021).

    The score is the log-probability of the whole option after the prompt, minus that after the calibration prompt.

    Args:
        scorer: holds the model.
        encoded: N examples.
        calibration: the same with the content taken out of their prompts (``calibration_example``); equal ones are
            scored once.
        batch_size: as in ``evaluate``.
        progress: as in ``evaluate``; of the examples.

    Raises:
        DataError: as in ``evaluate``, or the options of an example and its calibration differ in number.
        ConfigError: batch_size is not positive.
    """
    if [len(example.option_ids) for example in encoded] != [len(example.option_ids) for example in calibration]:
        raise DataError("each example needs a calibration with as many options as it has.")
    plain = evaluate(scorer, encoded, batch_size=batch_size, progress=progress)
    different: dict[tuple[tuple[int, ...], ...], int] = {}
    places = [different.setdefault(_key(example), len(different)) for example in calibration]
    first = [calibration[places.index(number)] for number in range(len(different))]
    base = evaluate(scorer, first, batch_size=batch_size).scores[places] * _lengths(calibration)
    # absent options are -inf on both sides
    scores = (plain.scores * _lengths(encoded) - base).masked_fill(plain.scores == -math.inf, -math.inf)
    return Evaluation.of(scores, plain.labels, plain.right)


def _key(example: Encoded) -> tuple[tuple[int, ...], ...]:
    return (tuple(example.prompt_ids), *map(tuple, example.option_ids))


def _lengths(encoded: Sequence[Encoded]) -> Tensor:
    """Tokens of each option (N, K), 1 where an example has fewer."""
    width = max(len(example.option_ids) for example in encoded)
    return torch.tensor([[*map(len, e.option_ids), *[1] * (width - len(e.option_ids))] for e in encoded]).float()


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
    return Evaluation.of(evaluation.scores.double() + bias.double(), evaluation.labels, evaluation.right)
