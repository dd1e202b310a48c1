"""Claims about LDSD that mutations must break."""

import math

import torch

from tests.checks.mezo import SEED, quadratic, twin_model
from tests.reference.ldsd import ldsd_step
from tests.support.bare import bare_context, estimate_of, flat, realised
from zotune.core.direction import Direction, Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.ldsd import LDSD
from zotune.methods.policy_mean import PolicyMean
from zotune.optim.optimizer import ZO


def mean_of(method, weights):
    """The policy mean, with all that has been learned, as a dict of fp64 tensors."""
    kept = method.state_dict()["mean"]["tensors"]
    assert set(kept) == set(weights)
    return {name: method._mu.realise(site, torch.float64) for name, site in method._mu._sites.items()}


def check_equals_the_readable_twin(steps=20, lr_mu=0.5, noise="normal", ratio=1.0, **options):
    """20 steps in fp64 against plain loops, two matrices and two vectors; lr_mu large enough that the mean matters.

    They round in another order: 20 steps of a few 2**-53, amplified by 1/eps. The factor of `normalise` is rounded to
    fp32: 1e-7 of a step.
    """
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    mu = {name: torch.zeros_like(value) for name, value in twin.items()}
    start = {name: value.clone() for name, value in twin.items()}
    method = LDSD(lr_mu=lr_mu, ratio=ratio, **options)
    opt = ZO(named, method=method, lr=0.01, eps=1e-2, seed=SEED, noise=noise)
    options.pop("reuse", None)
    tolerance = 1e-6 if options.get("normalise") else 1e-10
    options["released"] = options.pop("variant", "corrected") == "released"
    for step in range(steps):

        def draw(i, name, step=step):
            shape = tuple(twin[name].shape)
            return Noise(stream(SEED, "step", step, i), noise).realise(Site(name, shape), torch.float64)

        logged = opt.step(lambda: loss(dict(named)))
        first = opt.last.estimate.direction
        only = [slot.site.name for slot in opt.weights if first.touches(slot.site)]
        assert len(only) == math.ceil(ratio * 4)
        expected, rho = ldsd_step(twin, mu, loss, draw, lr=0.01, eps=1e-2, lr_mu=lr_mu, only=only, **options)
        assert abs(float(logged) - expected) < tolerance / 10
        assert abs(opt.last.estimate.info["rho"] - rho) < tolerance * 10
    learned = mean_of(method, twin)
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < tolerance, name
        assert float((learned[name] - mu[name]).abs().max()) < tolerance, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"
        assert float(mu[name].abs().max()) > 1e-4, "the mean did not matter"


def check_weights_move_along_the_mean_that_was_probed():
    """In every step the weights go along the direction of the pair, although the mean has learned something new by then."""
    named, closure, _ = quadratic()
    probes = []
    method = LDSD(k=3, lr_mu=1.0)
    opt = ZO(named, method=method, lr=0.1, eps=0.5, seed=SEED, engine="in_place")

    def value():
        probes.append(torch.cat([p.detach().clone() for _, p in named]))
        return closure()

    last = None
    for _ in range(4):
        here = torch.cat([p.detach().clone() for _, p in named])
        opt.step(value)
        v = (here - probes[-1]) / 0.5  # the last query is the minus side
        moved = torch.cat([p.detach() for _, p in named]) - here
        expected = -0.1 * opt.last.estimate.info["rho"] * v
        assert torch.allclose(moved, expected, rtol=1e-9, atol=1e-12)
        learned = flat(mean_of(method, dict(named)))
        assert last is None or not torch.equal(learned, last)
        last = learned


def check_noise_is_the_same_everywhere():
    """For each k the noise that was probed is that of the estimate and of the mean: bitwise, on every tensor.

    The mean starts at 0 and eps, lr_mu / (K sigma) are powers of two; the sums are formed in the same order.
    """
    weights = {name: p.detach() for name, p in twin_model()[0]}
    _, loss = twin_model()
    asked, eps, method = [], 2.0**-7, LDSD(k=4, lr_mu=1.0, reuse=False)
    ctx = bare_context(weights, loss, seed=SEED, eps=eps, asked=asked)
    estimate = method.estimate(ctx)
    method.observe(ctx, estimate)
    u = [{name: value / eps for name, value in realised(point, weights).items()} for point in asked]
    f = ctx.losses[:4]
    best = f.index(min(f))
    c = [(f[k] - math.fsum(f) / 4) * (4 / 3) for k in range(4)]
    moved, learned = realised(estimate.direction, weights), mean_of(method, weights)
    rho = (ctx.losses[4] - ctx.losses[5]) / (2 * eps)
    for name in weights:
        assert torch.equal(u[4][name], u[best][name]), name
        assert torch.equal(u[5][name], -u[best][name]), name
        assert torch.equal(moved[name], rho * u[best][name]), name
        expected = sum(-0.25 * c[k] * u[k][name] for k in range(4))
        assert torch.allclose(learned[name], expected, rtol=1e-14, atol=1e-16), (
            name
        )  # 0 + is exact; order of four terms


def check_logged_loss_is_the_mean_of_the_pair():
    """Not the smallest of the candidates, which lies 1.16 standard deviations of the losses low."""
    named, closure, _ = quadratic()
    for reuse in (True, False):
        opt = ZO(named, method=LDSD(reuse=reuse), lr=0.0, eps=0.5, seed=SEED, engine="in_place")
        logged = opt.step(closure)
        plus, minus = min(opt.last.losses[:5]), opt.last.losses[-1]
        assert abs(plus - minus) > 0.1
        assert float(logged) == (plus + minus) / 2


def frozen_gradient(steps, d=1000, pieces=1, form="fp32", seed=0, cosine_only=True, **options):
    """cos(mu, -g) after some steps at a frozen gradient; with the mean tensors themselves on request.

    The weights are fp32 zeros, the loss is g.w in fp64; d numbers in one tensor, or in `pieces` of one shape.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    g = torch.randn(pieces, d // pieces, dtype=torch.float64, generator=generator)
    weights = {f"layer{i}.weight": torch.zeros(d // pieces) for i in range(pieces)}
    rows = dict(zip(weights, g, strict=True))
    method = LDSD(**{"k": 5, "lr_mu": 1.0, "mean": form, **options})
    for step in range(steps):
        ctx = bare_context(weights, lambda w: sum(float(rows[n] @ w[n]) for n in w), step=step, seed=seed, eps=1.0)
        method.observe(ctx, method.estimate(ctx))
    mu = mean_of(method, weights)
    whole = flat(mu)
    cosine = -float(whole @ g.flatten() / (whole.norm() * g.norm()))
    return cosine if cosine_only else (cosine, mu)


def law(steps, d=1000, k=5):
    """cos(mu, -g) after T steps at a frozen gradient, from mu = 0."""
    return 1 / math.sqrt(1 + d / (steps * (k - 1)))


def check_cosine_law(steps=100, d=400, pieces=1, form="fp32", **options):
    """The standard deviation of cos over seeds is about 0.3/sqrt(d) at cos 0.7 (0.01 at d = 1000): 0.06 is four of them."""
    cosine = frozen_gradient(steps, d, pieces, form, **options)
    assert abs(cosine - law(steps, d)) < 0.06, f"cos {cosine}, law {law(steps, d)}"


def check_tensors_learn_apart(steps=60, d=800, pieces=4):
    """Means of tensors of one shape are as uncorrelated as their gradients: 5 standard errors of 200 numbers, about 0.35."""
    _, mu = frozen_gradient(steps, d, pieces, cosine_only=False)
    rows = torch.stack(list(mu.values()))
    correlation = torch.corrcoef(rows)[~torch.eye(pieces, dtype=torch.bool)]
    assert float(correlation.abs().max()) < 5 / math.sqrt(d / pieces), correlation


def check_policy_gradient_is_unbiased(count=500, tolerance=0.17, k=5, planted=True, d=12):
    """8.1: E of mu's step is -lr_mu eps grad L(theta + eps mu), exactly on quadratics: slope 1, not (K-1)/K, not 0.

    Along the gradient of a linear loss one step is the sample variance of K normals, whose variance is 2/(K-1); the slight
    curvature here adds a tenth to it. The tolerance is five standard errors.
    """
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(d, d, dtype=torch.float64, generator=generator)
    a, b = 0.1 * root @ root.T / d, 3 * torch.randn(d, dtype=torch.float64, generator=generator)
    theta, mu = torch.randn(2, d, dtype=torch.float64, generator=generator)
    mu = 0.5 * mu * planted
    eps, total = 0.3, torch.zeros(d, dtype=torch.float64)
    expected = eps * (a @ (theta + eps * mu) + b)
    for step in range(count):
        method = LDSD(k=k, lr_mu=1.0)
        method.load_state_dict({"mean": {"form": "fp32", "tensors": {"w": {"values": mu}}}})
        estimate_of(method, {"w": theta}, lambda w: w["w"] @ a @ w["w"] / 2 + b @ w["w"], step=step, seed=SEED, eps=eps)
        total += mu - flat(mean_of(method, {"w": theta}))
    slope = float(total @ expected / (expected @ expected)) / count
    assert abs(slope - 1) < tolerance, f"slope {slope}"
    return total / count, expected


def check_nan_never_wins():
    """A candidate without a loss does not win, and the others' lesson is that of a step without it."""
    weights = {name: p.detach() for name, p in twin_model()[0]}
    asked = []
    answers = iter([1.0, math.nan, 0.5, 2.0, 4.0])  # four candidates and the minus side
    method = LDSD(k=4, lr_mu=0.3)
    ctx = bare_context(weights, lambda w: next(answers), eps=1.0, asked=asked)
    estimate = method.estimate(ctx)
    method.observe(ctx, estimate)
    u = [flat(realised(point, weights)) for point in asked[:4]]
    assert torch.allclose(flat(realised(asked[4], weights)), -u[2])
    assert estimate.is_finite()
    c = [1.0 - 1.25, 0.5 - 1.5, 2.0 - 0.75]  # against the mean of the other two
    expected = -0.3 / 3 * (c[0] * u[0] + c[1] * u[2] + c[2] * u[3])
    assert torch.allclose(flat(mean_of(method, weights)), expected, rtol=1e-12, atol=1e-15)


def check_other_tensors_are_left_alone():
    """9.11: what is not in the step's set changes neither its weights nor its mean, to the bit."""
    named, loss = twin_model()
    method = LDSD(ratio=0.5, lr_mu=0.5, decay=0.1)
    opt = ZO(named, method=method, lr=0.01, eps=1e-2, seed=SEED)
    seen = set()
    for step in range(6):
        before = {name: p.detach().clone() for name, p in named}
        old = mean_of(method, before) if step else dict.fromkeys(before)
        opt.step(lambda: loss(dict(named)))
        chosen = {slot.site.name for slot in opt.weights if opt.last.estimate.direction.touches(slot.site)}
        assert len(chosen) == 2
        seen |= chosen
        new = mean_of(method, before)
        for name, p in named:
            same = torch.equal(before[name], p.detach())
            assert same == (name not in chosen), name
            if step:
                assert torch.equal(old[name], new[name]) == (name not in chosen), name
    assert len(seen) > 2, "always the same tensors"


def slope_of_learning(count=400, **options):
    """The mean of mu's steps on the frozen gradient, over eps |g|: 1 if mu learns, 0 if it wanders."""
    g = torch.linspace(-1, 1, 20, dtype=torch.float64)
    g /= g.norm()
    weights, total = {"w": torch.zeros(20, dtype=torch.float64)}, 0.0
    for step in range(count):
        method = LDSD(lr_mu=1.0, **options)
        estimate_of(method, weights, lambda w: float(g @ w["w"]), step=step, seed=SEED, eps=1.0)
        total -= float(flat(mean_of(method, weights)) @ g)
    return total / count


class Ones(Direction):
    """One everywhere."""

    def add_to(self, out, site, scale=1.0):
        out.add_(scale)


def placed_mean(form, shape=(70, 5)):
    mean, site = PolicyMean(form), Site("a.weight", shape)
    mean.place(bare_context({"a.weight": torch.zeros(shape)}, lambda w: 0.0))
    return mean, site


def check_small_moves_are_not_lost(form):
    """1000 moves of 1e-4 onto numbers of size 1: rounded to nearest none would arrive. Rounding is unbiased.

    One rounding has a variance of at most move * unit, with units of 2^-6 (bf16, below 4) and 4/127 (int8, largest below 4):
    five standard errors of 350 numbers and 1000 roundings.
    """
    mean, site = placed_mean(form)
    mean.move(Noise(stream(1)) * 1.0, 1.0, stream(2))
    start = mean.realise(site)
    for step in range(1000):
        mean.move(1e-4 * Ones(), 1.0, stream(3, step))
    arrived = float((mean.realise(site) - start).mean())
    error = 5 * math.sqrt(1000 * 1e-4 * {"bf16": 2.0**-6, "int8": 4 / 127}[form] / 350)
    assert error < 0.02
    assert abs(arrived - 0.1) < error, arrived
