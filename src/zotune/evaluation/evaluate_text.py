"""How good the answers are that a model writes: token F1 and exact match, or a reward, with their uncertainty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.errors import DataError
from zotune.evaluation.evaluate import Progress, check_asked
from zotune.tasks.encoding import Encoded
from zotune.tasks.generation import Generated, Generator
from zotune.tasks.metrics import METRICS
from zotune.tasks.module_modes import eval_mode
from zotune.tasks.rewards import reward_of
from zotune.tasks.task import Row


@dataclass(frozen=True)
class TextEvaluation:
    """Generated answers to N examples, in their order, and how they compare."""

    answers: tuple[Generated, ...]
    values: dict[str, Tensor]  # metric to (N,) fp64
    metric: str
    """The one that is reported first."""
    empty: int
    """Answers without any text; they score as they are."""
    unfinished: int
    """Answers that were cut off by their length."""

    @property
    def score(self) -> float:
        """Mean of the metric."""
        return self.mean(self.metric)

    @property
    def standard_error(self) -> float:
        """Of ``score``: the standard deviation over examples by the square root of their number."""
        values = self.values[self.metric]
        return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of ``score``, by its standard error."""
        return self.score - 1.959964 * self.standard_error, self.score + 1.959964 * self.standard_error

    def mean(self, metric: str) -> float:
        """Mean over the examples."""
        return float(self.values[metric].mean())


def evaluate_generation(
    generator: Generator,
    encoded: Sequence[Encoded],
    *,
    batch_size: int = 16,
    reward: Callable[[str, Row], float] | None = None,
    progress: Progress | None = None,
) -> TextEvaluation:
    """Let the model answer, greedily and with dropout off, and compare with the right answers: token F1, exact match.

    Args:
        generator: holds the model and its tokenizer.
        encoded: N examples of a generation task.
        batch_size: examples in a forward pass; it changes memory and speed, not results (but for rounding).
        reward: scores texts and rows in addition, and is then the metric that is reported first.
        progress: called after each batch.

    Raises:
        DataError: there are no examples, they have no right answers, or a prompt is too long to answer.
        ConfigError: batch_size is not positive.
    """
    check_asked(encoded, batch_size)
    words = [example.example for example in encoded]
    if any(word is None or (not word.answers and reward is None) for word in words):
        raise DataError("an example has no right answers to compare with; encode the examples of a generation task.")
    with torch.no_grad(), eval_mode(generator.model):
        prompts = [example.prompt_ids for example in encoded]
        written = generator.generate(prompts, batch_size=batch_size, progress=progress)
    pairs = [(answer.text, word) for answer, word in zip(written, words, strict=True) if word is not None]
    values: dict[str, list[float]] = {}
    if all(word.answers for _, word in pairs):
        values = {name: [metric(text, word.answers) for text, word in pairs] for name, metric in METRICS.items()}
    if reward is not None:
        values["reward"] = [reward_of(reward, text, word.row) for text, word in pairs]
    return TextEvaluation(
        tuple(written),
        {metric: torch.tensor(numbers, dtype=torch.float64) for metric, numbers in values.items()},
        "f1" if reward is None else "reward",
        sum(not answer.text for answer in written),
        sum(not answer.finished for answer in written),
    )
