"""LDSD: the corrected policy gradient, its constants, the forms of the mean, special cases that are other methods."""

import copy
import math
import warnings

import pytest
import torch
from tests.checks.ldsd import (
    Ones,
    check_cosine_law,
    check_equals_the_readable_twin,
    check_logged_loss_is_the_mean_of_the_pair,
    check_nan_never_wins,
    check_noise_is_the_same_everywhere,
    check_other_tensors_are_left_alone,
    check_policy_gradient_is_unbiased,
    check_small_moves_are_not_lost,
    check_tensors_learn_apart,
    check_weights_move_along_the_mean_that_was_probed,
    frozen_gradient,
    law,
    mean_of,
    placed_mean,
    slope_of_learning,
)
from tests.checks.mezo import SEED, twin_model
from tests.support.bare import bare_context, estimate_of, flat, realised
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.core.direction import Noise
from zotune.core.ledger import read_ledger
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.ldsd import LDSD, leave_one_out
from zotune.methods.mezo import MeZO
from zotune.methods.pizo import Pizo
from zotune.methods.policy_mean import BLOCK, FORMS
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 2, "reuse": False},
        {"sigma": 0.7, "decay": 0.1, "normalise": True},
        {"variant": "released"},
        {"ratio": 0.5, "decay": 0.1},
        {"ratio": 0.25, "normalise": True},
        {"noise": "gaussian"},
        {"noise": "rademacher"},
    ],
)
def test_equals_the_readable_twin(options):
    check_equals_the_readable_twin(**options)


def test_weights_move_along_the_mean_that_was_probed():
    check_weights_move_along_the_mean_that_was_probed()


def test_noise_is_the_same_everywhere():
    check_noise_is_the_same_everywhere()


def test_logged_loss_is_the_mean_of_the_pair():
    check_logged_loss_is_the_mean_of_the_pair()


def test_nan_never_wins():
    check_nan_never_wins()


def test_other_tensors_are_left_alone():
    check_other_tensors_are_left_alone()


# ----------------------------------------------------------------------------------------------------------------------
# The policy gradient


@pytest.mark.parametrize("planted", [True, False])
def test_policy_gradient_is_unbiased(planted):
    check_policy_gradient_is_unbiased(planted=planted)


@pytest.mark.statistical
def test_policy_gradient_is_unbiased_closely():
    """Slope 1.00: five standard errors are 0.03. The whole vector: its noise is 12 coordinates'."""
    mean, expected = check_policy_gradient_is_unbiased(count=15_000, tolerance=0.031)
    assert float((mean - expected).norm() / expected.norm()) < 0.06


def _lesson(loss, weights, mu=None, **options):
    """What one step teaches the mean, as a vector."""
    method = LDSD(**{"lr_mu": 1.0, **options})
    estimate_of(method, weights, loss, seed=SEED, eps=0.25)
    return flat(mean_of(method, weights))


def _linear(d=40):
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(d, dtype=torch.float64, generator=generator)
    return {"a.weight": torch.zeros(d, dtype=torch.float64)}, g, lambda w: float(g @ w["a.weight"])


def test_invariances_of_the_lesson():
    """An offset of the loss changes nothing (but rounding of 7), a scale scales; on a linear loss sigma does not matter."""
    weights, _, loss = _linear()
    plain = _lesson(loss, weights)
    assert torch.allclose(_lesson(lambda w: loss(w) + 7, weights), plain, rtol=1e-12, atol=1e-13)
    assert torch.equal(_lesson(lambda w: 4 * loss(w), weights), 4 * plain)
    assert torch.allclose(_lesson(loss, weights, sigma=0.3), plain, rtol=1e-12)


@pytest.mark.parametrize("k", [2, 5])
def test_size_of_the_lesson(k):
    """Linear loss: E|g_mu|^2 = eps^2 |grad|^2 ((d + 1)/(K - 1) + 1); five standard errors of the sample."""
    weights, g, loss = _linear()
    sizes = []
    for step in range(300):
        method = LDSD(k=k, lr_mu=1.0)
        estimate_of(method, weights, loss, step=step, seed=SEED, eps=0.25)
        sizes.append(float(flat(mean_of(method, weights)).square().sum() / (0.0625 * g @ g)))
    sizes = torch.tensor(sizes)
    assert abs(float(sizes.mean()) - (41 / (k - 1) + 1)) < 5 * float(sizes.std()) / math.sqrt(300)


def test_coefficients_leave_one_out():
    f = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64)
    # halves and quarters: exact but for a last bit of about 3
    assert leave_one_out(f) == pytest.approx([1 - 3.25, 4 - 1.75, 2.5 - 2.5], abs=1e-15)
    assert sum(leave_one_out(f)) == pytest.approx(0, abs=1e-15)
    assert leave_one_out(torch.tensor([1.0, math.nan, 3.0])) == [-2.0, 0.0, 2.0]
    assert leave_one_out(torch.tensor([1.0, math.inf, math.nan])) == [0.0, 0.0, 0.0]


def test_the_released_lesson_is_nothing():
    """E of mu's step is 0, within five standard errors of 150 steps (variance 1/(K-1)); the right one has slope 1."""
    assert abs(slope_of_learning(150, variant="released")) < 5 * math.sqrt(0.25 / 150)
    assert abs(slope_of_learning(150) - 1) < 5 * math.sqrt(0.5 / 150)


# ----------------------------------------------------------------------------------------------------------------------
# The cosine law


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", [1, 4])
def test_cosine_law(form, pieces):
    check_cosine_law(form=form, pieces=pieces)


@pytest.mark.parametrize("pieces", [1, 10])
def test_cosine_law_at_250_steps(pieces):
    """d = 1000, K = 5: 0.707 +- 0.02 (two standard deviations over seeds; the seed is fixed)."""
    assert frozen_gradient(250, 1000, pieces) == pytest.approx(0.707, abs=0.02)


@pytest.mark.statistical
@pytest.mark.parametrize("steps", [10, 50, 1000, 3000])
def test_cosine_law_at_more_steps(steps):
    """Over seeds cos has standard deviation below sqrt((1 - cos^2)/d): four of them, of five seeds' mean."""
    cosines = [frozen_gradient(steps, 1000, 1, seed=seed) for seed in range(5)]
    assert abs(sum(cosines) / 5 - law(steps)) < 4 * math.sqrt((1 - law(steps) ** 2) / 1000 / 5) + 0.002


@pytest.mark.parametrize("options", [{"sigma": 0.5}, {"lr_mu": 1e-3}])
def test_the_law_knows_neither_sigma_nor_the_learning_rate(options):
    """Linear loss, given u: mu is scaled, or the same, so cos is; the rest is fp32 rounding of the mean."""
    assert frozen_gradient(50, 200, **options) == pytest.approx(frozen_gradient(50, 200), abs=1e-5)


def test_tensors_learn_apart():
    check_tensors_learn_apart()


def test_the_released_mean_stays_off():
    """A random walk: cos of +-sqrt(1/d), five of them; the right mean has 0.71 by then."""
    assert abs(frozen_gradient(100, 400, variant="released")) < 5 / math.sqrt(400)


# ----------------------------------------------------------------------------------------------------------------------
# The gain of a planted mean


def test_gain_of_a_planted_mean():
    """8.3: E (v.g)^2 = sigma^2 + (mu.g)^2 and E cos^2 = (sigma^2 + rho^2|mu|^2)/(sigma^2 d + |mu|^2), over all candidates.

    mu.g = 2 sigma, |mu|^2 = sigma^2 d / 4: five standard errors of 1000 draws, and 1 % for terms of order 1/d.
    """
    d, sigma = 400, 0.8
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(d, dtype=torch.float64, generator=generator)
    g /= g.norm()
    side = torch.randn(d, dtype=torch.float64, generator=generator)
    side -= (side @ g) * g
    mu = sigma * (2 * g + math.sqrt(d / 4 - 4) * side / side.norm())
    weights = {"a.weight": torch.zeros(d, dtype=torch.float64)}
    method = LDSD(sigma=sigma, lr_mu=1e-3)
    method.load_state_dict({"mean": {"form": "fp32", "tensors": {"a.weight": {"values": mu}}}})
    slopes, cosines = [], []
    for step in range(200):
        asked = []
        ctx = bare_context(weights, lambda w: float(g @ w["a.weight"]), step=step, seed=SEED, eps=1.0, asked=asked)
        method.estimate(ctx)  # not observed: the mean stays as planted
        for point in asked[:5]:
            v = flat(realised(point, weights))
            slopes.append(float(v @ g) ** 2)
            cosines.append(float(v @ g) ** 2 / float(v @ v))
    for sample, expected in [
        (torch.tensor(slopes), 5 * sigma**2),
        (torch.tensor(cosines), 5 * sigma**2 / (sigma**2 * d * 1.25)),
    ]:
        assert abs(float(sample.mean()) - expected) < 5 * float(sample.std()) / math.sqrt(1000) + 0.01 * expected


# ----------------------------------------------------------------------------------------------------------------------
# Other methods as special cases; budgets


def _run(method, steps=5, **settings):
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = ZO(case.named, method=method, lr=1e-2, eps=1e-2, seed=SEED, **settings)
    losses = [float(opt.step(case.closure)) for _ in range(steps)]
    return losses, snapshot(case), opt


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LDSD(k=1, lr_mu=0.0), MeZO()),
        (LDSD(k=1, lr_mu=0.0, reuse=False), MeZO()),
        (LDSD(k=5, lr_mu=0.0), Pizo(variant="greedy", pool=5)),
    ],
)
def test_without_a_mean_it_is_mezo_or_greedy_bit_for_bit(one, other):
    losses, bits, opt = _run(one)
    expected, other_bits, _ = _run(other)
    assert losses[1 if not one.reuse else 0 :] == expected[1 if not one.reuse else 0 :]
    assert_same_bits(bits, other_bits)
    assert opt.method.state_dict() == {}
    assert opt.method.extra_bytes([slot.site for slot in opt.weights]) == 0


def test_reuse_asks_one_less_and_changes_nothing():
    (one, bits, opt), (other, other_bits, long) = _run(LDSD(lr_mu=0.5)), _run(LDSD(lr_mu=0.5, reuse=False))
    assert one == other
    assert_same_bits(bits, other_bits)
    assert (opt.forwards, long.forwards) == (30, 35)
    assert (opt.method.forwards, long.method.forwards) == (6, 7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
def test_lr_zero_leaves_the_bits_and_the_mean_learns(form, engine):
    case = CASES["mlp"](torch.float32)
    before = snapshot(case)
    opt = ZO(case.named, method=LDSD(mean=form), lr=0.0, eps=1e-2, engine=engine)
    for _ in range(4):
        opt.step(case.closure)
    assert_same_bits(before, snapshot(case))
    opt.state_dict()
    assert all(bool(form.read(0, 1).abs() > 0) for form in opt.method._mu._kept.values())


@pytest.mark.parametrize("form", FORMS)
def test_extra_bytes_are_those_of_the_mean(form):
    _, _, opt = _run(LDSD(mean=form))
    sites = [slot.site for slot in opt.weights]
    kept = [t for parts in opt.method.state_dict()["mean"]["tensors"].values() for t in parts.values()]
    assert sum(t.nbytes for t in kept) == opt.method.extra_bytes(sites)
    share = opt.method.extra_bytes([Site("w", (1024, 64))]) / 65536
    assert share == {"fp32": 4, "bf16": 2, "int8": 1 + 4 / BLOCK}[form]


# ----------------------------------------------------------------------------------------------------------------------
# Saving, replay, refused steps


@pytest.mark.parametrize("options", [{}, {"mean": "bf16"}, {"mean": "int8", "decay": 0.01}, {"ratio": 0.3}])
def test_resume_from_any_step(options, tmp_path):
    """The mean of the saved run and of the whole run are equal bit for bit, and so are the weights."""

    def fresh():
        torch.manual_seed(0)
        case = CASES["mlp"](torch.float32)
        return case, ZO(case.named, method=LDSD(lr_mu=0.5, **options), lr=1e-2, eps=1e-2, seed=SEED)

    whole, opt = fresh()
    for _ in range(5):
        opt.step(whole.closure)
    for stop in range(5):
        case, first = fresh()
        for _ in range(stop):
            first.step(case.closure)
        torch.save([case.module.state_dict(), first.state_dict()], tmp_path / "state")
        weights, state = torch.load(tmp_path / "state", weights_only=True)
        case, resumed = fresh()
        case.module.load_state_dict(weights)
        resumed.load_state_dict(state)
        for _ in range(5 - stop):
            resumed.step(case.closure)
        assert_same_bits(snapshot(whole), snapshot(case))
        ends = [o.method.state_dict()["mean"]["tensors"] for o in (opt, resumed)]
        for name, parts in ends[0].items():
            assert all(torch.equal(tensor, ends[1][name][key]) for key, tensor in parts.items())


def test_a_loaded_state_is_a_copy():
    _, _, opt = _run(LDSD(lr_mu=0.5))
    state = opt.method.state_dict()
    kept, other = copy.deepcopy(state), LDSD(lr_mu=0.5)
    other.load_state_dict(state)
    case = CASES["mlp"](torch.float32)
    second = ZO(case.named, method=other, lr=1e-2, eps=1e-2)
    for _ in range(2):
        second.step(case.closure)
    other.state_dict()
    for name, parts in kept["mean"]["tensors"].items():
        assert torch.equal(parts["values"], state["mean"]["tensors"][name]["values"])


@pytest.mark.parametrize("options", [{}, {"mean": "int8", "normalise": True}, {"ratio": 0.3, "variant": "released"}])
def test_replay(options, tmp_path):
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = ZO(
        case.named,
        method="ldsd",
        method_options={"lr_mu": 0.5, **options},
        lr=1e-2,
        eps=1e-2,
        ledger=tmp_path / "ledger.jsonl",
    )
    for _ in range(5):
        opt.step(case.closure)
    torch.manual_seed(0)
    base, ledger = CASES["mlp"](torch.float32), read_ledger(tmp_path / "ledger.jsonl")
    replay(optimizer_for(base.named, ledger), ledger.entries)
    assert_same_bits(snapshot(case), snapshot(base))


def test_a_step_without_any_loss_is_skipped():
    """All NaN: the weights and the mean stay as they are."""
    named, loss = twin_model()
    opt = ZO(named, method=LDSD(lr_mu=0.5), lr=0.01, eps=1e-2, seed=SEED)
    for _ in range(2):
        opt.step(lambda: loss(dict(named)))
    weights = {name: p.detach().clone() for name, p in named}
    mean = mean_of(opt.method, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: math.nan)
    assert opt.refused == 1
    after = mean_of(opt.method, weights)
    for name, p in named:
        assert torch.equal(weights[name], p.detach())
        assert torch.equal(mean[name], after[name])


def test_a_query_that_is_not_taken_teaches_nothing():
    named, loss = twin_model()
    opt = ZO(named, method=LDSD(lr_mu=0.5), lr=0.01, eps=1e-2, seed=SEED)
    for _ in range(3):
        opt.query(lambda: loss(dict(named)))
    assert all(not bool(m.any()) for m in mean_of(opt.method, dict(named)).values())


# ----------------------------------------------------------------------------------------------------------------------
# How the mean is kept


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_the_mean_equal_the_whole(form):
    mean, site = placed_mean(form)
    mean.move(0.3 * Noise(stream(1)), 1.0, stream(2))
    whole = mean.realise(site)
    assert 0.2 < float(whole.std()) < 0.4  # 0.3 of a normal in thousands of numbers, +- 0.01
    assert torch.equal(whole.view(-1)[37:301], mean.realise(site.part(37, 264)))
    rows = torch.tensor([3, 69, 3, 0])
    assert torch.equal(whole[rows].view(-1), mean.realise(site.take(rows)))
    skewed = torch.zeros(5, 70).t()
    mean.add_to(skewed, site, 1.0)
    assert torch.equal(skewed, whole)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_small_moves_are_not_lost_on_the_mean(form):
    check_small_moves_are_not_lost(form)


def test_nearest_rounding_of_what_fits_is_exact():
    """bf16: numbers that fit are kept as they are, whatever the random bits."""
    mean, site = placed_mean("bf16")
    mean.move(0.5 * Ones(), 1.0, stream(2))
    assert torch.equal(mean.realise(site), torch.full((70, 5), 0.5))


@pytest.mark.parametrize("bits", [0, 32768, 65535])
def test_the_largest_of_an_int8_block_is_exact(bits):
    """Its multiple is 127 of 127, whatever the random bits: with 127 times a power of two nothing rounds."""
    values = torch.linspace(-1, 1, 2 * BLOCK)
    values[3], values[BLOCK + 7] = 127.0, -127 * 2.0**-5
    form = FORMS["int8"].zeros(2 * BLOCK, torch.empty(0))
    form.write(0, values, torch.full((2 * BLOCK,), bits))
    kept = form.read(0, 2 * BLOCK)
    assert [float(kept[3]), float(kept[BLOCK + 7])] == [127.0, -127 * 2.0**-5]


@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_a_move_of_the_full_mean_is_what_it_says(keep):
    """Powers of two and what the kernels add: exact."""
    mean, site = placed_mean("fp32")
    z = Noise(stream(1))
    mean.move(0.5 * z, 1.0, stream(2))
    mean.move(0.25 * z, keep, stream(3))
    assert torch.equal(mean.realise(site), (0.5 * keep + 0.25) * z.realise(site))


def test_a_mean_of_another_form_is_refused():
    _, _, opt = _run(LDSD(mean="bf16"))
    with pytest.raises(ConfigError, match="kept in 'bf16'"):
        LDSD(mean="int8").load_state_dict(opt.method.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 1}, r"k must be at least 2; got 1 .*with lr_mu=0, k=1 is MeZO"),
        ({"k": 0, "lr_mu": 0.0}, "k must be at least 1"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"lr_mu": -1.0}, "lr_mu must be at least 0"),
        ({"decay": 1.0}, "decay must be"),
        ({"mean": "fp8"}, "mean must be one of fp32, bf16, int8"),
        ({"variant": "right"}, "variant must be one of corrected, released"),
        ({"ratio": 0.0}, "ratio must be above 0"),
        ({"ratio": 1.5}, "ratio must be above 0"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ConfigError, match=said):
        LDSD(**options)


@pytest.mark.parametrize("options", [{"sigma": 0.7}, {"lr_mu": 0.0, "k": 1}])
def test_normalised_steps_have_the_length_of_the_policy_without_a_mean(options):
    """|g| = |rho| sigma^2 d / |v|: what the option says, to fp32's last digit."""
    named, loss = twin_model()
    weights = {name: p.detach() for name, p in named}
    asked, method = [], LDSD(**{"lr_mu": 0.5, "normalise": True, **options})
    for step in range(3):
        asked.clear()
        g, estimate, _ = estimate_of(method, weights, loss, step=step, eps=0.5, asked=asked)
    v = flat(realised(asked[-1], weights)) / 0.5  # the minus side
    expected = abs(float(estimate.info["rho"])) * method.sigma**2 * v.numel() / float(v.norm())
    assert float(g.norm()) == pytest.approx(expected, rel=1e-6)
