"""Claims about FZOO that mutations must break."""

from itertools import product

import torch

from tests.checks.kerzoo import scalars, scripted
from tests.checks.mezo import SEED, quadratic, twin_model
from tests.checks.mezo import realised as over
from tests.reference.fzoo import fzoo_step
from tests.support.bare import flat, realised
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.optim.optimizer import ZO


def enumerated(method, loss, at, *, eps, of=lambda g, estimate: g):
    """E[of(g, estimate)] over all choices of signs for n directions, exactly: the estimator itself runs."""
    here, d, total = scalars(at), len(at), 0.0
    for drawn in product((-1.0, 1.0), repeat=method.n * d):
        u = [scalars(drawn[i * d : (i + 1) * d]) for i in range(method.n)]
        ctx = scripted(here, lambda w: loss(*[float(x) for x in w.values()]), u, eps=eps)
        estimate = method.estimate(ctx)
        total = total + of(flat(realised(estimate.direction, here)), estimate) / 2 ** (method.n * d)
    return total


def estimate_on(closure, named, eps=0.25, **options):
    """The first step's estimate as a vector, and its outcome; the weights stay."""
    opt = ZO(named, "fzoo", lr=0.0, eps=eps, seed=SEED, method_options=options)
    opt.step(closure)
    return over(opt.last.estimate.direction, named), opt.last


def check_scale_of_the_loss_does_not_matter(factor=8.0, variant="theory"):
    """Multiplied by a power of two, the loss gives the same bits."""
    named, closure, _ = quadratic()
    one, _ = estimate_on(closure, named, variant=variant)
    other, _ = estimate_on(lambda: factor * closure(), named, variant=variant)
    assert float(one.abs().max()) > 0
    assert torch.equal(one, other)


def check_directions_are_signs():
    """With one direction, all elements of the plain estimate have one magnitude."""
    named, closure, _ = quadratic()
    made, _ = estimate_on(closure, named, n=1, normalise=False)
    assert len(made.abs().unique()) == 1
    assert float(made[0]) != 0
    assert len(made.sign().unique()) == 2


def check_equal_losses_give_no_step():
    """A loss without slope, at a value that has no exact mean; the step is taken, and nothing moves."""
    named, _, _ = quadratic()
    made, outcome = estimate_on(lambda: 0.1 + 0.0 * float(named[0][1].sum()), named, n=3)
    assert outcome.accepted
    assert outcome.estimate.info == {"sigma": 0.0}
    assert float(made.abs().max()) == 0.0


def check_equals_the_readable_twin(n=8, steps=20, normalise=True, variant="theory"):
    """20 steps in fp64 against plain loops. They round in another order: steps times 2**-53, amplified by 1 / eps."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    # a normalised step moves a weight by about lr / (eps sqrt(n)), a released one by lr / sqrt(n)
    lr = 0.02 if not normalise else 1e-4 if variant == "theory" else 1e-2
    options = {"n": n, "normalise": normalise, "variant": variant}
    opt = ZO(named, "fzoo", lr=lr, eps=1e-2, seed=SEED, method_options=options)
    for step in range(steps):

        def draw(i, name, step=step):
            noise = Noise(stream(SEED, "step", step, i), "rademacher")
            return noise.realise(Site(name, tuple(twin[name].shape)), torch.float64)

        expected, sigma = fzoo_step(
            twin, loss, draw, lr=lr, eps=1e-2, n=n, normalise=normalise, released=variant == "released"
        )
        assert abs(float(opt.step(lambda: loss(dict(named)))) - expected) < 1e-11
        if variant == "theory" and normalise:
            assert abs(opt.last.estimate.info["sigma"] - sigma) < 1e-11
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"
