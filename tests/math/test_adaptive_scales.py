"""Adaptive scales find energy and curvature of each group, and gain what their derivation says."""

import warnings

import pytest
import torch
from tests.checks.adaptive_scales import (
    BLOCKS,
    check_equals_the_readable_twin,
    check_exploring_points,
    check_finds_energy_and_curvature,
    check_gain_is_the_predicted_one,
    check_power_zero_is_mezo,
    check_scales_follow_the_ratio,
    explored,
    quadratic,
)
from tests.support.bare import bare_context, estimate_of, sites_of
from torch import nn

from zotune.core.ledger import read_ledger
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.adaptive_scales import AdaptiveScales, groups_of
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import replay


def test_equals_the_readable_twin():
    check_equals_the_readable_twin()


def test_finds_energy_and_curvature():
    check_finds_energy_and_curvature()


def test_scales_follow_the_ratio_and_keep_the_learning_rate():
    check_scales_follow_the_ratio()


def test_gain_of_a_step_is_the_predicted_one():
    check_gain_is_the_predicted_one()


def test_power_zero_is_mezo():
    check_power_zero_is_mezo()


def end_of(method, lr, forwards, seed):
    weights, loss, _ = quadratic()
    named = [(k, nn.Parameter(w)) for k, w in weights.items()]
    opt = ZO(named, method, lr=lr, eps=1e-2, seed=seed)
    with torch.no_grad():
        while opt.forwards < forwards:
            opt.step(lambda: loss(dict(named)))
        return loss(dict(named))


def test_lower_loss_than_mezo_at_equal_forwards_and_the_rate_that_is_best_for_mezo():
    """Exploring paid for; MeZO at its best rate. Measured over three seeds: 0.77 to 0.81 of MeZO's loss, whose seeds differ
    by 1 %; so 0.88 at most.
    """
    best = 1 / sum(d * h for d, h, _ in BLOCKS.values())
    mezo = min(end_of("mezo", factor * best, 600, 1) for factor in (0.5, 1.0, 1.5))
    assert end_of(AdaptiveScales(level="tensor"), best, 600, 1) < 0.88 * mezo


# ----------------------------------------------------------------------------------------------------------------------


def test_groups_of_a_kind_lose_their_numbers():
    names = ["model.layers.0.mlp.up.weight", "model.layers.11.mlp.up.weight", "model.norm.weight", "h.3.bias"]
    sites = [Site(name, (2,)) for name in names]
    assert groups_of(sites, "kind") == {
        "h.#.bias": ["h.3.bias"],
        "model.layers.#.mlp.up.weight": sorted(names[:2]),
        "model.norm.weight": ["model.norm.weight"],
    }
    assert list(groups_of(sites[::-1], "kind").items()) == list(groups_of(sites, "kind").items())
    assert len(groups_of(sites, "tensor")) == 4
    assert len(groups_of(sites, "layer")) == 4


def test_scales_are_one_until_each_group_was_seen_often_enough():
    weights, loss, _ = quadratic()
    sites = sites_of(weights)
    for looks in range(6):
        assert set(explored(weights, loss, steps=looks, rounds=2).squares(sites).values()) == {1.0}
    assert len(set(explored(weights, loss, steps=6, rounds=2).squares(sites).values())) == 3


def test_uncertain_curvature_counts_as_much_and_the_limit_holds():
    """A mean of -50 out of looks that scatter by 600 is no licence; T is the standard error of so many looks."""
    weights, loss, _ = quadratic()
    sites = sites_of(weights)
    method = explored(weights, loss, limit=4.0)
    before = method.squares(sites)["pays"]
    times = method._seen["pays"][0]
    method._seen["pays"][2:] = [-50.0, 600.0**2 + 50.0**2]
    assert method.curvature(sites)["pays"] == pytest.approx(600.0 / (times - 1) ** 0.5)
    method._seen["pays"][2:] = [-50.0, 50.0**2]  # certainly negative: the floor
    assert 0 < method.curvature(sites)["pays"] < 0.01 * method.curvature(sites)["costs"]
    squares = method.squares(sites)
    # 4 over and 4 under the median at most
    assert before < max(squares.values()) <= 16.0 * (1 + 1e-9) * min(squares.values())
    for k in method._seen:
        method._seen[k][2:] = [-1.0, 1.0]
    assert set(method.squares(sites).values()) == {1.0}


def test_flat_losses_keep_equal_scales():
    weights = {"a": torch.zeros(4, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    method = explored(weights, lambda w: 1.0, steps=10)
    assert set(method.squares(sites_of(weights)).values()) == {1.0}


def test_boost_is_bounded_by_the_number_of_groups():
    weights, loss, _ = quadratic()
    sites = sites_of(weights)
    method = explored(weights, loss)
    squares, trace = method.squares(sites), method.curvature(sites)
    share = {k: squares[k] * trace[k] / sum(squares[j] * trace[j] for j in trace) for k in trace}
    for k in trace:
        # the same quotients of sums in another order, fp64
        assert method._boost(k, sites, squares) == pytest.approx(min(3.0, 1 / share[k]), rel=1e-9)


def test_exploring_steps_ask_three_and_touch_one_group():
    check_exploring_points()
    weights, loss, _ = quadratic()
    _, _, ctx = estimate_of(AdaptiveScales(level="tensor", explore=2), weights, loss, step=0)
    assert ctx.queries == 2
    assert AdaptiveScales(explore=2).forwards == 2.5


def run_to(steps, state=None, start=None, ledger=None):
    weights, loss, _ = quadratic()
    named = [(k, nn.Parameter((start or weights)[k].clone())) for k in weights]
    opt = ZO(named, AdaptiveScales(level="tensor", explore=2), lr=2e-4, eps=1e-2, ledger=ledger)
    if state is not None:
        opt.load_state_dict(state)
    while opt.step_number < steps:
        opt.step(lambda: loss({k: p.detach() for k, p in named}))
    return opt, {k: p.detach().clone() for k, p in named}


def test_resumed_and_replayed_runs_are_the_uninterrupted_one(tmp_path):
    _, whole = run_to(30, ledger=tmp_path / "ledger.jsonl")
    for stop in (1, 15, 16):
        opt, half = run_to(stop)
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        _, again = run_to(30, torch.load(tmp_path / "state.pt", weights_only=True), half)
        assert all(torch.equal(whole[k], again[k]) for k in whole)
    opt, rebuilt = run_to(0)
    replay(opt, read_ledger(tmp_path / "ledger.jsonl").entries)
    slots = opt.weights.slots
    assert all(torch.equal(whole[k], slots[k].tensor) for k in rebuilt)


def test_refused_steps_leave_no_trace():
    opt, _ = run_to(1)
    before = opt.method.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: float("nan"))
    assert opt.refused == 1
    assert opt.method.state_dict() == before


def test_state_belongs_to_its_tensors():
    opt, _ = run_to(8)
    other = AdaptiveScales(level="tensor")
    other.load_state_dict(opt.method.state_dict())
    with pytest.raises(ConfigError, match="other tensors"):
        other.estimate(bare_context({"else": torch.zeros(3)}, lambda w: 0.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"level": "head"}, "level must be one of 'kind', 'layer', 'module', 'tensor'"),
        ({"power": -1.0}, "power must be"),
        ({"explore": 0}, "explore must be at least 1"),
        ({"memory": 1.0}, "no standard error"),
        ({"rounds": 1}, "no standard error"),
        ({"limit": 0.5}, "limit must be"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        AdaptiveScales(**options)
