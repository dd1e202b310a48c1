"""FZOO: signs, the plain estimator's moments, and the normalised step's invariances and laws."""

from math import exp, gamma, sqrt

import numpy as np
import pytest
import torch
from tests.checks.fzoo import (
    check_directions_are_signs,
    check_equal_losses_give_no_step,
    check_equals_the_readable_twin,
    check_scale_of_the_loss_does_not_matter,
    enumerated,
    estimate_on,
)
from tests.checks.kerzoo import scalars, scripted
from tests.checks.mezo import SEED, quadratic, realised
from tests.support.bare import bare_context, estimate_of

from zotune.errors import ConfigError
from zotune.methods.fzoo import FZOO
from zotune.optim.optimizer import ZO

PLAIN = {"normalise": False}


# ----------------------------------------------------------------------------------------------------------------------
# The plain estimator, over all choices of signs: exact to rounding


def _quadratic(x, y, z):
    return 0.7 * x - 1.1 * y + 0.2 * z + 0.6 * x * x - 0.4 * x * y + 0.4 * y * y + 0.9 * y * z


AT = (0.3, 0.5, -0.2)
SLOPE = [0.7 + 1.2 * 0.3 - 0.4 * 0.5, -1.1 - 0.4 * 0.3 + 0.8 * 0.5 - 0.9 * 0.2, 0.2 + 0.9 * 0.5]


@pytest.mark.parametrize("n", [1, 2])
def test_mean_on_a_quadratic_is_its_gradient(n):
    """The one-sided difference's term in eps is even in u, so its mean is zero."""
    made = enumerated(FZOO(n=n, **PLAIN), _quadratic, AT, eps=0.5)
    assert made.tolist() == pytest.approx(SLOPE, abs=1e-13)


def test_bias_on_a_cubic():
    """(eps^2 / 6) (3 grad_k Lap f - 2 f_kkk): signs see less of the own third derivative than Gaussians do."""

    def cubic(x, y):
        return 0.5 * x**3 + 0.8 * x * x * y - 0.3 * x * y * y - 0.7 * y**3

    x, y, eps = 0.3, 0.5, 0.4
    gradient = [1.5 * x * x + 1.6 * x * y - 0.3 * y * y, 0.8 * x * x - 0.6 * x * y - 2.1 * y * y]
    third, cross = [3.0, -4.2], [-0.6, 1.6]  # f_kkk, and f_k of the other variable's second derivative
    expected = [g + eps**2 / 6 * (t + 3 * c) for g, t, c in zip(gradient, third, cross, strict=True)]
    made = enumerated(FZOO(n=1, **PLAIN), cubic, (x, y), eps=eps)
    assert made.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(1, 4), (2, 4), (3, 3)])
def test_second_moment_on_a_linear_loss(n, d):
    """E|g|^2 = (d + n - 1)/n |grad|^2: |u|^2 is d exactly, where a Gaussian's has a spread and gives d + n + 1."""
    slope = [1.3, -0.4, 0.9, 0.2][:d]
    second = enumerated(
        FZOO(n=n, **PLAIN),
        lambda *x: sum(s * v for s, v in zip(slope, x, strict=True)),
        [0.1] * d,
        eps=0.5,
        of=lambda g, _: float(g @ g),
    )
    assert second == pytest.approx((d + n - 1) / n * sum(s * s for s in slope), rel=1e-11)


@pytest.mark.parametrize("n", [2, 3])
def test_spread_of_the_losses_measures_the_gradient(n):
    """E sigma^2 = eps^2 |grad|^2 on a linear loss, with the 1/(n - 1)."""
    slope = np.array([1.3, -0.4, 0.9])
    square = enumerated(
        FZOO(n=n),
        lambda *x: float(slope @ x),
        (0.1, 0.2, 0.3),
        eps=0.5,
        of=lambda g, estimate: estimate.info["sigma"] ** 2,
    )
    assert square == pytest.approx(0.25 * slope @ slope, rel=1e-11)


@pytest.mark.parametrize(("source", "extra"), [("rademacher", -1), ("gaussian", 1)])
def test_second_moment_of_draws_by_source(source, extra):
    """(d + n -+ 1)/n within 5 standard errors: signs against Gaussians in few dimensions, where it shows."""
    n, d, count = 2, 4, 800
    b = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
    method, weights = FZOO(n=n, normalise=False, source=source), {"w": torch.zeros(d, dtype=torch.float64)}
    squares = []
    for step in range(count):
        g, _, _ = estimate_of(method, weights, lambda w: b @ w["w"], step=step, eps=0.1)
        squares.append(float(g @ g) / float(b @ b))
    assert abs(np.mean(squares) - (d + n + extra) / n) < 5 * np.std(squares) / sqrt(count)


# ----------------------------------------------------------------------------------------------------------------------
# The normalised step


@pytest.mark.parametrize("variant", ["theory", "released"])
def test_scale_of_the_loss_does_not_matter(variant):
    check_scale_of_the_loss_does_not_matter(variant=variant)


def test_any_factor_and_any_constant():
    """Factors that are no power of two round: losses of about 50 that differ by about 1 lose 1e-14 of the difference."""
    named, closure, _ = quadratic()
    one, _ = estimate_on(closure, named)
    other, _ = estimate_on(lambda: 0.3 * closure() - 17.0, named)
    assert torch.allclose(one, other, rtol=1e-10, atol=1e-12 * float(one.abs().max()))


def test_normalised_is_plain_over_sigma():
    named, closure, _ = quadratic()
    plain, _ = estimate_on(closure, named, normalise=False)
    made, outcome = estimate_on(closure, named)
    here, *probes = outcome.losses
    sigma = np.std(probes, ddof=1)
    assert outcome.estimate.info["sigma"] == pytest.approx(sigma, rel=1e-12)
    # sigma, of losses that differ by about 1 in 50, loses a few 1e-14
    assert torch.allclose(made, plain / sigma, rtol=1e-12)
    assert float(outcome.estimate.loss) == here


def test_released_units():
    """sum (l_i - l_0) u_i / (n std with 1/n): eps sqrt(n/(n-1)) times the paper's."""
    named, closure, _ = quadratic()
    theory, _ = estimate_on(closure, named, eps=0.25, n=5)
    released, _ = estimate_on(closure, named, eps=0.25, n=5, variant="released")
    assert torch.allclose(released, theory * 0.25 * sqrt(5 / 4), rtol=1e-12)


def test_equal_losses_give_no_step():
    check_equal_losses_give_no_step()


def test_equal_probes_that_differ_from_here_give_no_step():
    """On |w| around 0 with signs all probes are equal; the spread is what counts."""
    weights = scalars([0.0, 0.0])
    answers = iter([0.0, 2.5, 2.5, 2.5])
    u = [scalars([1.0, 1.0]), scalars([1.0, -1.0]), scalars([-1.0, 1.0])]
    estimate = FZOO(n=3).estimate(scripted(weights, lambda _: next(answers), u))
    assert estimate.direction.terms == ()
    assert estimate.is_finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_losses_that_are_no_numbers_are_refused(bad, where):
    losses = [1.0, 2.0, 3.0, 4.0]
    losses[where] = bad
    answers = iter(losses)
    ctx = bare_context(scalars([1.0]), lambda _: next(answers))
    assert not FZOO(n=3).estimate(ctx).is_finite()


def _check_normalised_step(count, n, d=64):
    """Laws of eps g / sigma on a linear loss with unit slope, for slopes y_i that are nearly Gaussian (d equal ones).

    Along the gradient: mean (n-1)/n E s + E[1/s]/n, s the deviation of n normals. In all: (d - 1)/n^2 (n-1)(n-2)/(n-3)
    across, and along ((n-1)^2 + 2(n-1) + 3(n-1)/(n-3))/n^2. Signs differ from Gaussians by terms of 1/d in the fourth
    moment: 2%, which is added to the 5 standard errors.
    """
    b = torch.full((d,), d**-0.5, dtype=torch.float64)
    weights, method = {"w": torch.zeros(d, dtype=torch.float64)}, FZOO(n=n)
    made = []
    for step in range(count):
        g, _, _ = estimate_of(method, weights, lambda w: b @ w["w"], step=step, eps=0.1)
        made.append((0.1 * float(g @ b), 0.01 * float(g @ g)))
    along, squares = np.array(made).T
    s = sqrt(2 / (n - 1)) * gamma(n / 2) / gamma((n - 1) / 2)
    inverse = sqrt((n - 1) / 2) * gamma((n - 2) / 2) / gamma((n - 1) / 2)
    mean = (n - 1) / n * s + inverse / n
    across = (d - 1) / n**2 * (n - 1) * (n - 2) / (n - 3)
    square = across + ((n - 1) ** 2 + 2 * (n - 1) + 3 * (n - 1) / (n - 3)) / n**2
    assert abs(along.mean() - mean) < 5 * along.std() / sqrt(count) + 0.02 * mean
    assert abs(squares.mean() - square) < 5 * squares.std() / sqrt(count) + 0.02 * square
    return mean


def test_a_step_is_one_unit_of_the_gradient():
    """n = 8: 0.985 lr/eps along the unit gradient, and about sqrt(d/n) lr/eps in all."""
    assert _check_normalised_step(500, 8) == pytest.approx(0.985, abs=5e-4)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [8, 16])
def test_a_step_is_one_unit_of_the_gradient_in_many_draws(n):
    _check_normalised_step(60_000 // n, n)


# ----------------------------------------------------------------------------------------------------------------------
# Steps and the method as a type


@pytest.mark.parametrize(
    ("n", "normalise", "variant"),
    [(8, True, "theory"), (3, True, "released"), (4, False, "theory")],
)
def test_equals_the_readable_twin(n, normalise, variant):
    check_equals_the_readable_twin(n, normalise=normalise, variant=variant)


def test_plain_is_one_sided_mezo_with_signs():
    """Bit for bit. FZOO asks for l_0 first, as MeZO does."""
    named, closure, _ = quadratic()
    for n in (1, 4):
        made, _ = estimate_on(closure, named, n=n, normalise=False)
        options = {"n": n, "sides": 1}
        opt = ZO(named, "mezo", lr=0.0, eps=0.25, seed=SEED, noise="rademacher", method_options=options)
        opt.step(closure)
        assert torch.equal(made, realised(opt.last.estimate.direction, named))


def test_directions_are_signs():
    check_directions_are_signs()


def test_logged_loss_is_that_of_the_weights():
    weights = scalars([0.7, -0.2])
    _, estimate, _ = estimate_of(FZOO(), weights, lambda w: exp(float(w["x0"])) + float(w["x1"]), eps=0.1)
    assert float(estimate.loss) == exp(0.7) - 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1},
        {"n": 0, "normalise": False},
        {"variant": "code"},
        {"variant": "released", "normalise": False},
        {"source": "nowhere"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError):
        FZOO(**options)


@pytest.mark.parametrize("n", [2, 8])
def test_forwards_declared(n):
    method = FZOO(n=n)
    _, _, ctx = estimate_of(method, scalars([1.0, 2.0]), lambda w: w["x0"] * w["x1"])
    assert ctx.queries == method.forwards == n + 1
    assert method.extra_bytes(ctx.sites) == 0
