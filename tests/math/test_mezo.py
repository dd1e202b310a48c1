"""MeZO is the estimator of its paper (specs: M1, M2, M7, M9; contracts 2 and 11)."""

import math

import pytest
import torch
from tests.checks.mezo import (
    SEED,
    check_equals_the_readable_twin,
    check_logged_loss_is_the_mean_of_the_pair,
    check_quadratic_slope_is_exact,
    quadratic,
    realised,
    twin_model,
    z_of_step,
)
from torch import nn

from zotune.core.direction import HERE, Noise
from zotune.core.noise import stream
from zotune.errors import ConfigError
from zotune.methods import METHODS
from zotune.methods.mezo import MeZO
from zotune.optim.optimizer import ZO
from zotune.rules.base import decays


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 30.0])
def test_slope_on_a_quadratic_is_exact_for_any_eps(eps):
    check_quadratic_slope_is_exact(eps)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("noise", ["normal", "gaussian", "rademacher"])
def test_equals_the_readable_twin(n, sides, noise):
    check_equals_the_readable_twin(n=n, sides=sides, noise=noise)


def test_logged_loss_is_the_mean_of_the_pair():
    check_logged_loss_is_the_mean_of_the_pair()


def test_logged_loss_of_several_pairs_and_of_one_side():
    named, closure, _ = quadratic()
    for options, expected in [
        ({"n": 3}, lambda asked: sum(asked[-6:]) / 6),
        ({"n": 3, "sides": 1}, lambda asked: asked[-4]),  # the loss at the current weights, which is unbiased
    ]:
        asked = []
        opt = ZO(named, lr=0.0, eps=0.5, seed=SEED, engine="in_place", method_options=options)
        logged = opt.step(lambda asked=asked: asked.append(float(closure())) or asked[-1])
        assert float(logged) == pytest.approx(expected(asked), rel=1e-15)


def test_one_direction_is_the_pair_formula():
    """The estimate is exactly rho * z with rho = (plus - minus) / (2 eps), and its losses are those of the pair."""
    named, closure, _ = quadratic()
    opt = ZO(named, lr=0.0, eps=0.25, seed=SEED)
    opt.step(closure)
    plus, minus = opt.last.losses
    ((coefficient, _),) = opt.last.estimate.direction.terms
    assert float(coefficient) == (plus - minus) / 0.5
    assert torch.equal(realised(opt.last.estimate.direction, named), float(coefficient) * z_of_step(named))


def test_n_directions_with_one_seed_are_one_direction(monkeypatch):
    """M7: n-SPSA with n equal directions is n=1. n=4: sums and division by 4 are exact, so the bits are equal."""
    results = []
    for n in (1, 4):
        named, closure, _ = quadratic()
        opt = ZO(named, lr=0.01, eps=0.25, seed=SEED, method_options={"n": n})
        monkeypatch.setattr("zotune.core.context.Context._next", lambda self: 0)
        opt.step(closure)
        results.append(realised(opt.last.estimate.direction, named))
    assert torch.equal(results[0], results[1])


def test_directions_of_a_step_and_of_steps_differ():
    named, closure, _ = quadratic()
    opt = ZO(named, lr=0.0, eps=0.25, seed=SEED, method_options={"n": 2})
    seen = []
    for _ in range(2):
        opt.step(closure)
        seen += [realised(direction, named) for _, direction in opt.last.estimate.direction.terms]
    assert all(not torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


def _mlp():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)

    def loss():
        return (model(x) - y).square().mean()

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    return model, loss, gradient


def _estimates(count, options, engine="in_place", eps=1e-4, noise="normal"):
    model, loss, gradient = _mlp()
    opt = ZO(model.named_parameters(), lr=0.0, eps=eps, seed=SEED, engine=engine, method_options=options, noise=noise)
    named = list(model.named_parameters())
    made = []
    for _ in range(count):
        opt.step(loss)
        made.append(realised(opt.last.estimate.direction, named))
    return torch.stack(made), gradient


def _check_mean(count, options, n):
    """Mean of N estimates: the slope on the gradient is 1 +- sqrt(2/(nN)), its squared error (d + 1)/(nN) |g|^2.

    The O(eps^2) bias at eps 1e-4 is 1e-8, far below either.
    """
    made, g = _estimates(count, options)
    d, total = g.numel(), count * n
    mean = made.mean(dim=0)
    slope = float(mean @ g / (g @ g))
    assert abs(slope - 1) < 5 * math.sqrt(2 / total)
    ratio = float((mean - g).square().sum() / (g @ g)) * total / (d + 1)
    # chi-squared with d degrees of freedom, whose largest term (along g) has twice the variance
    assert abs(ratio - 1) < 5 * math.sqrt(2 / d) * 1.5


@pytest.mark.parametrize("options", [{"n": 1}, {"n": 3}, {"n": 1, "sides": 1}])
def test_mean_of_estimates_is_the_gradient_of_autograd(options):
    _check_mean(1200 // options["n"], options, options["n"])


@pytest.mark.statistical
@pytest.mark.parametrize("options", [{"n": 1}, {"n": 3, "sides": 1}])
def test_mean_of_many_estimates_is_the_gradient_of_autograd(options):
    _check_mean(40000, options, options["n"])


@pytest.mark.parametrize("n", [1, 4])
def test_second_moment_of_estimates(n):
    """M2: E|g|^2 = (d + n + 1)/n |grad|^2, through the engine; 5 standard errors of the sample."""
    made, g = _estimates(1200 // n, {"n": n})
    squares = made.square().sum(dim=1) / (g @ g)
    expected = (g.numel() + n + 1) / n
    assert abs(float(squares.mean()) - expected) < 5 * float(squares.std()) / math.sqrt(len(squares))


def test_one_side_has_a_bias_of_order_eps_and_two_sides_of_eps_squared():
    """Error of rho against z.grad along the same z when eps is divided by 10: 10 times less, and 100 times less.

    Leading terms dominate at these eps; the next term changes the ratios by a few per cent of eps.
    """
    model, _, gradient = _mlp()
    z = z_of_step(list(model.named_parameters()))
    slope = float(z @ gradient)
    errors = {}
    for sides in (1, 2):
        for eps in (1e-2, 1e-3):
            torch.manual_seed(0)
            made, _ = _estimates(1, {"sides": sides}, eps=eps)
            errors[sides, eps] = abs(float(made[0] @ z / (z @ z)) - slope)
    assert errors[1, 1e-2] / errors[1, 1e-3] == pytest.approx(10, rel=0.2)
    assert errors[2, 1e-2] / errors[2, 1e-3] == pytest.approx(100, rel=0.2)
    assert errors[2, 1e-3] < errors[1, 1e-3] / 10


# ----------------------------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", True),
        ("lm_head.weight", True),
        ("q_proj.lora_A.weight", True),
        ("model.layers.0.q_proj.bias", False),
        ("model.norm.weight", False),  # LLaMA's final norm, which MeZO's code decays
        ("model.layers.0.input_layernorm.weight", False),
        ("encoder.layer.0.LayerNorm.weight", False),
        ("transformer.h.0.ln_1.weight", False),
        ("transformer.ln_f.weight", False),
    ],
)
def test_names_that_are_decayed(name, expected):
    assert decays(name) is expected


def test_weight_decay_shrinks_exactly_the_decayed_tensors():
    """A constant loss has slope 0, so only decay is left: w (1 - lr wd), and bits unchanged elsewhere (M9)."""
    named, _ = twin_model()
    before = {name: p.detach().clone() for name, p in named}
    ZO(named, lr=0.1, weight_decay=0.5, engine="in_place").step(lambda: 1.0 + 0.0 * float(named[0][1].sum()))
    for name, p in named:
        expected = before[name] * (1 - 0.1 * 0.5) if decays(name) else before[name]
        assert torch.equal(p.detach(), expected), name


def test_schedules_are_read_every_step():
    """lr after step k is 0.1 / 2^k: the moves along the recorded estimates are -lr_k * g_k exactly (fp64, to rounding)."""
    named, closure, _ = quadratic()
    opt = ZO(named, lr=0.1, eps=0.25, seed=SEED)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
    for k in range(4):
        before = torch.cat([p.detach().clone() for _, p in named])
        opt.step(closure)
        schedule.step()
        moved = torch.cat([p.detach() for _, p in named]) - before
        expected = -0.1 * 0.5**k * realised(opt.last.estimate.direction, named)
        assert torch.allclose(moved, expected, rtol=1e-9, atol=1e-14)


def test_eps_is_read_every_step():
    named, closure, _ = quadratic()
    opt = ZO(named, lr=0.0, eps=0.25, seed=SEED, engine="in_place")
    seen = []
    for eps in (0.25, 0.5):
        opt.param_groups[0]["eps"] = eps
        here = torch.cat([p.detach() for _, p in named])
        opt.step(lambda: seen.append(torch.cat([p.detach().clone() for _, p in named])) or closure())
        shift = seen[-2] - here
        # w + eps z - w in fp64, z of 1e-3 at least
        assert torch.allclose(shift, eps * z_of_step(named, step=opt.step_number - 1), rtol=1e-12)


def test_eps_of_a_group_scales_the_direction():
    """Group 2 with 4 eps is probed at +-4 eps z and moved along 4 z: one scaled direction, and rho is its slope."""
    named, closure, gradient = quadratic()
    groups = [{"params": named[:1]}, {"params": named[1:], "eps": 0.4}]
    opt = ZO(groups, lr=0.01, eps=0.1, seed=SEED)
    before = torch.cat([p.detach().clone() for _, p in named])
    opt.step(closure)
    scaled = torch.cat([torch.ones(5), torch.full((7,), 4.0)]).double() * z_of_step(named)
    rho = float(scaled @ gradient)
    assert opt.last.estimate.info["rho"] == pytest.approx(rho, rel=1e-9)
    moved = torch.cat([p.detach() for _, p in named]) - before
    assert torch.allclose(moved, -0.01 * rho * scaled, rtol=1e-8)


def test_lr_of_a_group():
    named, closure, _ = quadratic()
    groups = [{"params": named[:1]}, {"params": named[1:], "lr": 0.0}]
    still = named[1][1].detach().clone()
    opt = ZO(groups, lr=0.1, eps=0.1)
    opt.step(closure)
    assert torch.equal(named[1][1].detach(), still)


# ----------------------------------------------------------------------------------------------------------------------
# The method as a type


@pytest.mark.parametrize("options", [{"n": 0}, {"n": -3}, {"sides": 0}, {"sides": 3}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="method 'mezo'"):
        MeZO(**options)


def test_forwards_declared():
    assert [MeZO(n=n, sides=s).forwards for n, s in [(1, 2), (3, 2), (1, 1), (3, 1)]] == [2, 6, 2, 4]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    made = METHODS[name]()
    assert made.name == name
    assert made.paper
    assert made.extra_state
    assert made.forwards > 0
    made.load_state_dict(made.state_dict())


def test_methods_ask_for_nothing_but_losses():
    """The one-sided form asks for the current weights as the empty point, which an engine need not perturb."""
    asked = []

    class Ctx:
        eps = 0.5

        def gaussian(self):
            return z

        def loss(self, points):
            asked.append(list(points))
            return torch.ones(len(points), dtype=torch.float64)

    z = Noise(stream(0, "test"))
    MeZO(n=2, sides=1).estimate(Ctx())
    ((here, *others),) = asked
    assert here is HERE
    assert len(others) == 2  # all in one wave, which an engine may answer in one forward
