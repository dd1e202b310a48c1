"""LOZO is the estimator of its paper."""

import math

import pytest
import torch
from tests.checks import lozo as checks
from tests.checks.lozo import estimates, weights
from tests.checks.mezo import SEED
from tests.support.bare import bare_context, estimate_of, flat, realised

from zotune.core.factors import TABLE_CEILING
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.lozo import LOZO, Lazy
from zotune.methods.sources import make_source


def test_probes_and_estimate_are_the_papers():
    checks.check_probes_and_estimate_are_the_papers()


def test_v_is_kept_for_the_interval():
    checks.check_v_is_kept_for_the_interval()


def test_tensors_of_equal_shape_have_their_own_noise():
    checks.check_tensors_of_equal_shape_have_their_own_noise()


@pytest.mark.parametrize("noise", ["normal", "gaussian", "rademacher"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_readable_twin(momentum, noise):
    checks.check_equals_the_readable_twin(momentum, noise=noise)


def test_momentum_is_the_dense_mean_inside_an_interval():
    checks.check_momentum_is_the_dense_mean_inside_an_interval()


def test_momentum_is_taken_over_to_a_new_v():
    checks.check_momentum_is_taken_over_to_a_new_v()


def test_refused_steps_teach_nothing():
    checks.check_refused_steps_teach_nothing()


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resume(tmp_path, stop):
    checks.check_resume(tmp_path / "state.pt", stop)


@pytest.mark.parametrize("noise", ["normal", "gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [2, 300])
def test_factors_are_bounded_and_their_sums_exact(noise, rank):
    """Of every kind of noise: |U| is at most the ceiling that sums of steps rely on, and no order of summation shows."""
    w = weights({"w": (400, 310)})
    made = Lazy(rank=rank).low_rank_part(bare_context(w, None, kind=noise)).factors["w"]
    largest = float(made.changing.abs().max())
    assert 0 < largest <= (TABLE_CEILING if made.ceiling is None else made.ceiling)
    found = made.run(0, 400 * 310, torch.device("cpu")).view(400, 310)
    left, right = made.left.double(), made.right.double()
    backwards = sum(left[:, k, None] * right[:, k] for k in reversed(range(rank)))
    assert torch.equal(found.double(), backwards)


# ----------------------------------------------------------------------------------------------------------------------
# Moments


def within(samples, expected, sigmas=5.0):
    """The mean of independent samples (first dimension) is the expected one: 5 standard errors each."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    worst = ((samples.mean(dim=0) - expected).abs() / (error + 1e-12)).max()
    assert worst < sigmas, f"{float(worst):.1f} standard errors off"


def check_moments_over_new_v(count, rank):
    """E[c U V^T / r] = G, and E|c U V^T / r|^2 = (mn + 2 + 2 (m + n + 1) / r) |G|^2."""
    made, slope, _ = estimates(count, 1, rank=rank)
    within(made, slope.flatten())
    m, n = slope.shape
    within(made.square().sum(dim=1), (m * n + 2 + 2 * (m + n + 1) / rank) * slope.square().sum())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_moments_over_new_v(rank):
    check_moments_over_new_v(1200, rank)


@pytest.mark.statistical
@pytest.mark.parametrize("rank", [1, 3])
def test_moments_over_many_new_v(rank):
    check_moments_over_new_v(10000, rank)


def test_moments_while_v_is_kept():
    """E = G V V^T / r; E|.|^2 = (m tr(M) |GV|^2 + 2 tr(GV M (GV)^T)) / r^2 with M = V^T V."""
    made, slope, v = estimates(1200, 10**6)
    within(made, (slope @ v @ v.T / 2).flatten())
    gv, small = slope @ v, v.T @ v
    second = 4 * small.trace() * gv.square().sum() + 2 * (gv @ small @ gv.T).trace()
    within(made.square().sum(dim=1), second / 4)


def test_source_has_unit_variance():
    """E[z z^T] = I over everything random: U V^T / sqrt(r) on matrices."""
    tensors, source = weights({"a": (3, 2), "bias": (2,)}), Lazy(rank=2, interval=1)
    made = []
    for step in range(1500):
        ctx = bare_context(tensors, lambda w: 0.0, step=step, seed=SEED)
        made.append(flat(realised(source.draw(ctx), tensors)))
    z = torch.stack(made)
    within(z, torch.zeros(8, dtype=torch.float64))
    within((z[:, :, None] * z[:, None, :]).flatten(1), torch.eye(8, dtype=torch.float64).flatten())


# ----------------------------------------------------------------------------------------------------------------------
# As a type


@pytest.mark.parametrize("options", [{"rank": 0}, {"interval": 0}, {"momentum": 1.0}, {"momentum": -0.1}], ids=str)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="lozo"):
        LOZO(**options)
    if "momentum" not in options:
        with pytest.raises(ConfigError, match="lozo"):
            make_source("lozo", options)


def test_a_rank_above_the_smaller_side_is_refused_before_any_loss():
    def never(w):
        raise AssertionError("a loss was asked for")

    with pytest.raises(ConfigError, match=r"between 1 and 9 for the tensor 'a' of shape 12 x 9 .*got 10"):
        LOZO(rank=10).estimate(bare_context(weights(), never))
    with pytest.raises(ConfigError, match="'a'"):
        LOZO(rank=10).extra_bytes([Site("a", (12, 9))])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_forwards_and_bytes_are_as_declared(momentum):
    method = LOZO(rank=3, momentum=momentum)
    _, _, ctx = estimate_of(method, weights(), lambda w: float(w["a"].sum()))
    assert ctx.queries == method.forwards == 2
    kept = [*method._mean.values(), *method._next.values()]
    v = sum(side.nbytes for side in method.source.kept(ctx, 0).values())
    assert v == method.source.extra_bytes(ctx.sites) == 2 * 9 * 3 * 4
    assert sum(n.nbytes for n in kept) == method.extra_bytes(ctx.sites) - v == (2 * 12 * 3 * 4 if momentum else 0)


@pytest.mark.parametrize("noise", ["normal", "gaussian"])
def test_v_lies_as_thin_products_read_it(noise):
    """Else each layer would keep a copy of its own."""
    _, _, ctx = estimate_of(LOZO(rank=3), weights(), lambda w: float(w["a"].sum()))
    ctx._kind = noise
    sides = Lazy(3).kept(ctx, 0)
    assert sides
    assert all(side.t().is_contiguous() and side.untyped_storage().nbytes() == side.nbytes for side in sides.values())


def test_state_is_copied_and_survives_loading(tmp_path):
    method, tensors = LOZO(rank=2, momentum=0.9), weights()
    estimate_of(method, tensors, lambda w: float(w["a"].sum()), step=120)
    state = method.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other = LOZO(rank=2, momentum=0.9)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state_dict()["period"] == 2
    other.load_state_dict(state)
    state["mean"]["a"].zero_()
    assert other._mean["a"].abs().sum() > 0
    assert method._mean["a"].abs().sum() > 0
    assert other._mean["a"].dtype == torch.float32
    other.load_state_dict({})  # as of an optimizer that has not stepped


def test_eps_of_a_group_scales_the_estimate_once():
    """A group with 3 eps is probed along 3 U V^T, and moves by 3 c U V^T / r; with momentum too."""
    tensors = weights({"a": (12, 9)})
    for momentum in (0.0, 0.9):
        made = []
        for factor in (1.0, 3.0):
            asked = []
            ctx = bare_context(tensors, lambda w: float(w["a"].sum()), asked=asked, seed=SEED)
            ctx._factors = {"a": factor}
            estimate = LOZO(rank=2, momentum=momentum).estimate(ctx)
            direction = realised(estimate.direction, tensors)["a"] / estimate.info["rho"]
            made.append((direction, realised(asked[0], tensors)["a"]))
        assert torch.allclose(made[1][0], 3 * made[0][0], rtol=1e-5, atol=1e-5)
        assert torch.allclose(made[1][1], 3 * made[0][1], rtol=1e-12)
