"""Forward gradient is the estimator of its paper (property C6 of the ZO-Bench methods; moments as MeZO's, eps -> 0)."""

import math

import pytest
import torch
from tests.checks.forward_grad import (
    check_equals_the_readable_twin,
    check_estimate_is_slope_times_direction,
    check_limit_of_spsa,
    gradient_of,
    twin_model,
)
from tests.checks.mezo import SEED, quadratic, realised
from tests.support.models import CASES, assert_same_bits, snapshot
from torch import nn

from zotune.core.context import Context
from zotune.core.direction import Combination, Noise
from zotune.core.ledger import read_ledger
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.engines.layerwise import Layerwise
from zotune.errors import ConfigError
from zotune.methods.forward_grad import ForwardGrad
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("noise", ["normal", "gaussian", "rademacher"])
def test_equals_the_readable_twin(n, noise):
    check_equals_the_readable_twin(n=n, noise=noise)


def test_limit_of_spsa():
    check_limit_of_spsa()


@pytest.mark.parametrize("n", [1, 3])
def test_estimate_is_slope_times_direction(n):
    check_estimate_is_slope_times_direction(n)


@pytest.mark.parametrize("eps", [1e-4, 1.0, 30.0])
def test_is_mezo_on_a_quadratic(eps):
    """Central differences are exact there for any eps. Rounding of the losses (about 50) over eps: 50 * 2**-52 / eps."""
    rhos = []
    for method in ("mezo", "forward_grad"):
        named, closure, _ = quadratic()
        opt = ZO(named, method, lr=0.0, eps=eps, seed=SEED)
        opt.step(closure)
        rhos.append(opt.last.estimate.info["rho"])
    assert abs(rhos[0] - rhos[1]) < 1e-12 * (1 + 1 / eps) * (1 + abs(rhos[1]))


def test_eps_plays_no_part():
    ends = []
    for eps in (1e-5, 10.0):
        named, closure, _, _ = twin_model()
        opt = ZO(named, "forward_grad", lr=0.05, eps=eps, seed=SEED)
        for _ in range(3):
            opt.step(closure)
        ends.append(torch.cat([p.detach().flatten() for _, p in named]))
    assert torch.equal(ends[0], ends[1])


def test_logs_the_loss_at_the_current_weights():
    """The same kernels on the same numbers as a plain forward: equal. Thirds of it add up to within an ulp."""
    named, closure, _, _ = twin_model()
    for n, rel in ((1, 0.0), (3, 2.0**-52)):
        logged = ZO(named, "forward_grad", lr=0.0, method_options={"n": n}).step(closure)
        assert float(logged) == pytest.approx(float(closure()), rel=rel, abs=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Moments: by the exact slope of a linear loss, thousands of steps a second


def estimates(count, n=1, d=30, **options):
    """(count, d) estimates of a fixed gradient of length 1, which is returned too."""
    gradient = torch.linspace(-1, 2, d, dtype=torch.float64)
    gradient /= gradient.norm()
    site, method = Site("w.weight", (d,)), ForwardGrad(n=n, **options)
    made = []
    for step in range(count):
        ctx = Context(
            step=step,
            seed=3,
            hyperparameters={"eps": 1.0},
            sites=[site],
            ask=None,
            weight=None,
            slope=lambda z: (0.0, float(gradient @ z.realise(site, torch.float64))),
        )
        made.append(method.estimate(ctx).direction.realise(site, torch.float64))
    return torch.stack(made), gradient


def check_moments(count, n):
    """Mean along the gradient 1 +- sqrt(2/(nN)); squared error of the mean (d + 1)/(nN), and E|g|^2 = (d + n + 1)/n."""
    made, g = estimates(count, n)
    d, total = g.numel(), count * n
    mean = made.mean(dim=0)
    assert abs(float(mean @ g) - 1) < 5 * math.sqrt(2 / total)
    ratio = float((mean - g).square().sum()) * total / (d + 1)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / d) * 1.5  # chi-squared, whose largest term has twice the variance
    squares = made.square().sum(dim=1)
    assert abs(float(squares.mean()) - (d + n + 1) / n) < 5 * float(squares.std()) / math.sqrt(count)


@pytest.mark.parametrize("n", [1, 4])
def test_moments(n):
    check_moments(2000 // n, n)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [1, 4])
def test_moments_of_many(n):
    check_moments(40000 // n, n)


def test_signs_have_less_variance():
    """Rademacher: z_i^2 = 1, so E|g|^2 = d |grad|^2 exactly, each term being |grad . z|^2 d."""
    made, g = estimates(2000, source="rademacher")
    squares = made.square().sum(dim=1)
    assert abs(float(squares.mean()) - g.numel()) < 5 * float(squares.std()) / math.sqrt(len(squares))


# ----------------------------------------------------------------------------------------------------------------------
# The method as a type


def test_options_out_of_range():
    with pytest.raises(ConfigError, match="method 'forward_grad'"):
        ForwardGrad(n=0)
    with pytest.raises(ConfigError, match=r"Unknown source .gausian.\. Did you mean .gaussian."):
        ForwardGrad(source="gausian")


def test_cost_declared():
    assert [ForwardGrad(n=n).forwards for n in (1, 3)] == [1, 3]
    assert ForwardGrad().needs == {"slope"}
    assert ForwardGrad().extra_bytes([Site("a", (5,))]) == 0


def test_an_engine_without_slopes_is_refused(monkeypatch):
    monkeypatch.setattr(Layerwise, "offers", frozenset())
    with pytest.raises(ConfigError, match="'forward_grad' needs slope, which engine 'layerwise' does not offer"):
        ZO([("w", nn.Parameter(torch.zeros(3)))], "forward_grad", engine="layerwise")


def test_eps_of_a_group_scales_the_direction():
    """Group 2 with 4 eps: slope and move along the scaled direction, as MeZO does."""
    named, closure, gradient = quadratic()
    groups = [{"params": named[:1]}, {"params": named[1:], "eps": 0.4}]
    opt = ZO(groups, "forward_grad", lr=0.01, eps=0.1, seed=SEED)
    before = torch.cat([p.detach().clone() for _, p in named])
    opt.step(closure)
    z = realised(Noise(stream(SEED, "step", 0, 0)), named)
    scaled = torch.cat([torch.ones(5), torch.full((7,), 4.0)]).double() * z
    assert opt.last.estimate.info["rho"] == pytest.approx(float(scaled @ gradient), rel=1e-12)
    moved = torch.cat([p.detach() for _, p in named]) - before
    assert torch.allclose(moved, -0.01 * float(scaled @ gradient) * scaled, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_from_its_ledger(tmp_path, dtype):
    """Loss and slope are in the ledger; the recorded engine gives both back: equal bits, and no model is run."""
    torch.manual_seed(0)
    case = CASES["llama"](dtype)
    opt = ZO(case.named, "forward_grad", lr=1e-3, eps=1e-2, ledger=tmp_path / "ledger.jsonl", method_options={"n": 2})
    for _ in range(5):
        opt.step(case.closure)
    assert opt.refused == 0
    torch.manual_seed(0)
    base = CASES["llama"](dtype)
    start, ledger = snapshot(base), read_ledger(tmp_path / "ledger.jsonl")
    assert all(len(entry.losses) == 4 for entry in ledger.entries)
    replay(optimizer_for(base.named, ledger), ledger.entries)
    assert any(not torch.equal(start[name], after) for name, after in snapshot(base).items())
    assert_same_bits(snapshot(case), snapshot(base))


def test_learns_a_small_network():
    """20 steps at a safe rate on a fixed batch lower the loss: the sign of the whole is right."""
    named, closure, _, _ = twin_model()
    gradient = gradient_of(named, closure)
    opt = ZO(named, "forward_grad", lr=0.02, seed=1)
    first = float(opt.step(closure))
    for _ in range(60):
        last = float(opt.step(closure))
    assert last < first - 0.02 * float(gradient @ gradient)
    assert isinstance(opt.last.estimate.direction, Combination)
