"""Held-out numbers of a run, whatever the kind of task, as one line of metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zotune.evaluation.evaluate import Evaluation, Progress, evaluate
from zotune.evaluation.evaluate_text import evaluate_generation
from zotune.tasks.encoding import Encoded
from zotune.tasks.generation import Generator
from zotune.tasks.module_modes import eval_mode
from zotune.tasks.objectives import LanguageModel
from zotune.tasks.rewards import Reward
from zotune.tasks.task import Task


@dataclass
class Assessor:
    """Evaluates as a task asks for: by the option that is chosen, or by the text that is written."""

    task: Task
    scorer: Any  # OptionScorer or MaskedScorer
    generator: Callable[[], Generator]
    reward: Reward | None
    batch_size: int

    @property
    def metric(self) -> str:
        """What is reported first: accuracy, f1 or reward."""
        if self.task.kind != "generation":
            return "accuracy"
        return "f1" if self.reward is None else "reward"

    def options(self, examples: Sequence[Encoded], progress: Progress | None = None) -> Evaluation:
        """Scores of all options; not for generation tasks."""
        return evaluate(self.scorer, examples, batch_size=self.batch_size, progress=progress)

    def line(self, examples: Sequence[Encoded], progress: Progress | None = None) -> dict[str, Any]:
        """`metric`, its value under its own name, `standard_error`, `interval` (95 %) and `loss`; more for texts."""
        if self.task.kind != "generation":
            return numbers(self.options(examples, progress))
        found = evaluate_generation(
            self.generator(), examples, batch_size=self.batch_size, reward=self.reward, progress=progress
        )
        return {
            "metric": self.metric,
            **{name: found.mean(name) for name in found.values},
            "standard_error": found.standard_error,
            "interval": list(found.interval),
            "loss": self._token_loss(examples),
            "empty": found.empty,
            "unfinished": found.unfinished,
        }

    def _token_loss(self, examples: Sequence[Encoded]) -> float:
        """Mean cross entropy of the tokens of the first right answers, in nats."""
        objective = LanguageModel(self.scorer)
        order = sorted(examples, key=lambda example: example.length)
        total, weight = 0.0, 0
        with torch.no_grad(), eval_mode(self.scorer.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                total += float(objective.loss(batch)) * objective.weight(batch)
                weight += objective.weight(batch)
        return total / weight


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation of options as a line of metrics."""
    return {
        "metric": "accuracy",
        "accuracy": evaluation.accuracy,
        "standard_error": evaluation.standard_error,
        "interval": list(evaluation.interval),
        "loss": evaluation.mean_loss,
    }
