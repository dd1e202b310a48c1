"""PIZO is the estimator of its paper; constants of the linear regime; special cases that are other methods."""

import math

import pytest
import torch
from tests.checks.mezo import SEED, quadratic, twin_model
from tests.checks.pizo import (
    MOMENTS,
    check_equals_the_readable_twin,
    check_every_tensor_is_ranked,
    check_logged_loss_is_the_mean_of_the_pair,
    check_moments,
    check_nan_never_wins,
    check_pool_of_two_is_mezo_with_another_eps_and_lr,
    check_the_pool_is_what_v_is_made_of,
    linear,
    made,
    projections,
)
from tests.support.bare import bare_context, estimate_of, flat, realised
from tests.support.models import CASES

from zotune.core.direction import Scaled
from zotune.errors import ConfigError
from zotune.methods.mezo import MeZO
from zotune.methods.pizo import Pizo, elite_size, ranked
from zotune.methods.sources import SOURCES
from zotune.optim.optimizer import ZO

VARIANTS = ("guiding", "greedy")


@pytest.mark.parametrize(
    ("variant", "pool", "alpha"),
    [("guiding", 4, 0.5), ("guiding", 5, 0.5), ("guiding", 6, 0.34), ("greedy", 1, 0.5), ("greedy", 5, 0.5)],
)
def test_equals_the_readable_twin(variant, pool, alpha):
    check_equals_the_readable_twin(variant, pool, alpha)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_equals_the_readable_twin_with_other_noise(noise):
    check_equals_the_readable_twin(noise=noise, steps=5)


def test_pool_of_two_is_mezo_with_another_eps_and_lr():
    check_pool_of_two_is_mezo_with_another_eps_and_lr()


def test_a_pool_of_two_warns_with_the_identity():
    with pytest.warns(UserWarning, match=r"exactly MeZO with sqrt\(2\) \* eps and 2 \* lr"):
        Pizo(pool=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pool_is_what_v_is_made_of(variant):
    check_the_pool_is_what_v_is_made_of(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logged_loss_is_the_mean_of_the_pair(variant):
    check_logged_loss_is_the_mean_of_the_pair(variant)


def test_nan_never_wins():
    check_nan_never_wins()


# ----------------------------------------------------------------------------------------------------------------------
# Constants of the linear regime


@pytest.mark.parametrize(("variant", "pool"), [("guiding", 4), ("guiding", 3), ("greedy", 4), ("greedy", 5)])
def test_moments(variant, pool):
    check_moments(variant, pool)


@pytest.mark.statistical
@pytest.mark.parametrize(("variant", "pool"), MOMENTS)
def test_moments_closely(variant, pool):
    """The default's -1.3265 within 0.015; the others with fewer draws."""
    check_moments(variant, pool, count=40_000 if (variant, pool) == ("guiding", 4) else 4_000, d=200)


@pytest.mark.parametrize("pool", [2, 3, 4, 8, 16])
def test_the_table_of_moments_agrees_with_order_statistics(pool):
    """Straight from sorted normals: 4e5 samples, 0.006 is more than three standard errors of the largest variance."""
    z = torch.randn(400_000, pool, dtype=torch.float64).sort(dim=1).values
    s = pool // 2
    y = z[:, :s].mean(dim=1) - z[:, s:].mean(dim=1)
    assert float(y.mean()) == pytest.approx(MOMENTS["guiding", pool][0], abs=0.006)
    assert float(y.square().mean()) == pytest.approx(MOMENTS["guiding", pool][1], abs=0.02)


def test_every_tensor_is_ranked():
    check_every_tensor_is_ranked()


def test_tensors_of_one_shape_have_noise_of_their_own():
    """400 steps of two tensors of 50: the correlation of v between them is 0 +- 5 / sqrt(400 * 50)."""
    weights, g = linear((5, 10), (5, 10))
    products = []
    for step in range(400):
        asked = []
        made().estimate(
            bare_context(
                weights, lambda w: (w["block0.weight"] * g["block0.weight"]).sum(), step=step, eps=1.0, asked=asked
            )
        )
        v = realised(asked[4], weights)
        products.append(float((v["block0.weight"] * v["block1.weight"]).mean()))
    assert abs(sum(products) / len(products)) < 5 / math.sqrt(400 * 50)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("variant", "pool", "expected"), [("guiding", 4, 2.10), ("guiding", 8, 4.55), ("greedy", 4, 1.55)]
)
def test_alignment(variant, pool, expected):
    """d E cos^2(v, g) at d = 1000: five standard errors of 2500 draws, and 1 % for terms of order 1/d and digits."""
    weights, g = linear((20, 40), (200,))
    rows = projections(2500, g, weights, variant=variant, pool=pool)
    cosine = 1000 * rows[:, 0].square() / rows[:, 1]
    assert abs(float(cosine.mean()) - expected) < 5 * float(cosine.std()) / math.sqrt(2500) + 0.01 * expected


# ----------------------------------------------------------------------------------------------------------------------
# What does not matter


def _weights():
    named, loss = twin_model()
    return {name: p.detach() for name, p in named}, loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_ranks_of_the_pool_matter(variant):
    """The pool's losses through an increasing map, the pair's as they are: the same estimate, bit for bit."""
    weights, loss = _weights()
    results = []
    for change in (lambda x: x, lambda x: math.exp(3 * x) - 7):
        count = iter(range(6))

        def answer(w, change=change, count=count):
            return change(loss(w)) if next(count) < 4 else loss(w)

        results.append(estimate_of(made(variant=variant, reuse=False), weights, answer, eps=0.1)[0])
    assert torch.equal(*results)


def test_the_sign_of_v_does_not_matter():
    """Ranking from worst to best gives -v for half and half: the same estimate to the bit, since only signs change."""
    weights, loss = _weights()
    count = iter(range(6))
    right = estimate_of(made(), weights, loss, eps=0.1)[0]
    turned = estimate_of(made(), weights, lambda w: (-1 if next(count) < 4 else 1) * loss(w), eps=0.1)[0]
    assert torch.equal(right, turned)


def test_an_offset_and_a_scale_of_the_loss():
    """L + 8 changes nothing but rounding (of 8, over eps: 1e-14); 4 L gives 4 times the estimate, exactly."""
    weights, loss = _weights()
    plain = estimate_of(made(), weights, loss, eps=0.1)[0]
    assert torch.allclose(estimate_of(made(), weights, lambda w: loss(w) + 8, eps=0.1)[0], plain, rtol=1e-9, atol=1e-12)
    assert torch.equal(estimate_of(made(), weights, lambda w: 4 * loss(w), eps=0.1)[0], 4 * plain)


# ----------------------------------------------------------------------------------------------------------------------
# Other methods as special cases; budgets


def test_greedy_with_a_pool_of_one_is_mezo_bit_for_bit():
    ends = []
    for method in (MeZO(), Pizo(variant="greedy", pool=1), Pizo(variant="greedy", pool=1, reuse=False)):
        torch.manual_seed(0)
        case = CASES["mlp"](torch.float32)
        opt = ZO(case.named, method=method, lr=1e-2, eps=1e-2, seed=SEED)
        losses = [float(opt.step(case.closure)) for _ in range(5)]
        ends.append((losses, [p.detach().clone() for _, p in case.named]))
    for losses, tensors in ends[1:]:
        assert losses == ends[0][0]
        assert all(torch.equal(a, b) for a, b in zip(tensors, ends[0][1], strict=True))


def test_reuse_asks_one_less_and_changes_nothing():
    weights, loss = _weights()
    with_it, _, ctx = estimate_of(made(variant="greedy"), weights, loss, eps=0.1)
    without, _, long = estimate_of(made(variant="greedy", reuse=False), weights, loss, eps=0.1)
    assert torch.equal(with_it, without)
    assert (ctx.queries, long.queries) == (5, 6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 6), ({"pool": 8}, 10), ({"variant": "greedy"}, 5), ({"variant": "greedy", "reuse": False}, 6)],
)
def test_forwards(options, expected):
    weights, loss = _weights()
    method = made(**options)
    _, _, ctx = estimate_of(method, weights, loss)
    assert method.forwards == ctx.queries == expected


@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
def test_lr_zero_leaves_the_bits(engine):
    case = CASES["mlp"](torch.float32)
    before = [p.detach().clone() for _, p in case.named]
    opt = ZO(case.named, method="pizo", lr=0.0, eps=1e-2, engine=engine)
    for _ in range(3):
        opt.step(case.closure)
    assert all(torch.equal(a, p.detach()) for a, (_, p) in zip(before, case.named, strict=True))


def test_eps_of_a_group_scales_v():
    """Group 2 with 4 eps: on a quadratic rho is the slope along the scaled v, exactly but for rounding of losses over eps."""
    named, closure, gradient = quadratic()
    groups = [{"params": named[:1]}, {"params": named[1:], "eps": 0.4}]
    opt = ZO(groups, method="pizo", lr=0.0, eps=0.1, seed=SEED)
    opt.step(closure)
    assert all(isinstance(inner, Scaled) and inner.factors["second.bias"] == 4 for _, inner in _terms(opt))
    g = torch.cat([opt.last.estimate.direction.realise(s.site, torch.float64) for s in opt.weights])
    rho = opt.last.estimate.info["rho"]
    assert float(g @ gradient) == pytest.approx(rho**2, rel=1e-9)


def _terms(opt):
    return opt.last.estimate.direction.terms


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_makes_the_pool(source):
    """The pool comes from the source's draws: SubZero-GV is source="subzero"."""
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float64)
    options = {"source": source, "source_options": {"subzero": {"rank": 2}}.get(source, {})}
    opt = ZO(case.named, method="pizo", method_options=options, lr=1e-3, eps=1e-2)
    for _ in range(3):
        opt.step(case.closure)
    assert opt.refused == 0
    assert opt.forwards == 18


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "best"}, "variant must be one of guiding, greedy"),
        ({"pool": 1}, "pool must be at least 2"),
        ({"variant": "greedy", "pool": 0}, "pool must be at least 1"),
        ({"alpha": 0.25, "pool": 3}, r"alpha must be at least 1/pool = 0\.3333 and below 1; got 0\.25"),
        ({"alpha": 1.0}, "alpha must be at least"),
        ({"alpha": 0.0}, "alpha must be at least"),
        ({"source": "gausian"}, "Did you mean 'gaussian'"),
        ({"source_options": {"x": 1}}, "no option 'x'"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ConfigError, match=said):
        Pizo(**options)


def test_alpha_below_one_that_is_nearly_one():
    with pytest.raises(ConfigError, match="neither it nor the rest may be empty"):
        Pizo(alpha=1 - 1e-16 * 2, pool=16)


@pytest.mark.parametrize(
    ("alpha", "pool", "s"), [(0.5, 5, 2), (0.29, 100, 29), (0.34, 3, 1), (1 / 3, 3, 1), (0.99, 3, 2)]
)
def test_elite_size_is_the_floor(alpha, pool, s):
    assert elite_size(alpha, pool) == s


def test_ranks():
    inf, nan = math.inf, math.nan
    assert ranked(torch.tensor([2.0, nan, 1.0, inf, -inf, 1.0])) == [2, 5, 0, 1, 3, 4]


def test_v_is_the_probed_direction():
    """The estimate is rho times what was probed."""
    weights, loss = _weights()
    asked = []
    g, estimate, _ = estimate_of(made(), weights, loss, eps=0.5, asked=asked)
    v = flat(realised(asked[4], weights)) / 0.5
    assert torch.allclose(g, estimate.info["rho"] * v, rtol=1e-14, atol=1e-14)
