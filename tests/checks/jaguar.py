"""Claims about JAGUAR that mutations must break."""

import math

import torch

from tests.checks.mezo import SEED, twin_model
from tests.reference.jaguar import jaguar_step
from tests.support.bare import bare_context, displaced, flat, realised
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.jaguar import Jaguar, subset
from zotune.optim.optimizer import ZO


def check_equals_the_readable_twin(ratio=0.5, n=1, unbiased=False, rule="sgd", steps=20):
    """20 steps in fp64 against plain loops, two matrices and two vectors; the step's tensors are read from the estimate.

    They round in another order: 20 steps of a few 2**-53, amplified by 1/eps. Signs agree: no average is that near to 0.
    """
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    accumulator = {name: torch.zeros_like(value) for name, value in twin.items()} if rule == "jaguar" else None
    opt = ZO(named, method=Jaguar(ratio, n, unbiased), rule=rule, lr=0.01, eps=1e-2, seed=SEED)
    for step in range(steps):

        def draw(i, name, step=step):
            shape = tuple(twin[name].shape)
            return Noise(stream(SEED, "step", step, i)).realise(Site(name, shape), torch.float64)

        logged = opt.step(lambda: loss(dict(named)))
        chosen = [slot.site.name for slot in opt.weights if opt.last.estimate.direction.touches(slot.site)]
        assert len(chosen) == math.ceil(4 * ratio)
        share = len(chosen) / 4 if unbiased else 1.0
        expected, rho = jaguar_step(
            twin, chosen, loss, draw, lr=0.01, eps=1e-2, n=n, share=share, accumulator=accumulator
        )
        assert abs(float(logged) - expected) < 1e-11
        assert abs(opt.last.estimate.info["rho"] - rho) < 1e-9
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
    moved = max(float((twin[name] - start[name]).abs().max()) for name in twin)
    assert moved > 1e-3, "nothing moved, so nothing was compared"


def check_only_the_steps_tensors_are_probed_and_moved():
    """Both sides and the estimate are eps z, -eps z and rho z on the step's tensors, and nothing elsewhere, bitwise."""
    weights = {name: p.detach() for name, p in twin_model()[0]}
    _, loss = twin_model()
    for step in range(5):
        asked, eps = [], 2.0**-7
        ctx = bare_context(weights, loss, step=step, seed=SEED, eps=eps, asked=asked)
        chosen = subset(ctx, 0.5)
        estimate = Jaguar(ratio=0.5).estimate(ctx)
        plus, minus, moved = (realised(d, weights) for d in (*asked, estimate.direction))
        rho = (ctx.losses[0] - ctx.losses[1]) / (2 * eps)
        for site in ctx.sites:
            z = plus[site.name] / eps
            assert bool((z != 0).all()) == (site.name in chosen), site.name
            assert bool((z == 0).all()) == (site.name not in chosen), site.name
            assert torch.equal(minus[site.name], -eps * z)
            assert torch.equal(moved[site.name], rho * z)
            assert all(point.touches(site) == (site.name in chosen) for point in (*asked, estimate.direction))


def context_of(names, step=0, seed=SEED):
    return bare_context({name: torch.zeros(2) for name in names}, lambda w: 0.0, step=step, seed=seed)


def check_sets_are_equally_likely(count=1000):
    """2 of 5 tensors: each in 2/5 of the steps and each pair in 1/10, within five standard errors."""
    names, seen, pairs = [f"layer{i}" for i in range(5)], dict.fromkeys(range(5), 0), {}
    for step in range(count):
        chosen = subset(context_of(names, step), 0.4)
        assert len(set(chosen)) == 2
        for name in chosen:
            seen[int(name[-1])] += 1
        pairs[frozenset(chosen)] = pairs.get(frozenset(chosen), 0) + 1
    for found in seen.values():
        assert abs(found / count - 0.4) < 5 * math.sqrt(0.24 / count)
    assert len(pairs) == 10
    for found in pairs.values():
        assert abs(found / count - 0.1) < 5 * math.sqrt(0.09 / count)


def check_sets_depend_on_names_alone():
    """The order of tensors does not matter; one tensor less leaves the order of the others as it was."""
    names = [f"layer{i}" for i in range(12)]
    for step in range(20):
        ranking = subset(context_of(names, step), 1.0)
        assert subset(context_of(names[::-1], step), 1.0) == ranking
        assert subset(context_of(names[::-1], step), 0.25) == ranking[:3]
        fewer = [name for name in names if name != "layer7"]
        assert subset(context_of(fewer, step), 1.0) == tuple(name for name in ranking if name != "layer7")


def check_mean_of_estimates(unbiased=False, count=600):
    """E g = (|S| / tensors) grad L, or grad L if divided: the slope on the gradient, within five standard errors."""
    generator = torch.Generator().manual_seed(5)
    g = {f"layer{i}": torch.randn(3, dtype=torch.float64, generator=generator) for i in range(4)}
    weights = {name: torch.zeros(3, dtype=torch.float64) for name in g}
    gradient, slopes = flat(g), []
    for step in range(count):
        ctx = bare_context(weights, lambda w: sum(g[n] @ w[n] for n in w), step=step, seed=SEED, eps=1.0)
        made = flat(realised(Jaguar(ratio=0.25, unbiased=unbiased).estimate(ctx).direction, weights))
        slopes.append(float(made @ gradient / (gradient @ gradient)))
    slopes = torch.tensor(slopes)
    expected = 1.0 if unbiased else 0.25
    assert abs(float(slopes.mean()) - expected) < 5 * float(slopes.std()) / math.sqrt(count)


def check_logged_loss_is_the_mean_of_the_pair():
    weights = {name: p.detach() for name, p in twin_model()[0]}
    _, loss = twin_model()
    asked = []
    ctx = bare_context(weights, loss, seed=SEED, eps=0.5, asked=asked)
    estimate = Jaguar(ratio=0.5).estimate(ctx)
    plus, minus = (loss(displaced(weights, point)) for point in asked)
    assert abs(plus - minus) > 0.01
    assert float(estimate.loss) == (plus + minus) / 2
