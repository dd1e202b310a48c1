"""Recorded trajectories at a fixed key: no change of numbers goes unnoticed.

The losses come from Python floats and `math.fsum`, which is correctly rounded, and the weights move by products and sums
that IEEE 754 fixes; so the recorded bits hold on every machine. To renew after a meant change:

    python -m tests.math.test_golden --renew
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zotune.core.weights import Weights
from zotune.optim.optimizer import ZO

FILE = Path(__file__).with_name("golden.json")
STEPS = 8
RUNS = {
    "mezo, n=1": {},
    "mezo, n=3": {"method_options": {"n": 3}},
    "mezo, one-sided": {"method_options": {"sides": 1}},
    "mezo, weight decay, two groups": {"weight_decay": 0.25, "groups": True},
    "mezo, rademacher": {"noise": "rademacher"},
    "mezo, bf16 carry": {"dtype": torch.bfloat16},
    "mezo, fp16 carry": {"dtype": torch.float16},
    "mezo, bf16 stochastic": {"dtype": torch.bfloat16, "low_precision": "stochastic"},
    "mezo, sign": {"rule": "sign"},
    "mezo, momentum": {"rule": "momentum"},
    "mezo, momentum_replayed": {"rule": "momentum_replayed", "rule_options": {"window": 4}},
    "mezo, adam": {"rule": "adam"},
    "mezo, adamm": {"rule": "adamm"},
    "kerzoo": {"method": "kerzoo", "method_options": {"n": 2}},
    "kerzoo, order 7": {"method": "kerzoo", "method_options": {"order": 7}},
    "kerzoo, released": {"method": "kerzoo", "method_options": {"variant": "released"}},
    "pizo": {"method": "pizo"},
    "pizo, greedy": {"method": "pizo", "method_options": {"variant": "greedy"}},
    "ldsd": {"method": "ldsd", "method_options": {"lr_mu": 4.0}},
    "ldsd, bf16 mean": {"method": "ldsd", "method_options": {"lr_mu": 4.0, "mean": "bf16"}},
    "ldsd, int8 mean": {"method": "ldsd", "method_options": {"lr_mu": 4.0, "mean": "int8"}},
    "jaguar": {"method": "jaguar", "rule": "jaguar", "method_options": {"ratio": 0.5}},
    "conservative": {"method": "conservative", "lr": 0.234375},
    "sparse": {"method": "sparse", "method_options": {"interval": 3}},
    "blockwise": {"method": "blockwise", "method_options": {"level": "tensor"}},
    "blockwise, each": {"method": "blockwise", "method_options": {"level": "tensor", "update": "each"}},
    "es": {"method": "es"},
    "fzoo": {"method": "fzoo", "lr": 2.0**-12},
    "adaptive_scales": {"method": "adaptive_scales", "method_options": {"explore": 2}},
}
# subzero, lozo and pgap are not here: their small factors are exact normals and decompositions, whose last bits may
# differ between machines. zo_finetuner has tanh in it, and forward_grad needs a model.


def _start(count, step):
    return torch.tensor([((index * step) % 64 - 32) / 64 for index in range(count)])


def trajectory(dtype=torch.float32, groups=False, steps=STEPS, **settings):
    """The numbers of a run: losses of every step, some weights, and a hash of all of them."""
    named = [
        ("block.weight", nn.Parameter(_start(4 * 70, 37).view(4, 70).to(dtype))),
        ("block.bias", nn.Parameter(_start(5, 11).to(dtype))),
    ]

    def loss():
        values = [v for _, p in named for v in p.detach().double().flatten().tolist()]
        return math.fsum((v - 0.25) * (v - 0.25) * (1 + 0.125 * v) for v in values) / 64

    params = [{"params": named[:1]}, {"params": named[1:], "lr": 0.25, "eps": 0.0625}] if groups else named
    opt = ZO(params, eps=0.03125, seed=2024, engine="in_place", **{"lr": 0.0625, **settings})
    losses = []
    for _ in range(steps):
        opt.step(loss)
        losses.append([value.hex() for value in opt.last.losses])
    weights = Weights(named)
    for name, slot in weights.slots.items():
        slot.carried = opt.weights.slots[name].carried
    values = torch.cat([slot.storage.read(slot, slot.site).detach().float().flatten() for slot in weights])
    return {
        "losses": losses,
        "weights": [float(v).hex() for v in values[[0, 1, 69, 70, 279, 280, 284]]],
        "sha256": hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_the_recorded_one(name):
    recorded = json.loads(FILE.read_text())[name]
    assert trajectory(**RUNS[name]) == recorded, (
        f"The numbers of {name!r} have changed: old ledgers and resumed runs would end elsewhere. If that is meant, it is a "
        "Numerics change: say so in CHANGELOG.md under Numerics, and renew with `python -m tests.math.test_golden --renew`."
    )


def test_the_recorded_runs_moved_and_differ():
    """A recording of weights that stand still would prove nothing."""
    recorded = json.loads(FILE.read_text())
    assert list(recorded) == list(RUNS)
    assert len({(run["sha256"], str(run["losses"])) for run in recorded.values()}) == len(RUNS)
    for name, run in recorded.items():
        assert len({tuple(losses) for losses in run["losses"]}) == STEPS
        still = trajectory(**{**RUNS[name], "steps": 0})
        assert sum(a != b for a, b in zip(run["weights"], still["weights"], strict=True)) >= 4  # a mask leaves some


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit(__doc__)
    FILE.write_text(json.dumps({name: trajectory(**settings) for name, settings in RUNS.items()}, indent=1) + "\n")
