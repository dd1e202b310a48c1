"""Evolution strategies: exact identities of the leave-one-out baseline, and the laws of the estimate."""

from itertools import pairwise
from math import cos, exp, pi, sin, sqrt

import numpy as np
import pytest
import torch
from tests.checks.es import (
    check_coefficients_sum_to_zero,
    check_covariance,
    check_equals_the_readable_twin,
    check_mean_is_the_gradient_of_the_smoothed_loss,
    coefficients,
    estimate_of_losses,
    integrated,
)
from tests.checks.kerzoo import scalars
from tests.checks.mezo import SEED, quadratic
from tests.support.bare import estimate_of

from zotune.errors import ConfigError
from zotune.methods.es import ES, centred_ranks
from zotune.optim.optimizer import ZO

# ----------------------------------------------------------------------------------------------------------------------
# Identities of one step


def test_estimate_is_the_covariance_of_losses_and_directions():
    check_covariance()


def test_coefficients_sum_to_zero():
    check_coefficients_sum_to_zero()


def test_coefficients_are_differences_to_the_mean_of_the_others():
    """c_i = (l_i - mean_{j != i} l_j) / eps, by hand; quarters and eps 1/4 are exact, thirds round."""
    losses = [3.0, 4.5, 2.0, 3.25]
    _, estimate = estimate_of_losses(losses, [[1.0]] * 4, eps=0.25)
    expected = [(l_i - (sum(losses) - l_i) / 3) / 0.25 for l_i in losses]
    assert coefficients(estimate, 4).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"baseline": "mean"}, {"shaping": "centered_ranks"}])
def test_a_constant_added_to_the_loss_changes_nothing(options):
    """Bit for bit, with losses on which the sums are exact."""
    losses, z = [3.0, 4.5, 2.0, 3.25], [[1.0, 2.0], [2.0, -1.0], [-1.0, 0.0], [0.5, 0.5]]
    one, _ = estimate_of_losses(losses, z, **options)
    other, _ = estimate_of_losses([value + 64.0 for value in losses], z, **options)
    assert torch.equal(one, other)


def test_losses_that_are_equal_give_no_step():
    made, estimate = estimate_of_losses([2.5] * 4, [[1.0], [2.0], [-1.0], [0.5]])
    assert made.tolist() == [0.0]
    assert estimate.is_finite()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_plain_mean_scales_the_estimate(n):
    """(n - 1) / n times leave-one-out, for any losses."""
    generator = torch.Generator().manual_seed(n)
    losses = torch.randn(n, dtype=torch.float64, generator=generator).tolist()
    z = torch.randn(n, 3, dtype=torch.float64, generator=generator).tolist()
    full, _ = estimate_of_losses(losses, z)
    short, _ = estimate_of_losses(losses, z, baseline="mean")
    assert torch.allclose(short, (n - 1) / n * full, rtol=1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# Laws, by quadrature over all directions


def test_mean_is_the_gradient_of_the_smoothed_loss():
    check_mean_is_the_gradient_of_the_smoothed_loss()


def test_mean_with_the_plain_mean_as_baseline():
    """n = 2: half of it. Gauss-Hermite with 16 nodes is exact to 1e-13 here."""
    mean = float(integrated(ES(n=2, baseline="mean"), sin, [0.4], eps=0.8, nodes=16))
    assert mean == pytest.approx(cos(0.4) * exp(-0.32) / 2, abs=1e-12)


def test_logged_loss_is_the_smoothed_loss():
    """E of the mean of l_i is E L(theta + eps z): sin(x) exp(-eps^2/2)."""
    logged = integrated(ES(n=2), sin, [0.4], eps=0.8, nodes=16, of=lambda g, estimate: float(estimate.loss))
    assert logged == pytest.approx(sin(0.4) * exp(-0.32), abs=1e-12)


def test_mean_on_a_quadratic_is_its_gradient():
    """Smoothing adds a constant to a quadratic. Rounding of 625 terms."""
    gradient = torch.tensor([0.7 + 1.2 * 0.3 - 0.4 * 0.5, -1.1 - 0.4 * 0.3 + 0.8 * 0.5], dtype=torch.float64)
    mean = integrated(ES(n=2), _quadratic, [0.3, 0.5], eps=0.6)
    assert torch.allclose(mean, gradient, rtol=0, atol=1e-12)


def _quadratic(x, y):
    return 0.7 * x - 1.1 * y + 0.6 * x * x - 0.4 * x * y + 0.4 * y * y


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_second_moment_on_a_linear_loss(n, d):
    """E|g|^2 = (d + n) / (n - 1) |grad|^2: degree 4 in each number, so 3 nodes are exact."""
    slope = [1.3, -0.4][:d]
    second = integrated(
        ES(n=n),
        lambda *x: sum(s * v for s, v in zip(slope, x, strict=True)),
        [0.2, 0.1][:d],
        eps=0.5,
        nodes=3,
        of=lambda g, _: float(g @ g),
    )
    assert second == pytest.approx((d + n) / (n - 1) * sum(s * s for s in slope), rel=1e-11)


def test_curvature_adds_to_the_variance_of_the_coefficients():
    """E of the losses' sample variance over eps^2 is |grad|^2 + eps^2 |H|_F^2 / 2: what one-sided probes pay."""
    eps, grad2 = 0.6, 0.86**2 + (-0.82) ** 2
    hessian2 = 1.2**2 + 2 * 0.4**2 + 0.8**2
    spread = integrated(
        ES(n=2), _quadratic, [0.3, 0.5], eps=eps, of=lambda g, estimate: estimate.info["spread"] ** 2 / eps**2
    )
    assert spread == pytest.approx(grad2 + eps**2 * hessian2 / 2, rel=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Laws, by drawing


def _draws(count, n, d, **options):
    b = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b /= b.norm()
    weights = {"w": torch.zeros(d, dtype=torch.float64)}
    method = ES(n=n, **options)
    # exact normals: the laws below are those of independent Gaussians
    made = [
        estimate_of(method, weights, lambda w: b @ w["w"], step=s, eps=0.1, kind="gaussian")[0] for s in range(count)
    ]
    return torch.stack(made), b, d


def _near(values, expected):
    """Within 5 standard errors of the sample."""
    values = np.asarray(values)
    return abs(values.mean() - expected) < 5 * values.std() / sqrt(len(values))


def _check_alignment(count, n, d=30):
    """cos^2 is Beta((n-1)/2, (d-1)/2): mean and second moment; and E g = grad, E|g|^2 = (d + n)/(n - 1)."""
    made, b, _ = _draws(count, n, d)
    along, squares = (made @ b).numpy(), made.square().sum(dim=1).numpy()
    cos2 = along**2 / squares
    a, total = (n - 1) / 2, (n - 1) / 2 + (d - 1) / 2
    assert _near(along, 1.0)
    assert _near(squares, (d + n) / (n - 1))
    assert _near(cos2, a / total)  # (n - 1) / (n + d - 2): d cos^2 -> n - 1
    assert _near(cos2**2, a * (a + 1) / (total * (total + 1)))


@pytest.mark.parametrize("n", [2, 5])
def test_alignment_with_the_gradient(n):
    _check_alignment(500, n)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [2, 5, 16])
def test_alignment_with_the_gradient_of_many_draws(n):
    _check_alignment(12_000 // n, n)


def test_ranked_estimate_is_a_normalised_gradient():
    """E g = grad / (2 sqrt(pi) |grad|) for any n: E[rank_i | y_i] = (n - 1) Phi(y_i), and E[Phi(y) y] = 1/(2 sqrt(pi))."""
    made, b, _ = _draws(700, 4, 5, shaping="centered_ranks")
    assert _near((made @ b).numpy(), 1 / (2 * sqrt(pi)))


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def test_centred_ranks():
    assert centred_ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [0.5, -0.5, 0.0]
    assert centred_ranks(torch.tensor([1.0, 1.0, 2.0, 2.0])).tolist() == pytest.approx([-1 / 3, -1 / 3, 1 / 3, 1 / 3])
    assert centred_ranks(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0, 0.0, 0.0]


def test_losses_that_are_no_numbers_rank_worst():
    nan, inf = float("nan"), float("inf")
    assert centred_ranks(torch.tensor([nan, 1.0, 0.0])).tolist() == [0.5, -0.5 + 0.5, -0.5]
    assert centred_ranks(torch.tensor([inf, 1.0, nan])).tolist() == [0.25, -0.5, 0.25]


def test_ranked_step_with_a_loss_that_is_no_number():
    """It goes into the ranks and not into the logged loss; with none left that is finite, the step is refused."""
    z = [[1.0], [2.0], [-1.0]]
    _, some = estimate_of_losses([float("nan"), 1.0, 3.0], z, shaping="centered_ranks")
    assert some.is_finite()
    assert float(some.loss) == 2.0
    _, none = estimate_of_losses([float("nan")] * 3, z, shaping="centered_ranks")
    assert not none.is_finite()
    _, compared = estimate_of_losses([float("nan"), 1.0, 3.0], z)
    assert not compared.is_finite()


def test_only_the_order_of_losses_enters_ranks():
    z = [[1.0, 2.0], [2.0, -1.0], [-1.0, 0.0]]
    one, _ = estimate_of_losses([0.1, 0.2, 0.3], z, shaping="centered_ranks")
    other, _ = estimate_of_losses([-5.0, 7.0, 1e6], z, shaping="centered_ranks", eps=0.01)
    assert torch.equal(one, other)


# ----------------------------------------------------------------------------------------------------------------------
# Steps and the method as a type


@pytest.mark.parametrize(
    ("n", "lr", "options"),
    [(5, 0.01, {}), (2, 0.005, {}), (5, 0.01, {"baseline": "mean"}), (6, 0.01, {"shaping": "centered_ranks"})],
)
def test_equals_the_readable_twin(n, lr, options):
    check_equals_the_readable_twin(n, lr=lr, **options)


def test_logged_loss_is_the_mean_of_the_probes():
    named, closure, _ = quadratic()
    asked = []
    opt = ZO(named, "es", lr=0.0, eps=0.5, engine="in_place")
    logged = opt.step(lambda: asked.append(float(closure())) or asked[-1])
    assert float(logged) == pytest.approx(sum(asked[-5:]) / 5, rel=1e-15)  # five additions of fp64


def test_directions_of_a_step_differ():
    named, closure, _ = quadratic()
    opt = ZO(named, "es", lr=0.0, eps=0.5, seed=SEED)
    opt.step(closure)
    losses = sorted(opt.last.losses)
    assert all(one < other for one, other in pairwise(losses))


def test_directions_come_from_the_source():
    """n = 2: g is a multiple of z_1 - z_2, and signs differ by -2, 0 or 2."""
    named, closure, _ = quadratic()
    opt = ZO(named, "es", lr=0.1, eps=0.5, method_options={"n": 2, "source": "rademacher"})
    before = torch.cat([p.detach().clone() for _, p in named])
    opt.step(closure)
    moved = torch.cat([p.detach() for _, p in named]) - before
    sizes = moved.abs() / moved.abs().max()
    assert float(torch.minimum(sizes, 1 - sizes).max()) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1},
        {"baseline": "none"},
        {"shaping": "zscore"},
        {"source": "nowhere"},
        {"shaping": "centered_ranks", "baseline": "mean"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError):
        ES(**options)


@pytest.mark.parametrize("n", [2, 5])
def test_forwards_declared(n):
    method = ES(n=n)
    _, _, ctx = estimate_of(method, scalars([1.0, 2.0]), lambda w: w["x0"] * w["x1"])
    assert ctx.queries == method.forwards == n
    assert method.extra_bytes(ctx.sites) == 0
