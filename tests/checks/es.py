"""Claims about evolution strategies that mutations must break."""

from itertools import product
from math import cos, exp, prod, sin

import torch

from tests.checks.kerzoo import hermite, scalars, scripted
from tests.checks.mezo import SEED, twin_model
from tests.reference.es import es_step
from tests.support.bare import flat, realised
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.es import ES
from zotune.optim.optimizer import ZO


def integrated(method, loss, at, *, eps, nodes=5, of=lambda g, estimate: g):
    """E[of(g, estimate)], exactly, by quadrature over all n directions: the estimator itself runs."""
    here, total = scalars(at), 0.0
    for drawn in product(hermite(nodes), repeat=method.n * len(at)):
        numbers = [node for node, _ in drawn]
        z = [scalars(numbers[i * len(at) : (i + 1) * len(at)]) for i in range(method.n)]
        ctx = scripted(here, lambda w: loss(*[float(x) for x in w.values()]), z, eps=eps)
        estimate = method.estimate(ctx)
        total = total + prod(w for _, w in drawn) * of(flat(realised(estimate.direction, here)), estimate)
    return total


def coefficients(estimate, n):
    """c_i, from the terms (c_i / n, z_i) of an estimate."""
    return torch.stack([torch.as_tensor(c) for c, _ in estimate.direction.terms]) * n


def estimate_of_losses(losses, z, eps=0.1, **options):
    """The estimate for losses and directions (n, d) that are given."""
    answers = iter(losses)
    here = scalars([0.0] * len(z[0]))
    ctx = scripted(here, lambda _: next(answers), [scalars(z_i) for z_i in z], eps=eps)
    estimate = ES(n=len(losses), **options).estimate(ctx)
    return flat(realised(estimate.direction, here)), estimate


def check_mean_is_the_gradient_of_the_smoothed_loss(eps=0.8):
    """On sin, whose smoothed slope is cos(x) exp(-eps^2/2). Gauss-Hermite with 16 nodes is exact to 1e-13 here."""
    mean = float(integrated(ES(n=2), sin, [0.4], eps=eps, nodes=16))
    assert abs(mean - cos(0.4) * exp(-(eps**2) / 2)) < 1e-12, f"mean {mean}"


def check_covariance(seed=0, n=5, d=7):
    """g is the sample covariance (with n - 1) of losses and directions over eps. Rounding of numbers of order 10."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, dtype=torch.float64, generator=generator)
    losses = 3.0 + torch.randn(n, dtype=torch.float64, generator=generator)
    made, _ = estimate_of_losses(losses.tolist(), z.tolist())
    covariance = torch.cov(torch.cat([losses[:, None], z], dim=1).T)[0, 1:]
    assert torch.allclose(made, covariance / 0.1, rtol=0, atol=1e-12)


def check_coefficients_sum_to_zero():
    """Rounding of losses of about 4 over eps 0.1."""
    _, estimate = estimate_of_losses([3.0, 4.5, 2.0, 3.25], [[1.0], [2.0], [-1.0], [0.5]])
    assert abs(float(coefficients(estimate, 4).sum())) < 1e-12


def check_equals_the_readable_twin(n=5, steps=20, lr=0.01, **options):
    """20 steps in fp64 against plain loops. They round in another order: steps times 2**-53, amplified by 1 / eps."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    opt = ZO(named, "es", lr=lr, eps=1e-2, seed=SEED, method_options={"n": n, **options})
    for step in range(steps):

        def draw(i, name, step=step):
            noise = Noise(stream(SEED, "step", step, i))
            return noise.realise(Site(name, tuple(twin[name].shape)), torch.float64)

        expected, _ = es_step(twin, loss, draw, lr=lr, eps=1e-2, n=n, **options)
        assert abs(float(opt.step(lambda: loss(dict(named)))) - expected) < 1e-11
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"
