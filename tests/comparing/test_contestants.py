"""Names of contestants, and the weights of parts of a batch."""

import pytest
import torch
from torch import nn

from zotune.baselines.first_order import _accumulate
from zotune.comparison.contestants import parse, usual
from zotune.methods import METHODS
from zotune.runs.config import TrainConfig
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import Encoded

SST2 = find_task("sst2")


def labels(*texts, **settings):
    return [contestant.label for contestant in parse(texts, TrainConfig(**settings), SST2)]


def test_learning_rates_belong_to_their_mode():
    texts = ("mezo", "mezo:lora", "mezo:lora@1e-4", "adamw", "adamw-lora", "adamw:head")
    plain = ["mezo (lr 1e-06)", "mezo:lora (lr 5e-05)", "mezo:lora (lr 0.0001)"]
    first = ["adamw (lr 1e-05)", "adamw-lora (lr 0.0002)", "adamw:head (lr 0.0001)"]
    assert labels(*texts) == plain + first
    assert labels(*texts, lr=3e-5) == ["mezo (lr 3e-05)", *plain[1:], *first]
    assert labels("mezo", "mezo:full", mode="lora", lr=3e-5) == ["mezo:lora (lr 3e-05)", "mezo (lr 1e-06)"]


def test_options_go_to_those_who_know_them():
    config = TrainConfig(method="es", method_options={"n": 3}, mode="lora", mode_options={"rank": 2}, eps=0.5)
    es, mezo, full = (c.settings(config, 7) for c in parse(["es", "mezo", "mezo:full"], config, SST2))
    assert (es.method_options, es.mode_options, es.eps, es.steps) == ({"n": 3}, {"rank": 2}, 0.5, 7)
    assert (mezo.method_options, mezo.mode_options, mezo.eps) == ({}, {"rank": 2}, 0.5)
    assert (full.mode_options, full.eps) == ({}, None)


def test_every_method_can_be_named():
    # which networks the one runs has no default; the other needs a loss for each example, which runs do not give
    needs = {"zo_finetuner", "grzo"}
    assert len(labels(*(METHODS.keys() - needs))) == len(METHODS) - len(needs)


def test_slugs_are_apart():
    found = parse(["mezo", "mezo@1e-5", "mezo@1.0000001e-5", "mezo:lora", "zero-shot"], TrainConfig(), SST2)
    assert len({contestant.slug for contestant in found}) == len({contestant.label for contestant in found}) == 5


def test_what_is_usual_follows_from_the_kind():
    assert usual("classification")[:4] == ["zero-shot", "prior-corrected", "in-context", "probe"]
    assert usual("generation") == ["zero-shot", "in-context", "mezo", "es", "adamw", "adamw-lora"]


class Tokens:
    """A mean over the tokens of right options, as the `lm` objective is."""

    def __init__(self):
        self.model = nn.Linear(1, 1, bias=False, dtype=torch.float64)

    def weight(self, batch):
        return sum(len(example.option_ids[0]) for example in batch)

    def loss(self, batch):
        tokens = [float(token) for example in batch for token in example.option_ids[0]]
        return sum(self.model.weight.sum() * token for token in tokens) / len(tokens)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_weigh_what_they_hold(size):
    """Options of 1, 3 and 2 tokens: the gradient is the mean of all six, whatever the parts."""
    scorer = Tokens()
    batch = [Encoded([0], (tuple(ids),), 0) for ids in ([5], [1, 2, 3], [7, 6])]
    loss = _accumulate(scorer, batch, size)
    mean = 24 / 6
    assert float(scorer.model.weight.grad) == pytest.approx(mean, rel=1e-12)  # a few roundings of fp64
    assert loss == pytest.approx(mean * scorer.model.weight.item(), rel=1e-12)
