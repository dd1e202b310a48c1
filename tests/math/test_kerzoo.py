"""KerZOO's kernels, mean, variance and both variants, with the exact constants."""

from fractions import Fraction
from itertools import product
from math import exp, factorial, sqrt

import numpy as np
import pytest
import torch
from tests.checks.kerzoo import (
    AT,
    as_powers,
    check_conditions,
    check_equals_the_readable_twin,
    check_exact_up_to,
    check_interval_is_a_scale_of_eps,
    check_linear_step,
    check_released_equals_the_readable_twin,
    check_shared_radius_is_unbiased_on_a_cubic,
    cubic,
    cubic_gradient,
    estimate_on,
    expected_mean,
    hermite,
    integrated,
    legendre,
    moment,
    polynomial,
    scalars,
    scripted,
    times,
)
from tests.checks.mezo import SEED, quadratic, realised
from tests.reference.kerzoo import KERNELS, averaging_weights
from tests.support.bare import bare_context, estimate_of, flat
from tests.support.bare import realised as parts_of

from zotune.errors import ConfigError
from zotune.methods.kerzoo import ORDERS, KerZOO, kernel
from zotune.optim.optimizer import ZO

F = Fraction
POWER = {j: {j: F(1)} for j in (1, 3, 5, 7)}
RELEASED = {1: F(75), 3: F(-105)}  # 15 r (5 - 7 r^2)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low", [0.0, 0.1, 0.5])
def test_conditions_hold_exactly(order, low):
    check_conditions(order, low)


def test_kernels_are_those_of_the_literature():
    assert kernel(1) == (3,)
    assert kernel(3) == (F(15 * 5, 4), F(-15 * 7, 4))
    assert kernel(5) == (F(105 * 35, 64), F(-105 * 126, 64), F(105 * 99, 64))
    assert [round(float(c), 3) for c in kernel(7)] == [129.199, -852.715, 1583.613, -879.785]


def test_printed_constant_of_the_fifth_kernel_misses_the_condition():
    """195/64, as printed in the paper, gives E[r K5] = 13/7."""
    printed = {power: c * F(195, 105) for power, c in as_powers(5).items()}
    assert moment(times(printed, POWER[1])) == F(13, 7)


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_sums_of_legendre_polynomials(order):
    """sum over odd j of (2j + 1) P_j'(0) P_j in fp64; coefficients up to 1600, so 1e-11."""
    total = np.polynomial.Polynomial([0.0])
    for j in range(1, order + 1, 2):
        p = np.polynomial.Legendre.basis(j).convert(kind=np.polynomial.Polynomial)
        total = total + (2 * j + 1) * p.deriv()(0.0) * p
    assert np.allclose(total.coef[1::2], [float(c) for c in kernel(order)], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("k", "moments", "square", "noise"),
    [
        (as_powers(1), [1, F(3, 5), F(3, 7), F(1, 3)], 3, F(9, 5)),
        (as_powers(3), [1, 0, F(-5, 21), F(-10, 33)], F(75, 4), F(25, 4)),
        (as_powers(5), [1, 0, 0, F(35, 429)], F(3675, 64), F(11025, 832)),
        (as_powers(7), [1, 0, 0, 0], F(33075, 256), F(99225, 4352)),
        (RELEASED, [4, 0, F(-20, 21), F(-40, 33)], 300, 100),
    ],
    ids=["K1", "K3", "K5", "K7", "released"],
)
def test_moments(k, moments, square, noise):
    """m1, m3, m5, m7, E[K^2] and E[r^2 K^2] as rationals; and by Gauss-Legendre with 12 nodes, to rounding."""
    assert [moment(times(k, POWER[j])) for j in (1, 3, 5, 7)] == moments
    assert moment(times(k, k)) == square
    assert moment(times(times(k, k), {2: F(1)})) == noise
    value = lambda r: sum(float(c) * r**power for power, c in k.items())  # noqa: E731
    assert sum(w * r * value(r) for r, w in legendre(12)) == pytest.approx(float(moments[0]), rel=1e-13)
    assert sum(w * (r * value(r)) ** 2 for r, w in legendre(12)) == pytest.approx(float(noise), rel=1e-13)


@pytest.mark.parametrize(("low", "noise"), [(0.0, 6.25), (0.1, 5.694), (0.25, 5.568), (0.5, 9.350)])
def test_variance_with_a_least_radius(low, noise):
    """The numbers that the docs give."""
    k = as_powers(3, low)
    assert float(moment(times(times(k, k), {2: F(1)}), low)) == pytest.approx(noise, abs=5e-4)


@pytest.mark.parametrize("order", KERNELS)
def test_the_method_evaluates_its_kernel(order):
    for r in np.linspace(-1, 1, 9):
        # Horner against the printed form: a few roundings of terms below 220
        assert KerZOO(order=order).kernel_at(r) == pytest.approx(KERNELS[order](r), abs=1e-12)
        assert KerZOO(order=order, scale=4.0).kernel_at(r) == pytest.approx(4 * KERNELS[order](r), abs=4e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The mean, by quadrature over directions and radius


@pytest.mark.parametrize(("order", "degree"), [(1, 1), (1, 2), (3, 3), (3, 4), (5, 5), (5, 6), (7, 7), (7, 8)])
def test_exact_on_polynomials(order, degree):
    check_exact_up_to(order, degree)


@pytest.mark.parametrize(("order", "degree"), [(1, 3), (3, 5), (5, 7)])
def test_biased_one_degree_further(order, degree):
    loss, gradient = polynomial(degree, seed=degree)
    assert float((integrated(KerZOO(order=order), loss, AT, eps=0.3) - gradient(AT)).abs().max()) > 1e-5


@pytest.mark.parametrize("order", [1, 3, 5])
def test_mean_is_the_series_in_gradients_of_laplacians(order):
    """sum eps^2k/(2^k k!) m_{2k+1} grad Lap^k f on degree 7; rounding of losses of about 100 times kernel over eps."""
    loss, gradient = polynomial(7, seed=1)
    mean = integrated(KerZOO(order=order), loss, AT, eps=0.5)
    assert torch.allclose(mean, expected_mean(order, gradient, 0.5), rtol=0, atol=1e-11)


def test_bias_of_the_third_kernel_on_degree_five():
    loss, gradient = polynomial(5, seed=5)
    bias = integrated(KerZOO(), loss, AT, eps=0.5) - gradient(AT)
    expected = -(5 / 168) * 0.5**4 * gradient(AT, power=2)
    assert float(expected.abs().max()) > 1e-3
    # quadrature that is exact for the degree, of fp64 numbers up to 100
    assert torch.allclose(bias, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("order", "slope"), [(None, 2), (1, 2), (3, 4), (5, 6)])
def test_slope_of_the_bias_in_eps(order, slope):
    """On exp, all of whose derivatives are 1 at 0. None: no kernel, that is a radius of 1 and weight 1.

    The next term is eps^2 / 10 of the leading one or less: a tenth of a power over this halving of eps.
    """

    def bias(eps):
        if order is None:
            return abs(sum(w * z * (exp(eps * z) - exp(-eps * z)) / (2 * eps) for z, w in hermite(20)) - 1)
        method = KerZOO(order=order)
        return abs(float(integrated(method, exp, [0.0], eps=eps, z_nodes=20, r_nodes=16)) - 1)

    assert np.log2(bias(0.4) / bias(0.2)) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("low", [0.0, 0.3])
def test_mean_with_a_least_radius(low):
    """The kernel is made for the law of the radius, so degree 4 stays exact: Gauss nodes on [low, 1] and their mirror."""
    loss, gradient = polynomial(4, seed=4)
    here, method, total = scalars(AT), KerZOO(min_radius=low), 0.0
    for (x, wx), (y, wy), (u, wu) in product(hermite(5), hermite(5), legendre(8)):
        for sign in (1.0, -1.0):
            uniform = sign * (u + 1) / 2  # the magnitude in [0, 1], which the method maps onto [low, 1]
            ctx = scripted(here, lambda w: loss(float(w["x0"]), float(w["x1"])), [scalars([x, y])], [uniform], eps=0.3)
            total = total + wx * wy * wu / 2 * flat(parts_of(method.estimate(ctx).direction, here))
    assert float((total - gradient(AT)).abs().max()) < 1e-12


def test_shared_radius_is_unbiased_on_a_cubic_of_two_tensors():
    check_shared_radius_is_unbiased_on_a_cubic()


def test_radius_per_tensor_is_biased_by_the_cross_terms(monkeypatch):
    """Released variant with C = 1, at step 0: bias of tensor l is (eps^2 / 6) sum over p != l of grad_l Lap_p f."""
    here, method, total = scalars(AT), KerZOO(variant="released", scale=1.0), 0.0
    radii = {}
    monkeypatch.setattr(KerZOO, "tensor_radius", lambda self, ctx, i, site, a: a * radii[site.name])
    for (x, wx), (y, wy), (p, wp), (q, wq) in product(*[hermite(4)] * 2, *[legendre(5)] * 2):
        radii.update(x0=p, x1=q)
        ctx = scripted(here, lambda w: cubic(float(w["x0"]), float(w["x1"])), [scalars([x, y])], eps=0.3)
        total = total + wx * wy * wp * wq * flat(parts_of(method.estimate(ctx).direction, here))
    cross = torch.tensor([-2 * 0.9, 2 * 0.5], dtype=torch.float64)  # d^3 f / da db^2 and d^3 f / db da^2
    assert torch.allclose(total - cubic_gradient(*AT), 0.3**2 / 6 * cross, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Variance


@pytest.mark.parametrize(("order", "noise"), [(1, 1.8), (3, 6.25), (5, 11025 / 832)])
def test_second_moment_on_a_linear_loss(order, noise):
    """E|g|^2 = E[r^2 K^2] (d + 2) |grad|^2, by quadrature in two dimensions: rounding only."""
    b = np.array([0.6, -1.1])
    second = integrated(KerZOO(order=order), lambda x, y: b[0] * x + b[1] * y, AT, eps=0.5, of=lambda g: float(g @ g))
    assert second == pytest.approx(noise * (2 + 2) * (b @ b), rel=1e-11)


def _draws(order, count, d=20):
    b = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {"w": torch.zeros(d, dtype=torch.float64)}
    made = []
    for step in range(count):
        g, _, _ = estimate_of(KerZOO(order=order), weights, lambda w: b @ w["w"], step=step, eps=0.1)
        made.append((float(g @ g) / float(b @ b), float(g @ b)))
    return np.array(made), d


def _check_draws(count):
    """Second moment, mean along the gradient, and share of uphill steps of random draws: 5 standard errors each."""
    made, d = _draws(3, count)
    assert abs(made[:, 0].mean() - 6.25 * (d + 2)) < 5 * made[:, 0].std() / sqrt(count)
    uphill = 1 - sqrt(5 / 7)  # r K3(r) < 0 where |r| > sqrt(5/7)
    assert uphill == pytest.approx(0.1548, abs=5e-5)
    assert abs((made[:, 1] < 0).mean() - uphill) < 5 * sqrt(uphill * (1 - uphill) / count)


def test_second_moment_and_uphill_share_of_draws():
    _check_draws(2000)


@pytest.mark.statistical
def test_second_moment_and_uphill_share_of_many_draws():
    _check_draws(20_000)


@pytest.mark.statistical
@pytest.mark.parametrize(("order", "noise"), [(1, 1.8), (3, 6.25), (5, 13.25)])
def test_noise_factor_of_draws(order, noise):
    """Within 3%: 60,000 draws have a standard error of about 1%."""
    made, d = _draws(order, 60_000)
    assert made[:, 0].mean() / (d + 2) == pytest.approx(noise, rel=0.03)


def test_noise_of_the_loss_is_amplified():
    """Independent errors s of both losses: E rho^2 K^2 = E[K^2] s^2 / (2 eps^2), 18.75 times that of no kernel.

    A loss that is +s at one point and -s at the other gives rho = s / eps, K alone is left: quadrature over r.
    """
    method, here, total = KerZOO(), scalars([0.0]), 0.0
    for r, w in legendre(8):
        answers = iter([1.0, -1.0])
        ctx = scripted(here, lambda _, a=answers: next(a), [scalars([1.0])], [r], eps=0.5)
        total += w * float(flat(parts_of(method.estimate(ctx).direction, here))[0] * 0.5) ** 2
    assert total == pytest.approx(18.75, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("n", [1, 3])
def test_step_on_a_linear_loss(n):
    check_linear_step(n)


@pytest.mark.parametrize(("n", "order", "a"), [(1, 3, 1.0), (3, 1, 0.5), (2, 5, 1.0)])
def test_equals_the_readable_twin(n, order, a):
    check_equals_the_readable_twin(n, order, a)


def test_released_variant_equals_the_readable_twin():
    check_released_equals_the_readable_twin()


def test_interval_is_a_scale_of_eps():
    check_interval_is_a_scale_of_eps()


def test_constant_scales_the_estimate():
    """C = 4 is exact in floating point."""
    named, closure, _ = quadratic()
    one, _ = estimate_on(named, closure)
    four, _ = estimate_on(named, closure, method_options={"scale": 4.0})
    assert torch.equal(four, 4 * one)


def test_radius_of_one_without_kernel_is_mezo(monkeypatch):
    """Bit for bit: the direction is MeZO's, and only radius and kernel are new."""
    monkeypatch.setattr("zotune.core.context.Context.uniform", lambda self, low, high: high)
    monkeypatch.setattr(KerZOO, "kernel_at", lambda self, r: 1.0)
    named, closure, _ = quadratic()
    made, _ = estimate_on(named, closure)
    opt = ZO(named, "mezo", lr=0.0, eps=0.5, seed=SEED)
    opt.step(closure)
    assert torch.equal(made, realised(opt.last.estimate.direction, named))


@pytest.mark.parametrize("variant", ["theory", "released"])
def test_order_and_freezing_of_tensors_change_no_draw(variant):
    """On a linear loss coefficient and noise of a tensor's part are those of the whole, whoever else is trained."""
    named, _, _ = quadratic()
    first = named[0][1]
    options = {"method_options": {"variant": variant}, "engine": "in_place"}

    def loss():
        return 3.0 * first.sum()

    made, info = estimate_on(named, loss, **options)
    swapped, info_swapped = estimate_on(named[::-1], loss, **options)
    alone, info_alone = estimate_on(named[:1], loss, **options)
    assert info == info_swapped == info_alone
    assert torch.equal(made[:5], alone)
    assert torch.equal(made, torch.cat([swapped[7:], swapped[:7]]))


def test_weights_are_restored_and_steps_repeat():
    named, closure, _ = quadratic()
    before = [p.detach().clone() for _, p in named]
    one, _ = estimate_on(named, closure, method_options={"n": 3})
    again, _ = estimate_on(named, closure, method_options={"n": 3})
    assert torch.equal(one, again)
    assert all(torch.equal(b, p.detach()) for b, (_, p) in zip(before, named, strict=True))


def test_least_radius_is_kept():
    named, closure, _ = quadratic()
    opt = ZO(named, "kerzoo", lr=0.0, eps=0.5, method_options={"min_radius": 0.4, "radius": 0.5})
    drawn = []
    for _ in range(100):
        opt.step(closure)
        drawn.append(opt.last.estimate.info["radius"])
    # uniform from 0.2 to 0.5: 100 draws all miss a sixth of it with (5 / 6)^100 = 1e-8
    assert 0.2 <= min(map(abs, drawn)) < 0.25
    assert 0.45 < max(map(abs, drawn)) <= 0.5
    assert min(drawn) < 0 < max(drawn)


def test_logged_loss_is_the_mean_of_the_probes():
    named, closure, _ = quadratic()
    asked = []
    opt = ZO(named, "kerzoo", lr=0.0, eps=0.5, engine="in_place", method_options={"n": 3})
    logged = opt.step(lambda: asked.append(float(closure())) or asked[-1])
    assert float(logged) == pytest.approx(sum(asked[-6:]) / 6, rel=1e-15)  # six additions of fp64


def test_directions_come_from_the_source():
    """Signs: the estimate of one direction has one magnitude in all elements."""
    named, closure, _ = quadratic()
    made, _ = estimate_on(named, closure, method_options={"source": "rademacher"})
    assert len(made.abs().unique()) == 1
    assert float(made[0]) != 0


# ----------------------------------------------------------------------------------------------------------------------
# The released variant


@pytest.mark.parametrize(
    ("a", "m1", "ratio", "noise"),
    [
        (1.0, 4.00, 0.0, 6.25),
        (0.9, 6.47, 0.289, 1.66),
        (0.7715, 7.44, 0.289, 1.41),
        (0.5, 4.94, 0.142, 1.64),
        (0.25, 1.48, 0.0371, 1.76),
        (0.1, 0.248, 0.0060, 1.79),
    ],
)
def test_released_kernel_on_a_shrunk_interval(a, m1, ratio, noise):
    """m1(a) = 25 a^2 - 21 a^4 and m3 = 15 (a^4 - a^6) of the method's own kernel; table values to their last digit."""
    a_exact = F(str(a))
    k = {power: 4 * c * a_exact**power for power, c in as_powers(3).items()}  # in units of a, r = a s
    first, third = (moment(times(k, {j: a_exact**j})) for j in (1, 3))
    assert first == 25 * a_exact**2 - 21 * a_exact**4
    assert third == 15 * (a_exact**4 - a_exact**6)
    assert float(first) == pytest.approx(m1, rel=2e-3)
    assert float(third / first) == pytest.approx(ratio, abs=5e-4)
    assert float(moment(times(times(k, k), {2: a_exact**2})) / first**2) == pytest.approx(noise, abs=5e-3)


def test_released_interval_and_kernel():
    """The interval shrinks to 1e-4 at the horizon and stays; the kernel is 15 r (5 - 7 r^2) all along."""
    method = KerZOO(variant="released", n=1)
    assert method.kernel_at(0.3) == pytest.approx(15 * 0.3 * (5 - 7 * 0.09), rel=1e-14)
    weights = {"w": torch.zeros(4, dtype=torch.float64)}
    for step, a in [(0, 1.0), (1000, 0.75), (3000, 0.25), (4000, 1e-4), (9000, 1e-4)]:
        ctx = bare_context(weights, lambda w: w["w"].sum(), step=step)
        assert method.estimate(ctx).info["radius"] == pytest.approx(a, rel=1e-12)


def test_step_mass_of_a_released_run():
    """Sum of m1 over 4000 steps: a run at 1e-6 moves as far along the gradient as 16535 MeZO steps at 1e-6."""
    a = 1 - np.arange(4000) / 4000
    assert (25 * a**2 - 21 * a**4).sum() == pytest.approx(4000 * (25 / 3 - 21 / 5) + 2, abs=0.01)


def test_radii_of_tensors_differ():
    method = KerZOO(variant="released")
    weights = {f"w{i}": torch.zeros(2) for i in range(200)}
    ctx = bare_context(weights, lambda w: 0.0)
    radii = np.array([method.tensor_radius(ctx, 0, site, 0.5) for site in ctx.sites])
    other = np.array([method.tensor_radius(ctx, 1, site, 0.5) for site in ctx.sites])
    assert len(set(radii) | set(other)) == 400
    assert abs(radii).max() <= 0.5
    assert abs(radii.mean()) < 5 * 0.5 / sqrt(3 * 200)
    assert abs(np.corrcoef(radii, other)[0, 1]) < 5 / sqrt(200)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_weights_of_the_released_average(steps):
    """Not built here, but stated in the docs: the weights sum to 1, and the mean age of an iterate is (t - 1) / 7.

    t - 1 steps were completed before the last: at its age 0 with beta = 1 + (t - 1) / 6.
    """
    weights = averaging_weights(steps)
    assert sum(weights) == pytest.approx(1.0, rel=1e-12)
    age = sum(w * (steps - 1 - i) for i, w in enumerate(weights))
    assert age == pytest.approx((steps - 1) / 7, rel=1e-9)
    assert averaging_weights(1) == [1.0]  # beta_0 = 1: x = c after the first step


# ----------------------------------------------------------------------------------------------------------------------
# The method as a type


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"order": 2},
        {"order": 9},
        {"scale": 0.0},
        {"radius": 0.0},
        {"min_radius": -0.1},
        {"min_radius": 0.6},
        {"variant": "code"},
        {"horizon": 0},
        {"variant": "released", "min_radius": 0.1},
        {"source": "nowhere"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError):
        KerZOO(**options)


def test_an_unknown_order_says_which_there_are():
    with pytest.raises(ConfigError, match="order must be 1, 3, 5 or 7; got 4"):
        KerZOO(order=4)


@pytest.mark.parametrize("variant", ["theory", "released"])
@pytest.mark.parametrize("n", [1, 3])
def test_forwards_declared(n, variant):
    method = KerZOO(n=n, variant=variant)
    _, _, ctx = estimate_of(method, scalars([1.0, 2.0]), lambda w: w["x0"] * w["x1"])
    assert ctx.queries == method.forwards == 2 * n
    assert method.extra_bytes(ctx.sites) == 0


def test_losses_that_are_no_numbers_are_refused():
    _, estimate, _ = estimate_of(KerZOO(), scalars([1.0]), lambda w: float("nan"))
    assert not estimate.is_finite()


def test_series_of_exp_by_hand():
    """The quadrature that the slopes rest on: E[g] on exp at 0 is sum eps^2k / (2^k k!) m_{2k+1}, here for K3."""
    k, eps = as_powers(3), 0.4
    series = sum(eps ** (2 * j) / (2**j * factorial(j)) * float(moment(times(k, {2 * j + 1: F(1)}))) for j in range(12))
    made = float(integrated(KerZOO(), exp, [0.0], eps=eps, z_nodes=20, r_nodes=16))
    assert made == pytest.approx(series, abs=1e-12)
