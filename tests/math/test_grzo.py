"""GRZO: the plain estimator's moments, the normalised step's invariances, replay and steps."""

import math

import pytest
import torch
from tests.checks import grzo as checks
from tests.checks.grzo import estimate_on, start

from zotune.errors import ClosureError, ConfigError
from zotune.methods.grzo import GRZO, spread_of
from zotune.optim.optimizer import ZO
from zotune.runs.config import TrainConfig
from zotune.runs.job import prepare


@pytest.mark.parametrize("normalise", [True, False])
def test_equals_the_readable_twin(normalise):
    checks.check_equals_the_readable_twin(normalise)


def test_moments_by_drawing():
    """Gradients that agree: (d + 2)/B + 3(B - 1)/B against MeZO's d + 2."""
    agreeing = checks.check_moments("agreeing")
    square = float(checks.slopes("agreeing")[0].square().sum())
    assert agreeing == pytest.approx(square * (17 / 3 + 2), rel=1e-12)


def test_moments_by_drawing_of_examples_that_have_nothing_in_common():
    """Orthonormal gradients: (d + 2)/B, which is MeZO's (d + 2) |G|^2 with |G|^2 = 1/B."""
    assert checks.check_moments("orthogonal") == pytest.approx(17 / 3, rel=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["agreeing", "orthogonal"])
def test_moments_in_many_draws(kind):
    checks.check_moments(kind, 3000)


def test_scale_of_the_loss_does_not_matter():
    checks.check_scale_of_the_loss_does_not_matter()


def test_equal_differences_give_no_step():
    checks.check_equal_differences_give_no_step()


def test_normalised_is_plain_over_the_spread():
    """Weights are rounded to 20 bits of the largest in both."""
    weights, gradients = start(), checks.slopes("orthogonal")
    losses = checks._quadratic(gradients, weights)
    plain, _ = estimate_on(weights, losses, normalise=False)
    made, estimate = estimate_on(weights, losses)
    assert torch.allclose(made * estimate.info["spread"], plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_spread():
    assert spread_of([0.1] * 7) == 0.0
    assert spread_of([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(14 / 3), rel=1e-15)  # three squares of fp64


def test_a_batch_of_one_has_no_spread():
    weights = start()
    with pytest.raises(ConfigError, match="batch of 1"):
        estimate_on(weights, lambda w: w["b.bias"][:1])
    made, _ = estimate_on(weights, lambda w: w["b.bias"][:1], normalise=False)
    assert float(made.abs().max()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_are_refused(bad):
    made = estimate_on(start(), lambda w: torch.stack([w["b.bias"][0], torch.tensor(bad, dtype=torch.float64)]))
    assert not made[1].is_finite()


def test_closures_that_return_one_number_are_refused():
    named, losses = checks.twin_model()
    opt = ZO(named, "grzo", engine="in_place")
    with pytest.raises(ClosureError, match=r"one loss per example, a tensor of shape \(B,\)"):
        opt.step(lambda: losses(dict(named)).mean())


def test_a_batch_that_changes_inside_a_step_is_refused():
    named, losses = checks.twin_model()
    sizes = iter([4, 4, 4, 3])
    opt = ZO(named, "grzo", engine="in_place")
    with pytest.raises(ClosureError, match="must see one"):
        opt.step(lambda: losses(dict(named))[: next(sizes)])


def test_forwards_and_what_goes_into_the_ledger():
    named, losses = checks.twin_model()
    opt = ZO(named, "grzo", lr=0.0, engine="in_place")
    opt.step(lambda: losses(dict(named)))
    assert opt.forwards == GRZO().forwards == 2
    assert len(opt.last.losses) == 8
    plus, minus = opt.last.losses[:4], opt.last.losses[4:]
    mean = sum(a - b for a, b in zip(plus, minus, strict=True)) / 4
    # what the log shows: the mean slope. Sums of four fp64 numbers in another order
    assert float(opt.last.estimate.info["rho"]) == pytest.approx(mean / (2 * opt.param_groups[0]["eps"]), rel=1e-12)
    assert opt.engine.check_forwards == 1 + 2 * 3, "a look, and three more forwards at each point"


def test_runs_of_the_command_line_say_that_they_cannot():
    with pytest.raises(ConfigError, match="a loss for each example"):
        prepare(TrainConfig(method="grzo"), None, None)  # before anything is loaded
