"""A linear probe: logistic regression on what the untouched model makes of the prompt. No training through the model.

Features are the body's last hidden state at the last token of the prompt (of a masked model: at the mask), standardised
with the mean and the deviation of the rows that are fitted. The penalty is chosen by the loss on a part of the training
rows, then all of them are fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.baselines.first_order import Scorer
from zotune.baselines.meter import Usage, measure
from zotune.errors import ConfigError, DataError, ModelError
from zotune.evaluation.evaluate import Evaluation
from zotune.tasks.encoding import Encoded
from zotune.tasks.logits import lowered

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties tried: the loss is the mean cross entropy + penalty / 2 * the squared weights of standardised features."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what it took."""

    evaluation: Evaluation
    """On the held-out examples; the scores are log-probabilities of the classes."""
    penalty: float
    tried: dict[float, float]
    """Loss on the part held back, by penalty."""
    forwards: float
    """Forward passes over batches of the training rows, each read once."""
    usage: Usage
    """Of reading the training rows and fitting."""


def linear_probe(
    scorer: Scorer,
    train: Sequence[Encoded],
    heldout: Sequence[Encoded],
    *,
    batch_size: int = 32,
    dev_share: float = 0.2,
    grid: Sequence[float] = GRID,
    seed: int = 0,
) -> Probe:
    """Fit on the training rows, evaluate on the held-out ones.

    Args:
        scorer: holds the model, as it was loaded.
        train: examples whose labels are classes: the option at a place means the same in all of them.
        heldout: examples to evaluate on.
        batch_size: examples in a forward pass.
        dev_share: share of the training rows held back to choose the penalty.
        grid: penalties to try.
        seed: draws the rows held back.

    Raises:
        DataError: too few rows, options that differ from row to row, or a class without rows.
        ModelError: the model does not name its body.
        ConfigError: a setting is out of range.
    """
    if not 0 < dev_share < 1 or not grid or min(grid) < 0 or batch_size < 1:
        raise ConfigError(
            f"dev_share must be between 0 and 1, penalties at least 0, batch_size at least 1; got {dev_share}, "
            f"{tuple(grid)}, {batch_size}."
        )
    classes = _classes(train, heldout)
    order = np.random.default_rng(seed).permutation(len(train))
    held = order[: round(dev_share * len(train))].tolist()
    kept = order[len(held) :].tolist()
    labels = torch.tensor([example.label for example in train])
    for rows in (kept, list(range(len(train)))):
        _check_rows(labels[rows], classes)
    if not held:
        raise DataError(
            f"{len(train)} training rows leave none to choose the penalty on; give more, or raise dev_share."
        )
    with measure(scorer.device) as usage:
        states = features(scorer, train, batch_size)
        tried = {}
        for penalty in grid:
            fitted = Classifier.fit(states[kept], labels[kept], classes, penalty)
            tried[penalty] = float(nn.functional.cross_entropy(fitted(states[held]), labels[held]))
        best = min(tried, key=lambda penalty: tried[penalty])
        final = Classifier.fit(states, labels, classes, best)
    scores = final(features(scorer, heldout, batch_size)).log_softmax(1)
    right = tuple(example.all_right for example in heldout) if any(example.right for example in heldout) else None
    evaluation = Evaluation.of(scores, torch.tensor([example.label for example in heldout]), right)
    return Probe(evaluation, best, tried, float(-(-len(train) // batch_size)), usage)


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on standardised features, in fp64."""

    mean: Tensor  # (d,)
    deviation: Tensor  # (d,)
    weight: Tensor  # (K, d)
    bias: Tensor  # (K,)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (N, K) of states (N, d)."""
        return ((states - self.mean) / self.deviation) @ self.weight.T + self.bias

    @classmethod
    def fit(cls, states: Tensor, labels: Tensor, classes: int, penalty: float) -> "Classifier":
        """Minimise mean cross entropy + penalty / 2 * |weight|^2 with L-BFGS; convex, so the start does not matter.

        Args:
            states: (N, d) fp64.
            labels: (N,) int64 in [0, classes).
            classes: K.
            penalty: at least 0; with 0 and separable rows there is no minimum, and the last iterate is taken.
        """
        mean, deviation = states.mean(0), states.std(0, correction=0)
        deviation = deviation.where(deviation > 0, torch.ones_like(deviation))  # a constant feature is 0 afterwards
        inputs = (states - mean) / deviation
        weight = torch.zeros(classes, states.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = nn.functional.cross_entropy(inputs @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            solver.step(closure)  # type: ignore[no-untyped-call]
        return cls(mean, deviation, weight.detach(), bias.detach())


@torch.no_grad()
def features(scorer: Scorer, examples: Sequence[Encoded], batch_size: int) -> Tensor:
    """The last hidden state at the end of each prompt, or at its mask: (N, d) fp64 on the CPU.

    Examples go in batches of similar length; results do not depend on them but for rounding.

    Raises:
        ModelError: the model does not name its body, or reads something before its input.
    """
    ask: Any = getattr(scorer, "hidden", None) or _causal_body(scorer)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt_ids))
    rows: list[Tensor] = [torch.empty(0)] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        states = ask([examples[index] for index in chosen])
        for index, row in zip(chosen, states.double().cpu(), strict=True):
            rows[index] = row
    return torch.stack(rows)


def _causal_body(scorer: Scorer) -> Any:
    """A function from a batch to the states (B, d) at the ends of its prompts."""
    model: Any = scorer.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if not isinstance(body, nn.Module) or body is inner:
        raise ModelError(f"{type(inner).__name__} does not name its body (get_decoder), so it gives no hidden states.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            "the model reads a learned prefix or prompt, which a probe would leave out: probe it untouched."
        )

    def ask(batch: Sequence[Encoded]) -> Tensor:
        lengths = torch.tensor([len(example.prompt_ids) for example in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)  # no token sees the padding on its right
        for number, example in enumerate(batch):
            ids[number, : len(example.prompt_ids)] = torch.tensor(example.prompt_ids)
        with lowered(scorer.device, scorer.autocast):
            states: Tensor = body(input_ids=ids.to(scorer.device), use_cache=False).last_hidden_state
        return states[torch.arange(len(batch)), lengths.to(states.device) - 1]

    return ask


def _classes(train: Sequence[Encoded], heldout: Sequence[Encoded]) -> int:
    if not train or not heldout:
        raise DataError("a linear probe needs training rows and held-out rows; one of them is empty.")
    options = {tuple(map(tuple, example.option_ids)) for example in (*train, *heldout)}
    if len(options) > 1:
        raise DataError(
            "a linear probe needs classes, and the options of these rows differ from row to row (as in COPA or ReCoRD): "
            "the first option of one row has nothing to do with that of another."
        )
    return len(next(iter(options)))


def _check_rows(labels: Tensor, classes: int) -> None:
    count = torch.bincount(labels, minlength=classes)
    if bool((count == 0).any()):
        raise DataError(
            f"class {int(count.argmin())} has no row among the {len(labels)} that are fitted; give more training rows."
        )
