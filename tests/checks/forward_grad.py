"""Claims about forward gradients and slopes that mutations must break."""

import warnings

import torch
from torch import nn
from torch.autograd import forward_ad

from tests.checks.engines import fabric, generators, make
from tests.checks.mezo import SEED, realised
from tests.reference.forward_grad import forward_grad_step
from tests.support.models import CASES, assert_same_bits, snapshot
from zotune.core.common_random import common_random_numbers
from zotune.core.direction import HERE, Noise
from zotune.core.noise import stream
from zotune.core.site import Site, canonical_name
from zotune.optim.optimizer import ZO
from zotune.optim.querying import _seed_of


def twin_model():
    """Names, tensors and data of the network in tests.reference.forward_grad, and its closure by torch."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / 2

    x, y = draw(10, 5), draw(10, 2)
    shapes = {"inner.weight": (6, 5), "inner.bias": (6,), "final_norm.weight": (6,), "head.weight": (2, 6)}
    named = [(name, nn.Parameter(draw(*shape))) for name, shape in shapes.items()]

    def closure():
        w = dict(named)
        hidden = torch.tanh(x @ w["inner.weight"].T + w["inner.bias"]) * w["final_norm.weight"]
        return (hidden @ w["head.weight"].T - y).square().mean()

    return named, closure, x, y


def gradient_of(named, closure, seed=None):
    """The gradient by back-propagation as one fp64 vector, under the random numbers of a step of `make`'s optimizer."""
    with torch.enable_grad(), common_random_numbers(0 if seed is None else seed):
        made = torch.autograd.grad(closure(), [p for _, p in named], allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).double().flatten() for (_, p), g in zip(named, made, strict=True)]
    )


def along(direction, named):
    """A direction as one fp64 vector over a case's tensors."""
    return realised(direction, [(canonical_name(name), p) for name, p in named])


def slope_and_truth(case, engine, **settings):
    """(slope, grad . z by back-propagation, |grad|, the optimizer) of a first step; warnings are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Forward mode")
        opt = make(case, engine, method="forward_grad", **settings)
        opt.step(case.closure)
    gradient = gradient_of(case.named, case.closure, _seed_of(opt.seed, 0))
    ((_, z),) = opt.last.estimate.direction.terms
    return opt.last.losses[1], float(gradient @ along(z, case.named)), float(gradient.norm()), opt


def check_equals_backprop(name, engine, dtype, rel):
    """C6: the slope is (grad . z) of back-propagation; `rel` is relative to |grad|, the slope's own standard deviation."""
    slope, truth, size, _ = slope_and_truth(CASES[name](dtype), engine)
    assert size > 0
    assert abs(slope - truth) < rel * size, f"slope {slope}, grad.z {truth}, |grad| {size}"


def check_no_trace(name, engine, dtype):
    """lr 0: bits, objects, hooks, modes, generators and kernels as before, no gradients, and no tangent left behind."""
    case = CASES[name](dtype)
    with torch.no_grad():
        case.named[0][1].view(-1)[:2] = -0.0
    before, made_of, state, kernels = snapshot(case), fabric(case), generators(), kernel_flags()
    opt = make(case, engine, method="forward_grad")
    for _ in range(3):
        opt.step(case.closure)
    assert_same_bits(before, snapshot(case))
    assert fabric(case) == made_of
    assert generators() == state, "a global generator is not where it was"
    assert kernel_flags() == kernels
    assert tangents_left(case) == []


def kernel_flags():
    cuda = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def tangents_left(case):
    """Names of tensors that carry a tangent in a new dual level; fails if an old one is still open."""
    with forward_ad.dual_level():
        return [name for name, p in case.named if forward_ad.unpack_dual(p).tangent is not None]


def check_same_masks_as_a_query(engine):
    """Common random numbers: the loss of a slope is that of a query at the current weights, to the bit, dropout on."""
    case = CASES["dropout_mlp"](torch.float32)
    opt = make(case, engine)
    with torch.no_grad():
        (here,) = opt.engine.losses([HERE], case.closure, 17).tolist()
        (other,) = opt.engine.losses([HERE], case.closure, 18).tolist()
        loss, _ = opt.engine.slope(Noise(stream(1, "t")), case.closure, 17)
    assert here != other, "dropout was off: nothing was compared"
    assert loss == here, f"slope's loss {loss}, query's {here}"


def check_equals_the_readable_twin(n=1, weight_decay=0.1, steps=20, noise="normal"):
    """20 steps in fp64 against dual numbers by hand. They round in another order: 20 steps of a few 2**-53."""
    named, closure, x, y = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    opt = ZO(named, "forward_grad", lr=0.02, seed=SEED, weight_decay=weight_decay, noise=noise, method_options={"n": n})
    for step in range(steps):

        def draw(i, name, step=step):
            shape = tuple(twin[name].shape)
            return Noise(stream(SEED, "step", step, i), noise).realise(Site(name, shape), torch.float64)

        expected, rhos = forward_grad_step(twin, x, y, draw, lr=0.02, n=n, weight_decay=weight_decay)
        logged = opt.step(closure)
        assert abs(float(logged) - expected) < 1e-13
        assert abs(opt.last.estimate.info["rho"] - rhos[-1]) < 1e-12
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-13, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_limit_of_spsa():
    """C6: along the same z, (L(+) - L(-)) / (2 eps) approaches the slope as eps^2: a tenth of eps, a hundredth of the error.

    Leading terms dominate at these eps; the next one changes the ratio by a few per cent.
    """
    named, closure, _, _ = twin_model()
    slope = _rho(named, closure, "forward_grad", 1e-3)
    wide, near = (abs(_rho(named, closure, "mezo", eps) - slope) for eps in (1e-2, 1e-3))
    assert 80 < wide / near < 120, f"errors {wide} and {near} at eps 1e-2 and 1e-3"


def _rho(named, closure, method, eps):
    opt = ZO(named, method, lr=0.0, eps=eps, seed=SEED)
    opt.step(closure)
    return opt.last.estimate.info["rho"]


def check_estimate_is_slope_times_direction(n=3):
    """g = (1/n) sum (grad . z_i) z_i as vectors, with the gradient of back-propagation; fp64, d = 60: a few 2**-53."""
    named, closure, _, _ = twin_model()
    gradient = gradient_of(named, closure)
    opt = ZO(named, "forward_grad", lr=0.0, seed=SEED, method_options={"n": n})
    opt.step(closure)
    z = [realised(Noise(stream(SEED, "step", 0, i)), named) for i in range(n)]
    expected = sum(float(gradient @ one) * one for one in z) / n
    made = realised(opt.last.estimate.direction, named)
    assert torch.allclose(made, expected, rtol=1e-10, atol=1e-12), float((made - expected).abs().max())
