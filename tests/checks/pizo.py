"""Claims about PIZO that mutations must break."""

import math
import warnings

import torch

from tests.checks.mezo import SEED, quadratic, twin_model
from tests.reference.pizo import pizo_step
from tests.support.bare import bare_context, flat, realised
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.mezo import MeZO
from zotune.methods.pizo import Pizo
from zotune.optim.optimizer import ZO

# E y, E y^2 of y = v.g, |g| = 1, for a linear loss: moments of the order statistics of M standard normals.
MOMENTS = {
    ("greedy", 4): (-1.0294, 1.5513),
    ("greedy", 5): (-1.1630, 1.8000),
    ("greedy", 16): (-1.7660, 3.4137),
    ("guiding", 2): (-1.1284, 2.0),
    ("guiding", 3): (-1.2694, 2.1202),
    ("guiding", 4): (-1.3265, 2.1035),
    ("guiding", 8): (-1.4504, 2.2802),
    ("guiding", 16): (-1.5204, 2.4035),
}


def made(**options):
    """A method; a pool of two warns, which is not the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Pizo(**options)


def check_equals_the_readable_twin(variant="guiding", pool=4, alpha=0.5, reuse=True, steps=20, noise="normal"):
    """20 steps in fp64 against plain loops, two matrices and two vectors.

    They round in another order: 20 steps of a few 2**-53, amplified by 1/eps. Ranks are the same as long as no two
    losses are closer than that.
    """
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    options = {"variant": variant, "pool": pool, "alpha": alpha, "reuse": reuse}
    opt = ZO(named, method=made(**options), lr=0.01, eps=1e-2, seed=SEED, noise=noise)
    for step in range(steps):

        def draw(i, name, step=step):
            shape = tuple(twin[name].shape)
            return Noise(stream(SEED, "step", step, i), noise).realise(Site(name, shape), torch.float64)

        expected, rho, _ = pizo_step(twin, loss, draw, lr=0.01, eps=1e-2, variant=variant, pool=pool, alpha=alpha)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-11
        assert abs(opt.last.estimate.info["rho"] - rho) < 1e-9
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_pool_of_two_is_mezo_with_another_eps_and_lr():
    """GV with M = 2: rho v = 2 rho_u u for MeZO with sqrt(2) eps along u = (z_1 - z_2)/sqrt(2), for any loss.

    Rounding of losses of size 1 over eps 0.1: a relative 1e-14; the step allows 1e-12.
    """
    _, loss = twin_model()
    weights = {name: p.detach() for name, p in twin_model()[0]}
    eps = 0.1
    for step in range(5):
        ctx = bare_context(weights, loss, step=step, seed=SEED, eps=eps)
        g = flat(realised(made(pool=2).estimate(ctx).direction, weights))
        z = [Noise(stream(SEED, "step", step, i)) for i in range(2)]
        u = (z[0] - z[1]) / math.sqrt(2)
        wide = bare_context(weights, loss, eps=math.sqrt(2) * eps)
        wide.gaussian = lambda u=u: u
        expected = 2 * flat(realised(MeZO().estimate(wide).direction, weights))
        assert float((g - expected).abs().max() / expected.abs().max()) < 1e-12


def check_the_pool_is_what_v_is_made_of(variant="guiding"):
    """Bitwise, on every tensor: v's noise is the noise that was ranked. M, eps: powers of two, so sums scale exactly."""
    weights = {name: p.detach() for name, p in twin_model()[0]}
    _, loss = twin_model()
    asked, eps = [], 2.0**-7
    ctx = bare_context(weights, loss, seed=SEED, eps=eps, asked=asked)
    estimate = made(variant=variant, reuse=False).estimate(ctx)
    z = [{name: value / eps for name, value in realised(point, weights).items()} for point in asked[:4]]
    order = sorted(range(4), key=lambda i: ctx.losses[i])
    weight = dict.fromkeys(order, 0.0) | {order[0]: 1.0}
    if variant == "guiding":
        weight = dict.fromkeys(order[:2], 0.5) | dict.fromkeys(order[2:], -0.5)
    rho = (ctx.losses[4] - ctx.losses[5]) / (2 * eps)
    moved = realised(estimate.direction, weights)
    for name in weights:
        v = sum(weight[i] * z[i][name] for i in range(4) if weight[i])
        assert torch.equal(realised(asked[4], weights)[name], eps * v), name
        assert torch.equal(realised(asked[5], weights)[name], -eps * v), name
        assert torch.allclose(moved[name], rho * v, rtol=1e-15, atol=1e-14), name  # rho times a weight is rounded


def linear(*shapes):
    """Tensors of ones, and a unit gradient in them."""
    generator = torch.Generator().manual_seed(8)
    g = {f"block{i}.weight": torch.randn(*s, dtype=torch.float64, generator=generator) for i, s in enumerate(shapes)}
    norm = float(flat(g).norm())
    g = {name: value / norm for name, value in g.items()}
    return {name: torch.zeros_like(value) for name, value in g.items()}, g


def projections(count, g, weights, **options):
    """y = v.g, |v|^2 and v.g of each tensor, of `count` steps on the linear loss g.theta; (count, 2 + tensors)."""
    method, rows = made(**options), []
    for step in range(count):
        asked = []
        ctx = bare_context(
            weights,
            lambda w: sum(float((g[n] * w[n]).sum()) for n in w),
            step=step,
            seed=SEED,
            eps=1.0,
            asked=asked,
        )
        method.estimate(ctx)
        v = realised(-1.0 * asked[-1], weights)  # the last query is the minus side, at -eps v
        parts = [float((g[name] * v[name]).sum()) for name in v]
        rows.append([sum(parts), float(flat(v).square().sum()), *parts])
    return torch.tensor(rows, dtype=torch.float64)


def check_moments(variant="guiding", pool=4, count=1500, d=70):
    """E y, E y^2 and E |v|^2 within five standard errors of the sample; the losses are linear, so they are exact."""
    weights, g = linear((d,))
    rows = projections(count, g, weights, variant=variant, pool=pool)
    y, squares = rows[:, 0], rows[:, 1]
    mean, second = MOMENTS[variant, pool]
    s = pool // 2
    length = 1.0 if variant == "greedy" else 1 / s + 1 / (pool - s)
    for name, sample, expected in [
        ("E y", y, mean),
        ("E y^2", y.square(), second),
        ("E|v|^2", squares, (d - 1) * length + second),  # all directions but one are blind to the ranking
    ]:
        error = 5 * float(sample.std()) / math.sqrt(count) + 1e-4  # and the digits of the table
        assert abs(float(sample.mean()) - expected) < error, f"{name}: {float(sample.mean())}, expected {expected}"


def check_every_tensor_is_ranked(count=800):
    """The mean of v.g, tensor by tensor, over the tensor's share of |g|^2, is -1.3265 everywhere, within five sigma."""
    weights, g = linear((6,), (6,))
    rows = projections(count, g, weights)
    for i, name in enumerate(g):
        share = float(g[name].square().sum())
        y = rows[:, 2 + i] / share
        error = 5 * float(y.std()) / math.sqrt(count)
        assert error < 0.5  # else -1.3 could not be told from 0
        assert abs(float(y.mean()) - MOMENTS["guiding", 4][0]) < error, f"{name}: {float(y.mean())}"


def check_logged_loss_is_the_mean_of_the_pair(variant="guiding"):
    """Not the smallest loss, nor the plus side, which lies 1.33 eps |grad| low on the mean."""
    named, closure, _ = quadratic()
    opt = ZO(named, method=made(variant=variant, reuse=False), lr=0.0, eps=0.5, seed=SEED, engine="in_place")
    logged = opt.step(closure)
    plus, minus = opt.last.losses[-2:]
    assert abs(plus - minus) > 0.1  # else the mean and either side could not be told apart
    assert float(logged) == (plus + minus) / 2


def check_nan_never_wins():
    """A direction without a loss is worst: it is in the others of the contrast, and not the greedy winner."""
    weights, _ = linear((2, 2), (2,))
    for variant in ("guiding", "greedy"):
        for bad in (math.nan, math.inf, -math.inf):
            answers, asked = iter([1.0, bad, 0.5, 2.0, 3.0, 4.0]), []
            ctx = bare_context(weights, lambda w, answers=answers: next(answers), eps=1.0, asked=asked)
            made(variant=variant, reuse=False).estimate(ctx)
            z = [flat(realised(point, weights)) for point in asked[:4]]
            expected = z[2] if variant == "greedy" else (z[0] - z[1] + z[2] - z[3]) / 2
            assert torch.allclose(flat(realised(asked[4], weights)), expected, rtol=0, atol=1e-12)
