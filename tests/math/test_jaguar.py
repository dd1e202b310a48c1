"""JAGUAR: which tensors a step takes, what it does to them, and what its estimates are on the mean."""

import math

import pytest
import torch
from tests.checks.jaguar import (
    check_equals_the_readable_twin,
    check_logged_loss_is_the_mean_of_the_pair,
    check_mean_of_estimates,
    check_only_the_steps_tensors_are_probed_and_moved,
    check_sets_are_equally_likely,
    check_sets_depend_on_names_alone,
    context_of,
)
from tests.checks.mezo import SEED, twin_model
from tests.support.bare import bare_context, estimate_of, flat, realised
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.errors import ConfigError
from zotune.methods.jaguar import Jaguar, subset
from zotune.methods.mezo import MeZO
from zotune.optim.optimizer import ZO


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.1, "unbiased": True},
        {"ratio": 0.75, "n": 3, "unbiased": True},
        {"rule": "jaguar", "ratio": 0.25},
        {"rule": "jaguar", "ratio": 1.0},
    ],
)
def test_equals_the_readable_twin(options):
    check_equals_the_readable_twin(**options)


def test_only_the_steps_tensors_are_probed_and_moved():
    check_only_the_steps_tensors_are_probed_and_moved()


def test_sets_are_equally_likely():
    check_sets_are_equally_likely()


def test_sets_depend_on_names_alone():
    check_sets_depend_on_names_alone()


def test_logged_loss_is_the_mean_of_the_pair():
    check_logged_loss_is_the_mean_of_the_pair()


@pytest.mark.parametrize("unbiased", [False, True])
def test_mean_of_estimates(unbiased):
    check_mean_of_estimates(unbiased)


@pytest.mark.parametrize("n", [1, 2])
def test_second_moment(n):
    """Given S: E|g|^2 = (d_S + n + 1)/n |grad_S|^2, of a linear loss; five standard errors of 400 steps."""
    generator = torch.Generator().manual_seed(5)
    g = {f"layer{i}": torch.randn(6, dtype=torch.float64, generator=generator) for i in range(4)}
    weights, ratios = {name: torch.zeros(6, dtype=torch.float64) for name in g}, []
    for step in range(400):
        ctx = bare_context(
            weights, lambda w: sum(g[k] @ w[k] for k in w), step=step, seed=SEED, eps=1.0, kind="gaussian"
        )
        chosen = subset(ctx, 0.5)
        made = flat(realised(Jaguar(ratio=0.5, n=n).estimate(ctx).direction, weights))
        ratios.append(float(made.square().sum() / sum(g[name].square().sum() for name in chosen)))
    ratios = torch.tensor(ratios)
    assert abs(float(ratios.mean()) - (12 + n + 1) / n) < 5 * float(ratios.std()) / math.sqrt(400)


@pytest.mark.parametrize(
    ("count", "ratio", "taken"), [(30, 0.1, 3), (31, 0.1, 4), (5, 0.1, 1), (3, 0.001, 1), (7, 1.0, 7)]
)
def test_sizes_of_the_sets(count, ratio, taken):
    """ceil(ratio * tensors), of the ratio that is meant: 0.1 * 30 is a little more than 3 in floating point."""
    assert len(subset(context_of([f"layer{i}" for i in range(count)]), ratio)) == taken


def test_sets_differ_between_steps_and_runs():
    names = [f"layer{i}" for i in range(40)]
    seen = {subset(context_of(names, step, seed), 0.1) for step in range(10) for seed in (1, 2)}
    assert len(seen) == 20


@pytest.mark.parametrize("unbiased", [False, True])
def test_all_tensors_is_mezo_bit_for_bit(unbiased):
    ends = []
    for method in (MeZO(), Jaguar(ratio=1.0, unbiased=unbiased)):
        torch.manual_seed(0)
        case = CASES["mlp"](torch.float32)
        opt = ZO(case.named, method=method, lr=1e-2, eps=1e-2, seed=SEED)
        ends.append(([float(opt.step(case.closure)) for _ in range(4)], snapshot(case)))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[0][1], ends[1][1])


def test_other_tensors_keep_their_bits():
    case = CASES["mlp"](torch.bfloat16)
    opt = ZO(case.named, method="jaguar", lr=1e-2, eps=2.0**-7)
    for _ in range(4):
        before = snapshot(case)
        opt.step(case.closure)
        after = snapshot(case)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert len(moved) <= 1
        assert all(opt.last.estimate.direction.touches(opt.weights.slots[name].site) for name in moved)


def test_forwards():
    weights = {name: p.detach() for name, p in twin_model()[0]}
    for n in (1, 3):
        method = Jaguar(n=n)
        _, _, ctx = estimate_of(method, weights, twin_model()[1])
        assert method.forwards == ctx.queries == 2 * n


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 1.1}, {"ratio": -1.0}, {"n": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="method 'jaguar'"):
        Jaguar(**options)
