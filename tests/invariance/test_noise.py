"""Contract 1: noise is a pure function of (run seed, stream, canonical site name, element number)."""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.checks.noise import (
    anew,
    assert_uncorrelated,
    check_equal_shapes_do_not_share_noise,
    check_order_does_not_matter,
    check_parts_equal_the_whole,
    z_of,
)
from torch import nn

from zotune.core.direction import Noise
from zotune.core.noise import KINDS, check_kind, stream, uniform
from zotune.core.site import Site, canonical_name
from zotune.errors import ConfigError
from zotune.kernels.dispatch import using
from zotune.kernels.reference import ReferenceBackend
from zotune.kernels.row_numbers import local
from zotune.kernels.row_numbers import recent as row_numbers

ALL = sorted(KINDS)
kinds = pytest.mark.parametrize("kind", ALL)
# widths that are and are not multiples of what a codebook row or a Philox block holds
shapes = st.one_of(
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 3, 7, 63, 64, 65, 127, 128, 192, 513])),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 70)),
)


def noise(kind, purpose="test"):
    return Noise(stream(3, purpose), kind)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces agree with the whole, bit for bit.


@kinds
def test_parts_equal_the_whole(kind):
    check_parts_equal_the_whole(kind)


@given(st.sampled_from(ALL), shapes, st.data())
def test_any_run_of_elements_equals_that_part_of_the_whole(kind, shape, data):
    site = Site("layer.weight", shape)
    start = data.draw(st.integers(0, site.count - 1))
    count = data.draw(st.integers(1, site.count - start))
    whole = noise(kind).realise(site).view(-1)
    part = noise(kind).realise(site.part(start, count)).view(-1)
    assert torch.equal(part, whole[start : start + count])


@given(st.sampled_from(ALL), shapes, st.data())
def test_chosen_rows_equal_the_rows_of_the_whole(kind, shape, data):
    """In the given order, repeats included: an embedding asks for the tokens that are there."""
    site = Site("embed.weight", shape)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=8)))
    whole = noise(kind).realise(site)
    assert torch.equal(noise(kind).realise(site.take(rows)).view(whole[rows].shape), whole[rows])


@given(st.sampled_from(ALL), shapes, st.integers(1, 700))
def test_any_chunking_gives_the_whole(kind, shape, limit):
    site = Site("layer.weight", shape)
    pieces = [noise(kind).realise(part).view(-1) for _, part in site.chunks(limit)]
    assert torch.equal(torch.cat(pieces), noise(kind).realise(site).view(-1))


@kinds
@pytest.mark.parametrize("chunk", [64, 100, 5000])
def test_the_working_chunk_does_not_show(monkeypatch, kind, chunk):
    site = Site("layer.weight", (37, 65))
    combination = 0.3 * noise(kind) + 0.7 * noise(kind, "other")
    before, two = anew(noise(kind), site), anew(combination, site)
    monkeypatch.setattr("zotune.core.noise.CHUNK", chunk)
    monkeypatch.setattr("zotune.core.direction.CHUNK", chunk)
    assert torch.equal(anew(noise(kind), site), before)
    assert torch.equal(anew(combination, site), two)


def test_slices_of_a_shard_are_named_by_their_place_in_the_full_tensor():
    """A process that holds elements 100..199 draws those of the whole tensor, and cuts them further the same way."""
    whole = noise("normal").realise(Site("w", (300,)))
    shard = Site("w", (300,), start=100, count=100)
    assert torch.equal(noise("normal").realise(shard), whole[100:200])
    assert torch.equal(noise("normal").realise(shard.part(30, 20)), whole[130:150])


def test_a_scalar_parameter_has_noise():
    assert noise("normal").realise(Site("scale", ())).shape == ()


# ----------------------------------------------------------------------------------------------------------------------
# Nothing else enters.


@kinds
def test_threads_do_not_matter(kind):
    site = Site("layer.weight", (300, 301))
    before = anew(noise(kind), site)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(anew(noise(kind), site), before)
    finally:
        torch.set_num_threads(threads)


@kinds
def test_dtype_does_not_matter(kind):
    """fp64 weights get the numbers fp32 weights get, so a run's precision does not change its directions."""
    site = Site("layer.weight", (70, 33))
    assert torch.equal(anew(noise(kind), site, torch.float64).float(), anew(noise(kind), site))


@kinds
def test_order_of_tensors_does_not_matter(kind):
    check_order_does_not_matter(kind)


@kinds
def test_global_generators_neither_matter_nor_move(kind):
    site = Site("layer.weight", (50,))
    before = anew(noise(kind), site)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(anew(noise(kind), site), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_a_stream_does_not_depend_on_how_its_integers_are_spelled():
    """numpy integers, as loops over arrays give them, name the stream of the Python integer."""
    stream.cache_clear()
    from_numpy = stream(np.int64(5), "step", np.int32(77))
    stream.cache_clear()
    assert stream(5, "step", 77) == from_numpy


def test_integer_and_text_purposes_are_distinct():
    keys = {stream(0, *p).key for p in [(1, 23), (12, 3), ("1", 23), (1, "23"), ("123",), (123,), (1, 2, 3)]}
    assert len(keys) == 7


def _trained(model):
    """What an optimizer over this model would move a zero weight by, per canonical name."""
    named = [(canonical_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
    return {name: anew(noise("normal"), Site(name, tuple(p.shape))) for name, p in named}


def test_freezing_and_reordering_other_tensors_does_not_matter():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    all_of_it = _trained(model)
    model[0].requires_grad_(False)
    frozen = _trained(model)
    assert set(frozen) == {"1.weight", "1.bias"}
    assert all(torch.equal(z, all_of_it[name]) for name, z in frozen.items())


# ----------------------------------------------------------------------------------------------------------------------
# Row numbers that are kept for the other side of a pair and for the update


@pytest.fixture
def reference():
    """The back end that keeps them."""
    with using(ReferenceBackend()):
        yield


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_kept_row_numbers_give_the_same_noise(reference, kind):
    """Drawn again, drawn after others with the same site or the same stream, and as parts of what is kept."""
    sites = [Site(name, (30, 70)) for name in ("a", "b")]
    fresh = {(s.name, p): anew(noise(kind, p), s) for s in sites for p in ("x", "y")}
    for _ in range(2):
        for (name, purpose), expected in fresh.items():
            site = Site(name, (30, 70))
            assert torch.equal(noise(kind, purpose).realise(site), expected)
            assert torch.equal(noise(kind, purpose).realise(site.part(65, 700)), expected.view(-1)[65:765])
            assert torch.equal(noise(kind, purpose).realise(site, torch.float64).float(), expected)


def test_kept_row_numbers_stay_within_their_budget(reference, monkeypatch):
    monkeypatch.setattr("zotune.kernels.row_numbers.Recent.BUDGET", 1000)
    site = Site("w", (100, 70))  # 14 blocks: 448 bytes of row numbers
    expected = [anew(noise("normal", i), site) for i in range(20)]
    for _ in range(2):
        assert all(torch.equal(noise("normal", i).realise(site), z) for i, z in enumerate(expected))
        recent = row_numbers()
        assert 0 < sum(kept.nbytes for kept in recent.kept.values()) <= 1000
        assert recent.bytes == sum(kept.nbytes for kept in recent.kept.values())
    too_large = Site("w", (1000, 70))
    anew(noise("normal"), too_large)
    assert not row_numbers().kept


def _counting(monkeypatch):
    """How many blocks each call of Philox was asked for."""
    from zotune.kernels import philox, row_numbers

    calls = []

    def counted(key, site, blocks):
        calls.append(len(blocks))
        return philox.words32(key, site, blocks)

    monkeypatch.setattr(row_numbers, "words32", counted)
    return calls


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_row_numbers_drawn_ahead_give_the_same_noise(reference, monkeypatch, kind):
    """A new stream is drawn for what the last one was asked for, in one call; any other order gets the same noise."""
    sites = [Site(name, shape) for name, shape in [("a", (30, 70)), ("b", (5,)), ("c", (100, 7)), ("d", (64, 64))]]
    purposes = ["first", "second", "third", "fourth"]
    expected = {(s.name, p): anew(noise(kind, p), s) for s in sites for p in purposes}
    local.__dict__.clear()
    calls = _counting(monkeypatch)

    def ask(purpose, asked):
        calls.clear()
        for site in asked:
            assert torch.equal(noise(kind, purpose).realise(site), expected[site.name, purpose])
        return len(calls)

    assert ask("first", sites) == 4
    assert ask("second", sites) == 1
    assert ask("third", sites[::-1]) == 4  # nothing is known to come after "d"; then the others are new on the way
    assert ask("fourth", [sites[2], sites[2], sites[0], sites[1], sites[3]]) <= 3
    assert ask("first", sites) == ask("third", sites) == 0  # kept
    recent = row_numbers()
    assert recent.bytes == sum(kept.nbytes for kept in recent.kept.values())
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in recent.kept.values())  # none holds others'


def test_parts_that_are_drawn_ahead(reference):
    """Runs that begin inside a site, and rows between them."""
    site, small = Site("w", (100, 70)), Site("v", (9,))
    parts = [site.part(0, 1000), small, site.part(3000, 2000), site.part(5000, 2000), site.part(1030, 500)]
    expected = {purpose: anew(noise("normal", purpose), site).view(-1) for purpose in "abc"}
    local.__dict__.clear()
    for purpose in "abc":
        for part in parts:
            made = noise("normal", purpose).realise(part).view(-1)
            if part is not small:
                assert torch.equal(made, expected[purpose][part.start : part.start + part.count])
        rows = site.take(torch.tensor([3, 99]))
        assert torch.equal(noise("normal", purpose).realise(rows), expected[purpose].view(100, 70)[[3, 99]].view(-1))


def test_row_numbers_are_drawn_ahead_up_to_a_bound(reference, monkeypatch):
    """What one call draws for others is bounded, whatever was asked for before; one large run is drawn whole."""
    monkeypatch.setattr("zotune.kernels.row_numbers.Recent.AHEAD", 10)
    sites = [Site(f"w{i}", (512 * size,)) for i, size in enumerate([4, 4, 4, 30, 2])]
    local.__dict__.clear()
    calls = _counting(monkeypatch)
    for purpose in ("first", "second"):
        for site in sites:
            noise("normal", purpose).realise(site)
    assert calls == [4, 4, 4, 30, 2, 8, 4, 30, 2]


def test_a_stream_that_asks_in_circles(reference, monkeypatch):
    """a, a, b, a, b of stream after stream: what follows is followed once around."""
    sites = [Site("a", (600,)), Site("b", (600,))]
    expected = {(s.name, i): anew(noise("normal", i), s) for s in sites for i in range(3)}
    local.__dict__.clear()
    calls = _counting(monkeypatch)
    for i in range(3):
        for k in (0, 0, 1, 0, 1):
            assert torch.equal(noise("normal", i).realise(sites[k]), expected[sites[k].name, i])
    assert calls == [2, 2, 4, 4]


@kinds
def test_threads_that_draw_at_the_same_time(kind):
    """Two threads must not share the buffer that noise is made in."""
    sites = [Site(f"w{i}", (300, 301)) for i in range(4)]
    expected = [anew(noise(kind), site) for site in sites]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            drawn = list(pool.map(lambda site: noise(kind).realise(site), sites))
            assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Independence.


@kinds
def test_equal_shapes_never_share_noise(kind):
    check_equal_shapes_do_not_share_noise(kind)


@kinds
def test_all_tensors_of_a_model_are_independent(kind):
    """All 66 pairs of 12 tensors of one shape; 5 sigma each leaves 4e-5 for all pairs."""
    drawn = [z_of(f"model.layers.{i}.{p}.weight", (128, 128), kind=kind) for i in range(4) for p in ("q", "k", "v")]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert_uncorrelated(one, other)


@kinds
def test_streams_steps_and_seeds_are_independent(kind):
    here = z_of("w", kind=kind, purpose=("step", 0, 0))
    for seed, purpose in [(0, ("step", 1, 0)), (0, ("step", 0, 1)), (1, ("step", 0, 0)), (0, ("other", 0, 0))]:
        assert_uncorrelated(here, z_of("w", seed=seed, kind=kind, purpose=purpose))


@kinds
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 63, 64, 65, 128, 512, 513, 4096])
def test_elements_at_any_lag_are_uncorrelated(kind, lag):
    """Lags inside a codebook row, between rows, and between Philox blocks."""
    z = z_of("w", (1 << 17,), kind=kind)
    assert_uncorrelated(z[:-lag], z[lag:])


@kinds
def test_columns_of_a_matrix_are_uncorrelated(kind):
    """64 columns, one codebook row wide: the sample correlation matrix is the identity, 6 sigma over 2,016 pairs."""
    z = z_of("w", (1 << 14, 64), kind=kind).double()
    gram = z.T @ z / z.shape[0] - torch.eye(64, dtype=torch.float64)
    gram.fill_diagonal_(0)
    assert float(gram.abs().max()) < 6 / math.sqrt(z.shape[0])


# ----------------------------------------------------------------------------------------------------------------------
# Moments and tails.

DRAWS = 1 << 20
# E[z^2], E[z^4], E[z^6], E[z^8] of each kind; the variance of z^k is E[z^2k] - E[z^k]^2.
GAUSSIAN_MOMENTS = {1: 0, 2: 1, 3: 0, 4: 3, 6: 15, 8: 105, 12: 10395}


@pytest.mark.parametrize("kind", ["normal", "gaussian"])
def test_moments_up_to_the_fourth_are_gaussian(kind):
    """5 sigma of the sample mean, sigma from the exact Gaussian moments (the table's are smaller)."""
    z = z_of("w", (DRAWS,), kind=kind).double()
    for power in (1, 2, 3, 4):
        sigma = math.sqrt((GAUSSIAN_MOMENTS[2 * power] - GAUSSIAN_MOMENTS[power] ** 2) / DRAWS)
        assert abs(float((z**power).mean()) - GAUSSIAN_MOMENTS[power]) < 5 * sigma


@pytest.mark.parametrize("kind", ["normal", "gaussian"])
def test_distribution_function(kind):
    """The exact kind has the normal's distribution function to 5 sigma; the table's steps stay within 2 % of it.

    64 half-normal quantiles jump by 1/64 = 1.6 %, and the levels were moved by a few 32nds.
    """
    z = z_of("w", (DRAWS,), kind=kind).double()
    for x in torch.linspace(-3, 3, 25).tolist():
        expected = 0.5 * math.erfc(-x / math.sqrt(2))
        allowed = 5 * math.sqrt(expected * (1 - expected) / DRAWS) + (0.02 if kind == "normal" else 0)
        assert abs(float((z < x).double().mean()) - expected) < allowed


def test_tails():
    """The table is cut at 83/32; the exact kind reaches beyond 4.5 (7 of a million expected) and stays finite."""
    assert float(z_of("w", (DRAWS,)).abs().max()) == 83 / 32
    exact = z_of("w", (DRAWS,), kind="gaussian").abs()
    beyond = int((exact > 4.5).sum())
    assert 0 < beyond < 7.2 + 5 * math.sqrt(7.2)
    assert bool(exact.isfinite().all())


def test_box_muller_survives_extreme_words(monkeypatch):
    """All-zero and all-one random words must not give log(0) or a NaN."""
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(
            "zotune.core.noise.words", lambda key, site, blocks, w=word: torch.full((len(blocks), 4), w)
        )
        assert bool(noise("gaussian").realise(Site("w", (8,))).isfinite().all())


def test_rademacher_is_plus_or_minus_one():
    z = z_of("w", (DRAWS,), kind="rademacher")
    assert z.unique().tolist() == [-1.0, 1.0]
    assert abs(float(z.mean())) < 5 / math.sqrt(DRAWS)


# ----------------------------------------------------------------------------------------------------------------------
# What a gradient estimate needs.


def _gradients(d):
    generator = torch.Generator().manual_seed(1)
    one_hot = torch.zeros(d)
    one_hot[d // 2] = 1
    low_rank = (torch.randn(d // 64, 1, generator=generator) @ torch.randn(1, 64, generator=generator)).view(-1)
    checkers = torch.tensor([1.0, -1.0]).repeat(d // 2)
    return {"constant": torch.ones(d), "one-hot": one_hot, "low-rank": low_rank, "checkers": checkers}


@kinds
@pytest.mark.parametrize("name", ["constant", "one-hot", "low-rank", "checkers"])
def test_projections_of_structured_gradients_are_isotropic(kind, name):
    """E(g.z)^2 / |g|^2 = 1: a table that favours some directions would bias the slope. 5 standard errors of 4,000 draws."""
    g = _gradients(256)[name]
    z = z_of("w", (4000, 256), kind=kind)
    squares = ((z @ g) ** 2 / (g @ g)).double()
    if kind == "rademacher" and name == "one-hot":
        assert torch.equal(squares, torch.ones_like(squares))
        return
    assert abs(float(squares.mean()) - 1) < 5 * float(squares.std()) / math.sqrt(len(squares))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", ["normal", "gaussian"])
def test_second_moment_of_the_estimate(kind, n):
    """M2: E|(1/n) sum (g.z_i) z_i|^2 = (d + n + 1)/n |g|^2 for a dense g; 5 standard errors."""
    d, draws = 320, 12000
    g = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = z_of("w", (draws, d), kind=kind).double()
    estimates = ((z @ g)[:, None] * z).view(-1, n, d).mean(dim=1)
    squares = (estimates**2).sum(dim=1) / (g @ g)
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - (d + n + 1) / n) < 5 * error


@kinds
def test_mean_of_the_estimate_is_the_gradient(kind):
    """M2: mean of (g.z) z is g. Its squared error is (d + 1)/N |g|^2 in the mean, with relative spread about sqrt(2/d)."""
    d, draws = 320, 12000
    g = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = z_of("w", (draws, d), kind=kind).double()
    mean = ((z @ g)[:, None] * z).mean(dim=0)
    ratio = float(((mean - g) ** 2).sum() / (g @ g)) * draws / (d + 1)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / d)


@pytest.mark.statistical
@kinds
def test_isotropy_and_second_moment_over_a_million_draws(kind):
    """As above with 25 times the draws: 5 standard errors are then 0.4 % of the mean."""
    d, total = 320, []
    g = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for part in range(25):
        z = z_of("w", (12000, d), kind=kind, purpose=("long", part)).double()
        total.append((z @ g) ** 2 * (z**2).sum(dim=1) / (g @ g))
    squares = torch.cat(total)
    kurtosis_term = 0 if kind != "rademacher" else -2  # E z^4 = 1 instead of 3
    expected = d + 2 + kurtosis_term
    assert (
        abs(float(squares.mean()) - expected)
        < 5 * float(squares.std()) / math.sqrt(len(squares)) + 7.2 * (kind == "normal") / d
    )


# ----------------------------------------------------------------------------------------------------------------------
# uniform()


@given(st.integers(0, 2**63), st.floats(-100, 100), st.floats(0.001, 100))
def test_uniform_stays_in_its_range(seed, low, width):
    assert low <= uniform(stream(seed, "u"), low, low + width) <= low + width


def test_uniform_moments():
    """Mean 0, variance 1/3 on [-1, 1): 5 sigma of 20,000 draws."""
    drawn = torch.tensor([uniform(stream(0, "u", i), -1, 1) for i in range(20000)], dtype=torch.float64)
    assert abs(float(drawn.mean())) < 5 * math.sqrt(1 / 3 / 20000)
    assert abs(float((drawn**2).mean()) - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / 20000)
    assert len(set(drawn.tolist())) == 20000


def test_uniform_is_a_recorded_number():
    """Scalars of a step are part of the run: the same bits on every machine."""
    assert uniform(stream(0, "u"), 0.0, 1.0).hex() == "0x1.d2327a44ad5bcp-3"


# ----------------------------------------------------------------------------------------------------------------------
# Names.

NAMES = {
    "module.model.layers.0.weight": "model.layers.0.weight",
    "_orig_mod.model.layers.0.weight": "model.layers.0.weight",
    "module._orig_mod.model.layers.0.weight": "model.layers.0.weight",
    "model.layers.0._checkpoint_wrapped_module.mlp.weight": "model.layers.0.mlp.weight",
    "_fsdp_wrapped_module.head.weight": "head.weight",
    "base_model.model.model.layers.0.q_proj.lora_A.default.weight": "model.layers.0.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.q_proj.lora_B.my_adapter.weight": "model.layers.0.q_proj.lora_B.weight",
    "_orig_mod.base_model.model.model.q_proj.lora_A.default.weight": "model.q_proj.lora_A.weight",
    "base_model.model.embed.lora_embedding_A.default": "embed.lora_embedding_A",
    "base_model.model.classifier.modules_to_save.default.weight": "classifier.modules_to_save.weight",
    "prompt_encoder.default.embedding.weight": "prompt_encoder.embedding.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "q_proj.lora_A.weight": "q_proj.lora_A.weight",  # not PEFT's: a hand-written adapter has no adapter name to strip
    "q_proj.lora_A.bias": "q_proj.lora_A.bias",
    "module": "module",
}


@pytest.mark.parametrize(("given_name", "expected"), NAMES.items())
def test_wrappers_do_not_rename(given_name, expected):
    assert canonical_name(given_name) == expected


def test_the_docstring_example():
    import doctest

    import zotune.core.site

    assert doctest.testmod(zotune.core.site).attempted == 1
    assert doctest.testmod(zotune.core.site).failed == 0


def test_wrapped_models_draw_the_same_noise():
    """torch.compile, DataParallel and a peft-like prefix put components before every name."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    plain = _trained(model)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        found = _trained(wrapped)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match="normal, gaussian, rademacher; got 'gauss'"):
        check_kind("gauss")
