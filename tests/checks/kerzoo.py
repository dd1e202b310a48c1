"""Claims about KerZOO that mutations must break."""

from fractions import Fraction
from itertools import product
from math import factorial, prod, sqrt

import numpy as np
import torch

from tests.checks.mezo import SEED, quadratic, realised, twin_model, z_of_step
from tests.reference.kerzoo import KERNELS, kerzoo_step, released_step
from tests.support.bare import bare_context, flat
from tests.support.bare import realised as parts_of
from zotune.core.direction import Noise, Stored
from zotune.core.noise import stream, uniform
from zotune.core.site import Site
from zotune.methods import kerzoo
from zotune.methods.kerzoo import KerZOO
from zotune.optim.optimizer import ZO


def scripted(weights, loss, directions, radii=(), **settings):
    """A context whose directions (dicts of tensors) and radii (in [-1, 1]) are given in advance."""
    ctx = bare_context(weights, loss, **settings)
    directions, radii = iter(directions), iter(radii)
    ctx.gaussian = ctx.rademacher = lambda: Stored(next(directions))
    ctx.uniform = lambda low, high: next(radii)
    return ctx


def hermite(count):
    """Nodes and weights of the standard normal law: exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return list(zip(nodes, weights / sqrt(2 * np.pi), strict=True))


def legendre(count):
    """Nodes and weights of the uniform law on [-1, 1]: exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return list(zip(nodes, weights / 2, strict=True))


def scalars(values):
    """A dict of one-element tensors x0, x1, ..."""
    return {f"x{i}": torch.tensor([float(v)], dtype=torch.float64) for i, v in enumerate(values)}


def integrated(method, loss, at, *, eps, z_nodes=5, r_nodes=8, of=lambda g: g):
    """E[of(g)] of a one-direction method, exactly, by quadrature over directions and radius: the estimator itself runs."""
    here, total = scalars(at), 0.0
    for nodes in product(*[hermite(z_nodes)] * len(at), legendre(r_nodes)):
        *z, r = [node for node, _ in nodes]
        ctx = scripted(here, lambda w: loss(*[float(x) for x in w.values()]), [scalars(z)], [r], eps=eps)
        g = flat(parts_of(method.estimate(ctx).direction, here))
        total = total + prod(weight for _, weight in nodes) * of(g)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Kernels, in exact arithmetic


def moment(powers, low=0):
    """E of a polynomial {power: coefficient} in |r| uniform on [low, 1]: only even powers are asked for."""
    low = Fraction(low)
    return sum(c * (1 - low ** (m + 1)) / ((m + 1) * (1 - low)) for m, c in powers.items())


def times(p, q):
    out = {}
    for (i, a), (j, b) in product(p.items(), q.items()):
        out[i + j] = out.get(i + j, 0) + a * b
    return out


def as_powers(order, low=0.0):
    return {2 * i + 1: c for i, c in enumerate(kerzoo.kernel(order, low))}


def check_conditions(order, low=0.0):
    """E[r K] = 1 and E[r^j K] = 0 for odd j up to the order, as rationals: no tolerance."""
    k = as_powers(order, low)
    moments = [moment(times(k, {j: Fraction(1)}), low) for j in range(1, order + 1, 2)]
    assert moments == [1] + [0] * (order // 2), f"E[r^j K{order}] = {[str(m) for m in moments]}"


# ----------------------------------------------------------------------------------------------------------------------
# The estimator


def polynomial(degree, seed):
    """A random polynomial of this degree in two variables, its gradient, and gradients of its Laplacian's powers."""
    generator = np.random.default_rng(seed)
    terms = {(i, j): generator.normal() for i in range(degree + 1) for j in range(degree + 1 - i)}

    def value(terms):
        return lambda x, y: sum(c * x**i * y**j for (i, j), c in terms.items())

    def derivative(terms, axis):
        out = {}
        for key, c in terms.items():
            if key[axis]:
                lower = tuple(k - (a == axis) for a, k in enumerate(key))
                out[lower] = out.get(lower, 0.0) + c * key[axis]
        return out

    def laplacian(terms):
        out = derivative(derivative(terms, 0), 0)
        for key, c in derivative(derivative(terms, 1), 1).items():
            out[key] = out.get(key, 0.0) + c
        return out

    def gradient(at, power=0):
        made = terms
        for _ in range(power):
            made = laplacian(made)
        return torch.tensor([value(derivative(made, axis))(*at) for axis in (0, 1)], dtype=torch.float64)

    return value(terms), gradient


AT = (0.3, -0.4)


def check_exact_up_to(order, degree, eps=0.3):
    """The mean of the estimate is the gradient on polynomials up to this degree.

    Rounding of 200 terms, each of losses of about 10 times kernel over eps, about 1e3: 1e-12.
    """
    loss, gradient = polynomial(degree, seed=degree)
    error = float((integrated(KerZOO(order=order), loss, AT, eps=eps) - gradient(AT)).abs().max())
    assert error < 1e-12, f"K{order} has bias {error} on degree {degree}"


def expected_mean(order, gradient, eps, terms=4):
    """sum_k eps^2k / (2^k k!) m_{2k+1} grad Lap^k f"""
    k = as_powers(order)
    m = [float(moment(times(k, {2 * j + 1: Fraction(1)}))) for j in range(terms)]
    return sum(eps ** (2 * j) / (2**j * factorial(j)) * m[j] * gradient(AT, j) for j in range(terms))


def radius_of_step(i=0, step=0):
    """Each direction takes one stream for z and the next for its radius."""
    return uniform(stream(SEED, "step", step, 2 * i + 1), -1.0, 1.0)


def check_linear_step(n=3, order=3):
    """On L = <b, w> a step is -lr sum_i (r_i K(r_i) / n) <b, z_i> z_i with one radius for both tensors.

    fp64; losses of about 10 over eps 0.1, cancelled to 1e-13, and terms of about 10.
    """
    named, _, _ = quadratic()
    b = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before = torch.cat([p.detach().clone() for _, p in named])
    options = {"n": n, "order": order}
    opt = ZO(named, "kerzoo", lr=0.01, eps=0.1, seed=SEED, method_options=options)
    opt.step(lambda: b @ torch.cat([p for _, p in named]))
    expected = 0.0
    for i in range(n):
        z, r = z_of_step(named, index=2 * i), radius_of_step(i)
        expected = expected - 0.01 * (r * KERNELS[order](r) / n) * (b @ z) * z
    moved = torch.cat([p.detach() for _, p in named]) - before
    assert float((moved - expected).abs().max()) < 1e-11


def cubic(a, b):
    """Third derivatives within and across two tensors of one number each."""
    return 0.7 * a**3 + 0.5 * a**2 * b - 0.9 * a * b**2 + 0.3 * a * b


def cubic_gradient(a, b):
    first, second = 2.1 * a**2 + a * b - 0.9 * b**2 + 0.3 * b, 0.5 * a**2 - 1.8 * a * b + 0.3 * a
    return torch.tensor([first, second], dtype=torch.float64)


def check_shared_radius_is_unbiased_on_a_cubic():
    """1e-12: rounding, as in `check_exact_up_to`."""
    mean = integrated(KerZOO(), cubic, AT, eps=0.3)
    error = float((mean - cubic_gradient(*AT)).abs().max())
    assert error < 1e-12, f"bias {error}"


def check_equals_the_readable_twin(n=2, order=3, a=1.0, steps=20):
    """20 steps in fp64 against plain loops. They round in another order: steps times 2**-53, amplified by K / eps."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    options = {"n": n, "order": order, "radius": a}
    opt = ZO(named, "kerzoo", lr=0.01, eps=1e-2, seed=SEED, method_options=options)
    for step in range(steps):
        expected, rhos = kerzoo_step(
            twin, loss, noise_of(twin, step), lambda i, s=step: radius_of_step(i, s), lr=0.01, eps=1e-2, n=n,
            order=order, a=a,
        )  # fmt: skip
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-11
        assert abs(opt.last.estimate.info["rho"] - rhos[-1]) < 1e-9
    compare(named, twin, start)


def check_released_equals_the_readable_twin(n=3, steps=20, horizon=30):
    """As above, with a radius of its own for each tensor and an interval that shrinks to a third."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    options = {"n": n, "variant": "released", "horizon": horizon}
    opt = ZO(named, "kerzoo", lr=0.002, eps=1e-2, seed=SEED, method_options=options)
    for step in range(steps):

        def radius(i, name, step=step):
            return uniform(stream(SEED, "run", "kerzoo", step, i, name), -1.0, 1.0)

        draw = noise_of(twin, step, per_direction=1)
        expected, _ = released_step(twin, loss, draw, radius, lr=0.002, eps=1e-2, step=step, n=n, horizon=horizon)
        assert abs(float(opt.step(lambda: loss(dict(named)))) - expected) < 1e-11
    compare(named, twin, start)


def noise_of(twin, step, per_direction=2):
    def draw(i, name):
        noise = Noise(stream(SEED, "step", step, per_direction * i))
        return noise.realise(Site(name, tuple(twin[name].shape)), torch.float64)

    return draw


def compare(named, twin, start):
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name  # fp64, a few steps of numbers of about 1
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_interval_is_a_scale_of_eps():
    """(a, eps) and (1, a eps) are the same step, to the bit: the method works in units of a."""
    steps = []
    for a, eps in [(0.3, 0.5), (1.0, 0.3 * 0.5)]:
        named, closure, _ = quadratic()
        ZO(named, "kerzoo", lr=0.01, eps=eps, seed=SEED, method_options={"radius": a}).step(closure)
        steps.append(torch.cat([p.detach() for _, p in named]))
    assert torch.equal(steps[0], steps[1])


def estimate_on(named, closure, **settings):
    """The first step's estimate as a vector over `named`, and its info; the weights stay."""
    opt = ZO(named, "kerzoo", lr=0.0, eps=0.5, seed=SEED, **settings)
    opt.step(closure)
    return realised(opt.last.estimate.direction, named), opt.last.estimate.info
