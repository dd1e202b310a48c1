"""SubZero is the estimator of its paper: its properties with their exact constants."""

import math

import pytest
import torch
from tests.checks import subzero as checks
from tests.checks.mezo import SEED, twin_model
from tests.checks.subzero import draw_at, weights
from tests.support.bare import bare_context, estimate_of, flat, realised

from zotune.core.low_rank import as_matrix
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.sources import make_source
from zotune.methods.subzero import Subspace, SubZero
from zotune.optim.optimizer import ZO


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_directions_lie_between_orthonormal_bases(rank):
    checks.check_directions_lie_between_orthonormal_bases(rank)


@pytest.mark.parametrize("rank", [1, 8, 17])
def test_direction_is_the_core_on_the_scale_of_plain_noise(rank):
    checks.check_direction_is_the_core_on_the_scale_of_plain_noise(rank)


def test_large_bases_are_orthonormal():
    """fp32 numbers on their grid: each product of two columns of 4000 is off by at most about 2**-22."""
    _, bases = draw_at(Subspace(rank=64), weights(big=(4000, 700)))
    for side in bases["big"]:
        assert (side.T @ side - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-6


def test_tensors_of_equal_shape_have_their_own_noise():
    checks.check_tensors_of_equal_shape_have_their_own_noise()


def test_everything_else_gets_plain_noise():
    checks.check_everything_else_gets_plain_noise()


def test_bases_change_at_multiples_of_the_interval():
    checks.check_bases_change_at_multiples_of_the_interval()


def test_parts_have_the_bits_of_the_whole():
    checks.check_parts_have_the_bits_of_the_whole()


def test_reshape_round_trip():
    checks.check_reshape_round_trip()


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({"rank": 8}, (8, 2048), (128, 128)),  # the shapes that the released code's rule gives
        ({"rank": 8}, (8, 5120), (160, 256)),
        ({"rank": 8}, (10, 2048), (128, 160)),
        ({"rank": 8}, (64, 2048), (256, 512)),
        ({"rank": 8}, (65, 2048), (65, 2048)),
        ({"rank": 8}, (49152, 576), (49152, 576)),
        ({"rank": 8, "reshape": "never"}, (8, 2048), (8, 2048)),
        ({"rank": 8, "reshape": "always"}, (576, 1536), (864, 1024)),
        ({"rank": 2}, (1, 2048), None),
        ({"rank": 2}, (4, 1, 30), (10, 12)),
        ({"rank": 2}, (4, 5, 30), None),
    ],
)
def test_shapes_in_which_tensors_count_as_matrices(options, shape, expected):
    assert Subspace(**options).shape_of(Site("w", shape)) == expected


@pytest.mark.parametrize(
    "settings",
    [{}, {"n": 3}, {"sides": 1}, {"n": 2, "sides": 1}, {"noise": "gaussian"}, {"noise": "rademacher"}],
    ids=str,
)
def test_equals_the_readable_twin(settings):
    checks.check_equals_the_readable_twin(**settings)


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_resume_inside_an_interval(tmp_path, stop):
    checks.check_resume_inside_an_interval(tmp_path / "state.pt", stop)


# ----------------------------------------------------------------------------------------------------------------------
# Moments


def linear(shape=(6, 5), seed=2):
    """A linear loss of one matrix and one bias, whose gradient is known."""
    generator = torch.Generator().manual_seed(seed)
    slopes = {
        "w": torch.randn(shape, dtype=torch.float64, generator=generator),
        "bias": torch.randn(4, dtype=torch.float64, generator=generator),
    }
    here = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
    return here, (lambda w: sum(float((slopes[name] * w[name]).sum()) for name in w)), slopes


def within(samples, expected, sigmas=5.0):
    """The mean of independent samples (first dimension) is the expected one; 5 standard errors each, or rounding."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    worst = ((samples.mean(dim=0) - expected).abs() / (error + 1e-12)).max()
    assert worst < sigmas, f"{float(worst):.1f} standard errors off"


def estimates(count, interval, rank=2, reshape="never", **options):
    here, loss, slopes = linear()
    method = SubZero(rank=rank, interval=interval, reshape=reshape, **options)
    made = [estimate_of(method, here, loss, step=step, seed=SEED)[0] for step in range(count)]
    return torch.stack(made), slopes, method


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"sides": 1}, {"reshape": "always"}])
def test_mean_over_new_bases_is_the_gradient(options):
    """C10: E over U, V and Z of rho Zt is the gradient."""
    made, slopes, _ = estimates(1000, interval=1, **options)
    within(made, flat(slopes))


@pytest.mark.statistical
def test_mean_over_many_new_bases_is_the_gradient():
    made, slopes, _ = estimates(12000, interval=1)
    within(made, flat(slopes))


def test_mean_inside_an_interval_is_the_scaled_projection():
    """E[rho Zt] = mn/r^2 U U^T G V V^T: biased while the bases are kept."""
    made, slopes, method = estimates(1500, interval=10**6)
    u, v = (side.double() for side in method.source._frames.pairs["w"])
    projected = 30 / 4 * u @ u.T @ slopes["w"] @ v @ v.T
    within(made[:, :30], projected.flatten())
    within(made[:, 30:], slopes["bias"])
    assert (projected - slopes["w"]).norm() > 0.5 * slopes["w"].norm()  # else the test above would say the same


def test_second_moment_inside_an_interval():
    """E|rho Zt|^2 = mu^4 (r^2 + 2) |U^T G V|^2 for one matrix, mu^2 = mn/r^2."""
    here, _, slopes = linear()
    here, slope = {"w": here["w"]}, slopes["w"]
    method = SubZero(rank=2, interval=10**6, reshape="never")
    squares = torch.stack(
        [
            estimate_of(method, here, lambda w: float((slope * w["w"]).sum()), step=step)[0].square().sum()
            for step in range(2000)
        ]
    )
    u, v = (side.double() for side in method.source._frames.pairs["w"])
    within(squares, (30 / 4) ** 2 * 6 * (u.T @ slope @ v).square().sum())


def test_squared_length_is_the_number_of_elements():
    """C10: E|Zt|^2 = mn; |Zt|^2 is mn/r^2 times a chi-squared of r^2 degrees."""
    tensors, source = weights(a=(24, 17)), Subspace(rank=3)
    squares = torch.stack([draw_at(source, tensors, step)[0]["a"].square().sum() for step in range(600)])
    within(squares, torch.tensor(24.0 * 17.0, dtype=torch.float64))


def test_square_full_rank_is_plain_noise_in_law():
    """C11: r = m = n: mu = 1 and U Z V^T has independent standard normal elements. Means, (co)variances, fourth moments."""
    tensors, source = weights(a=(3, 3)), Subspace(rank=3, interval=1, reshape="never")
    z = torch.stack([draw_at(source, tensors, step)[0]["a"].flatten() for step in range(2000)])
    within(z, torch.zeros(9, dtype=torch.float64))
    within((z[:, :, None] * z[:, None, :]).flatten(1), torch.eye(9, dtype=torch.float64).flatten())
    within(z**4, torch.full((9,), 3.0, dtype=torch.float64))


def test_updates_of_an_interval_have_rank_r_in_all():
    """The sum of the steps of an interval lies between its bases, so it could be stored as r x r numbers."""
    named, loss = twin_model()
    start = dict(named)["inner.weight"].detach().clone()
    opt = ZO(named, "subzero", lr=0.05, eps=1e-2, method_options={"rank": 2, "interval": 12, "reshape": "never"})
    for _ in range(12):
        opt.step(lambda: loss(dict(named)))
    u, v = (side.double() for side in opt.method.source._frames.pairs["inner.weight"])
    moved = dict(named)["inner.weight"].detach() - start
    assert (u @ (u.T @ moved @ v) @ v.T - moved).norm() < 1e-5 * moved.norm()
    opt.step(lambda: loss(dict(named)))  # the next interval leaves it
    moved = dict(named)["inner.weight"].detach() - start
    assert (u @ (u.T @ moved @ v) @ v.T - moved).norm() > 1e-2 * moved.norm()


def test_slope_on_a_quadratic_is_exact_and_two_sides_share_the_direction():
    """rho = G . Zt for any eps on a quadratic: losses of about 10, rounding 10 * 2**-52 / eps."""
    asked = []
    here = {"w": torch.randn(6, 5, dtype=torch.float64)}

    def loss(w):
        return float((w["w"] ** 2).sum() / 2)

    made, estimate, ctx = estimate_of(SubZero(rank=2), here, loss, eps=0.3, asked=asked)
    ((coefficient, _), *_) = estimate.direction.terms
    z = flat(realised(asked[0], here)) / 0.3
    assert estimate.info["rho"] == pytest.approx(float(z @ here["w"].flatten()), rel=1e-9)
    assert torch.allclose(made, float(coefficient) * z, rtol=1e-12)
    assert torch.equal(flat(realised(asked[0], here)), -flat(realised(asked[1], here)))
    assert float(estimate.loss) == pytest.approx(sum(ctx.losses) / 2, rel=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# As a type


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"interval": 0}, {"reshape": "sometimes"}, {"n": 0}, {"sides": 3}], ids=str
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="subzero"):
        SubZero(**options)
    if not options.keys() & {"n", "sides"}:
        with pytest.raises(ConfigError, match="subzero"):
            make_source("subzero", options)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_rank_above_the_smaller_side_is_refused_before_any_loss(sides):
    def never(w):
        raise AssertionError("a loss was asked for")

    tensors = weights(ok=(40, 40), small=(24, 7))
    with pytest.raises(ConfigError, match=r"between 1 and 7 for the tensor 'small' of shape 24 x 7 .*got 8"):
        SubZero(rank=8, reshape="never", sides=sides).estimate(bare_context(tensors, never))
    with pytest.raises(ConfigError, match=r"between 1 and 12 .* seen as 12 x 14,.*got 13"):
        SubZero(rank=13, sides=sides).estimate(bare_context(tensors, never))
    with pytest.raises(ConfigError, match="'small'"):
        SubZero(rank=13).extra_bytes([Site("small", (24, 7))])
    SubZero(rank=12).estimate(bare_context(tensors, lambda w: 0.0))


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 2), ({"n": 3}, 6), ({"sides": 1}, 2), ({"n": 3, "sides": 1}, 4)]
)
def test_forwards_and_bytes_are_as_declared(options, expected):
    tensors, method = weights(), SubZero(rank=3, **options)
    _, _, ctx = estimate_of(method, tensors, lambda w: 1.0)
    assert ctx.queries == method.forwards == expected
    kept = sum(side.nbytes for sides in method.source._frames.pairs.values() for side in sides)
    assert kept == method.extra_bytes(ctx.sites)


def test_one_source_serves_other_runs_and_other_tensors():
    """The cache notices another seed and other shapes under the same name."""
    source = Subspace(rank=2)
    first = draw_at(source, weights(a=(20, 18)))[0]["a"]
    other = draw_at(source, weights(a=(20, 18)), seed=SEED + 1)[0]["a"]
    assert not torch.equal(first, other)
    assert draw_at(source, weights(a=(19, 18)))[0]["a"].shape == (19, 18)
    assert torch.equal(draw_at(source, weights(a=(20, 18)))[0]["a"], first)


def test_order_and_freezing_leave_the_other_draws_alone():
    source, tensors = Subspace(rank=2), weights()
    made, _ = draw_at(source, tensors)
    for names in (["bias", "b", "a"], ["b", "bias"]):
        again, _ = draw_at(source, {name: tensors[name] for name in names})
        assert all(torch.equal(again[name], made[name]) for name in names)


def test_eps_of_a_group_scales_matrices_and_vectors_once():
    tensors = weights()
    ctx = bare_context(tensors, lambda w: 0.0)
    plain = realised(Subspace(rank=2).draw(ctx), tensors)
    ctx = bare_context(tensors, lambda w: 0.0)
    ctx._factors = {"a": 3.0, "b": 1.0, "bias": 5.0}
    scaled = realised(Subspace(rank=2).draw(ctx), tensors)
    for name, factor in ctx._factors.items():
        assert torch.allclose(scaled[name], factor * plain[name], rtol=1e-15)  # one product of fp64


def test_numbers_that_are_not_finite_are_handed_on():
    ctx = bare_context(weights(), lambda w: math.nan)
    assert not SubZero(rank=2).estimate(ctx).is_finite()


def test_as_matrix_of_a_prime_number_of_elements():
    assert as_matrix(Site("w", (7, 13)), square=True) == (7, 13)
    assert as_matrix(Site("w", (2, 13)), square=True) == (2, 13)
