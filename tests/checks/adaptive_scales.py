"""Claims about adaptive scales that mutations must break."""

import math
from dataclasses import replace

import torch
from torch import nn

from tests.reference.adaptive_scales import Twin
from tests.support.bare import bare_context, estimate_of, realised, sites_of
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.adaptive_scales import AdaptiveScales
from zotune.methods.mezo import MeZO
from zotune.optim.optimizer import ZO

# (numbers, curvature of each, scale of the gradient's numbers): a block that only costs, two that pay
BLOCKS = {"costs": (900, 1.0, 0.02), "pays": (300, 0.5, 1.0), "steep": (60, 20.0, 3.0)}
TRACE = {k: d * h for k, (d, h, _) in BLOCKS.items()}


def quadratic(seed=0):
    """Weights at which block k of sum h_k w_k^2 / 2 has a gradient of the given scale; the loss; |g_k|^2."""
    generator = torch.Generator().manual_seed(seed)
    weights = {k: g / h * torch.randn(d, dtype=torch.float64, generator=generator) for k, (d, h, g) in BLOCKS.items()}
    energy = {k: float((BLOCKS[k][1] * w).square().sum()) for k, w in weights.items()}
    return weights, lambda at: sum(float(BLOCKS[k][1] * w.square().sum() / 2) for k, w in at.items()), energy


def explored(weights, loss, steps=600, **options):
    """A method that has looked at fixed weights."""
    method = AdaptiveScales(**{"level": "tensor", "explore": 1, "memory": 1e9, **options})
    for step in range(steps):
        estimate_of(method, weights, loss, step=step, seed=3, eps=1e-2)
    return method


def with_options(method, **changes):
    """A method of other options that has seen the same."""
    changed = replace(method, **changes)
    changed.load_state_dict(method.state_dict())
    return changed


def check_equals_the_readable_twin(steps=60):
    """60 steps in fp64, scales from step 24 on: a few 2**-53 a step, amplified by 1 / eps^2 = 1e4 in curvatures."""
    weights, loss, _ = quadratic()
    named = [(k, nn.Parameter(w.clone())) for k, w in weights.items()]
    twin = Twin({k: w.numel() for k, w in weights.items()}, explore=4, memory=4.0, rounds=2)
    options = {"level": "tensor", "explore": 4, "memory": 4.0, "rounds": 2}
    opt = ZO(named, AdaptiveScales(**options), lr=2e-4, eps=1e-2, seed=11)
    with torch.no_grad():
        for step in range(steps):

            def draw(k, step=step):
                return Noise(stream(11, "step", step, 0)).realise(Site(k, weights[k].shape), torch.float64)

            twin.step(weights, loss, draw, lr=2e-4, eps=1e-2)
            opt.step(lambda: loss(dict(named)))
    for k, p in named:
        assert float((p.detach() - weights[k]).abs().max()) < 1e-8, k
    found = opt.method.squares(sites_of(weights))
    for k, square in twin.squares().items():
        assert abs(found[k] - square) < 1e-6 * square
    assert max(found.values()) > 2.0 * min(found.values()), "scales did not differ, so nothing was compared"


def check_finds_energy_and_curvature():
    """200 looks at each block. r^2 / |g|^2 is a chi square of 1: sqrt(2 / 200) = 10 %, 5 of them.

    (u, H u) / tr H has sqrt(2 / d): at most 18 % for one look at 60 numbers, 1.3 % for 200; 5 of them; differences of a
    quadratic are exact but for rounding.
    """
    weights, loss, energy = quadratic()
    method = explored(weights, loss)
    for k, (times, mean_energy, mean_curvature, _) in method._seen.items():
        assert times == 200
        assert abs(mean_energy / energy[k] - 1) < 0.5, k
        assert abs(mean_curvature / TRACE[k] - 1) < 0.065, k
    for k, found in method.curvature(sites_of(weights)).items():  # plus one standard error: at most 1.3 % here
        assert method._seen[k][2] < found < 1.03 * method._seen[k][2]


def check_scales_follow_the_ratio():
    """s_k^2 / s_j^2 = (R_k / R_j)^power; sum s^2 T = sum T; the gain is 1 + Var R / (E R)^2."""
    weights, loss, _ = quadratic()
    sites = sites_of(weights)
    method = explored(weights, loss, limit=1e9)
    for power in (0.0, 0.5, 1.0, 2.0):
        method = with_options(method, power=power)
        squares, trace = method.squares(sites), method.curvature(sites)
        ratio = {k: method._seen[k][1] / trace[k] for k in trace}
        for k in trace:
            expected = (ratio[k] / ratio["pays"]) ** power
            assert math.isclose(squares[k] / squares["pays"], expected, rel_tol=1e-9)
        total = sum(trace.values())
        assert math.isclose(sum(squares[k] * trace[k] for k in trace), total, rel_tol=1e-9)
        if power == 1.0:
            mean = sum(trace[k] * ratio[k] for k in trace) / total
            variance = sum(trace[k] * (ratio[k] - mean) ** 2 for k in trace) / total
            a = sum(squares[k] * method._seen[k][1] for k in trace)
            assert math.isclose(a / (mean * total), 1 + variance / mean**2, rel_tol=1e-9)


def decrease(method, weights, loss, lr, samples=250):
    """Mean decrease of the loss in one ordinary step, and its standard error."""
    found = []
    for step in range(samples):
        ctx = bare_context(weights, loss, step=4 * step, seed=9, eps=1e-2)  # never an exploring one
        estimate = method.estimate(ctx)
        moved = {k: w - lr * realised(estimate.direction, weights)[k] for k, w in weights.items()}
        found.append(loss(weights) - loss(moved))
    found = torch.tensor(found, dtype=torch.float64)
    return float(found.mean()), float(found.std() / samples**0.5)


def check_gain_is_the_predicted_one():
    """One step at MeZO's best lr, 1 / sum T: decrease over MeZO's is A of the scales over A, as B is the same.

    5 standard errors, and 10 % for what many dimensions leave out (2 / 60 for the smallest block, times its share).
    """
    weights, loss, energy = quadratic()
    lr = 1 / sum(TRACE.values())
    adaptive, plain = explored(weights, loss), AdaptiveScales(level="tensor")
    adaptive = with_options(adaptive, explore=4)
    squares = adaptive.squares(sites_of(weights))
    expected = [sum(energy.values()) * lr / 2, sum(squares[k] * energy[k] for k in energy) * lr / 2]
    for method, value in zip((plain, adaptive), expected, strict=True):
        mean, error = decrease(method, weights, loss, lr)
        assert abs(mean - value) < 5 * error + 0.1 * value
    assert expected[1] > 1.5 * expected[0], "there was nothing to gain"


def check_power_zero_is_mezo():
    """Ordinary steps are MeZO's to the bit, whatever was found."""
    weights, loss, _ = quadratic()
    method = explored(weights, loss, power=0.0)
    method = with_options(method, explore=7)
    for step in range(5):
        mine, _, _ = estimate_of(method, weights, loss, step=step, seed=2)
        mezo, _, _ = estimate_of(MeZO(), weights, loss, step=step, seed=2)
        assert torch.equal(mine, mezo)


def check_exploring_points():
    """One group alone, both sides of the current weights, with the norm that all numbers have elsewhere: eps sqrt(d).

    The squared norm of d_k normal numbers over its mean has a standard deviation of sqrt(2 / d_k); 5 of them.
    """
    weights, loss, _ = quadratic()
    numbers = sum(w.numel() for w in weights.values())
    for turn, k in enumerate(sorted(weights)):
        method, asked = AdaptiveScales(level="tensor", explore=2), []
        method._turn = turn
        ctx = bare_context(weights, loss, step=1, eps=1e-2, asked=asked)
        estimate = method.estimate(ctx)
        assert ctx.queries == 3
        plus, minus, here = (realised(point, weights) for point in asked)
        for name in weights:
            assert bool(plus[name].any()) == (name == k)
            assert torch.equal(minus[name], -plus[name])
            assert not here[name].any()
        norm = float(plus[k].square().sum()) / (1e-2**2 * numbers)
        assert abs(norm - 1) < 5 * (2 / weights[k].numel()) ** 0.5, k
        assert float(estimate.loss) == ctx.losses[2]
        assert not any(estimate.direction.touches(Site(name, weights[name].shape)) for name in weights if name != k)
