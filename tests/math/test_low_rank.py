"""Low-rank directions are exact: the same bits for any slice, row choice, thread count and order of summation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.bare import bare_context, realised

from zotune.core.direction import HERE, Noise
from zotune.core.draws import draw_flat, draw_stack
from zotune.core.factors import Factors
from zotune.core.frames import Frames
from zotune.core.grids import MAX_RANK, grid_bits, on_grid, on_grids
from zotune.core.low_rank import (
    LowRank,
    as_matrix,
    low_rank_or_noise,
    normal_matrix,
    normal_sheet,
    normal_stack,
    one_thread,
    orthonormal,
    random_basis,
    signs,
)
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.errors import ConfigError

RANKS = (1, 2, 3, 8, 31, 128, 512)
DTYPES = (torch.float32, torch.float64)


def source(*purpose):
    return stream(5, "low rank", *purpose)


def factors_of(shape, rank, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, dtype=torch.float64, generator=generator) * scale
    return Factors.of(left, torch.randn(shape[1], rank, dtype=torch.float64, generator=generator))


def direction(shape=(37, 23), rank=3, name="w", seed=0):
    return LowRank({name: factors_of(shape, rank, seed)})


def in_order(factors, order):
    """left @ right.T by elementwise fp64 arithmetic alone, summed in the given order of columns."""
    total = torch.zeros(factors.left.shape[0], factors.right.shape[0], dtype=torch.float64)
    for k in order:
        total += factors.left[:, k, None].double() * factors.right[None, :, k].double()
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("rank", [*RANKS, MAX_RANK])
def test_sums_of_rank_products_fit_into_fp64(rank):
    """Integers below 2**bits: a sum of `rank` products is at most 2**53, below which every integer is an fp64 number."""
    assert rank * 2 ** (2 * grid_bits(rank)) <= 2**53
    assert 21 <= grid_bits(rank) <= 24  # 24: an fp32 number holds a factor exactly


@pytest.mark.parametrize("rank", [0, -1, MAX_RANK + 1])
def test_ranks_without_a_grid(rank):
    with pytest.raises(ConfigError, match=f"between 1 and {MAX_RANK}; got {rank}"):
        grid_bits(rank)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=20), st.sampled_from(RANKS))
def test_grid_is_near_exact_in_fp32_and_stays(values, rank):
    values = torch.tensor(values, dtype=torch.float64)
    rounded = on_grid(values, rank)
    largest = float(values.abs().max())
    # half a unit; a unit is 2**-bits of the power of two above the largest, which is at most twice the largest
    assert float((rounded - values).abs().max()) <= largest * 2.0 ** -grid_bits(rank)
    if largest > 1e-30:  # fp32 has no exponents for the units of smaller ones
        assert torch.equal(rounded.float().double(), rounded)
    again = on_grid(rounded, rank)
    assert torch.equal(on_grid(again, rank), again)
    assert torch.equal(on_grid(-values, rank), -rounded)


def test_nothing_and_not_a_number_pass_through_the_grid():
    assert torch.equal(on_grid(torch.zeros(3), 4), torch.zeros(3, dtype=torch.float64))
    assert on_grid(torch.zeros(0, 2), 4).shape == (0, 2)
    assert on_grid(torch.tensor([1.0, math.nan]), 4).isnan().any()


# ----------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("rank", RANKS)
def test_product_does_not_depend_on_the_order_of_summation(rank):
    """BLAS, elementwise forwards and elementwise backwards: the same bits."""
    factors = factors_of((19, 13), rank)
    made = factors.run(0, 19 * 13, torch.device("cpu")).view(19, 13)
    assert torch.equal(made, in_order(factors, range(rank)))
    assert torch.equal(made, in_order(factors, reversed(range(rank))))


@pytest.mark.parametrize("rank", [1, 8, 512])
def test_largest_factors_are_exact(rank):
    """All numbers at the end of the grid, with equal signs: the largest sums there can be."""
    one = torch.full((4, rank), 1.0 - 2.0 ** -grid_bits(rank), dtype=torch.float64)
    factors = Factors.of(one, one)
    expected = rank * (2 ** grid_bits(rank) - 1) ** 2  # an exact Python integer
    assert int(factors.run(0, 1, torch.device("cpu"))[0] * 4 ** grid_bits(rank)) == expected


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.sampled_from((1, 3, 8, 64)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    scale=st.floats(-10, 10, allow_subnormal=False),
    dtype=st.sampled_from(DTYPES),
)
def test_slices_agree_with_the_whole(rows, columns, rank, cut, scale, dtype):
    z, site = direction((rows, columns), rank), Site("w", (rows, columns))
    whole = torch.full((rows * columns,), 0.1, dtype=dtype)
    z.add_to(whole, site, scale)
    start, end = sorted(round(part * rows * columns) for part in cut)
    slice_ = torch.full((end - start,), 0.1, dtype=dtype)
    z.add_to(slice_, site.part(start, end - start), scale)
    assert torch.equal(slice_, whole[start:end])


@given(st.lists(st.integers(0, 36), max_size=12), st.sampled_from(DTYPES), st.booleans())
def test_chosen_rows_agree_with_the_whole(rows, dtype, reshaped):
    site = Site("w", (37, 23))
    z = LowRank({"w": factors_of((23, 37) if reshaped else (37, 23), 3)})
    chosen = torch.tensor(rows, dtype=torch.int64)
    out = torch.zeros(len(rows), 23, dtype=dtype)
    z.add_to(out, site.take(chosen), 0.3)
    whole = torch.zeros(37, 23, dtype=dtype)
    z.add_to(whole, site, 0.3)
    assert torch.equal(out, whole[chosen])


@pytest.mark.parametrize("shape", [(5000, 70), (3, 300_000), (700_000, 1)])
def test_large_tensors_are_the_same_in_chunks(shape):
    """Beyond a chunk: a run that starts and ends inside rows, against elementwise arithmetic."""
    factors = factors_of(shape, 2)
    z, site, numel = LowRank({"w": factors}), Site("w", shape), shape[0] * shape[1]
    expected = in_order(factors, range(2)).view(-1).float() * 0.25
    whole = torch.zeros(numel)
    z.add_to(whole, site, 0.25)
    assert torch.equal(whole, expected)
    part = torch.zeros(300_001)
    z.add_to(part, site.part(17, 300_001), 0.25)
    assert torch.equal(part, expected[17 : 17 + 300_001])


@pytest.mark.parametrize("rank", [1, 8, 128])
def test_threads_do_not_show(rank):
    site, results = Site("w", (600, 700)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            left = random_basis(source("left"), site, "left", (600, rank))
            right = random_basis(source("right"), site, "right", (700, rank))
            core = normal_stack(source("core"), ["w"], "core", (rank, rank))
            z = Frames({"w": (left, right)}).around(lambda batch, core=core: core)
            results.append(z.realise(site))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_thread_is_put_back_after_an_error():
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError), one_thread():
            orthonormal(torch.full((2,), inside.append(torch.get_num_threads()) or 0.0))  # a vector has no Q factor
        assert (inside, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_outputs_of_any_layout():
    z, site = direction(), Site("w", (37, 23))
    expected = z.realise(site, torch.float64)
    skew = torch.zeros(23, 37, dtype=torch.float64).t()
    z.add_to(skew, site)
    assert torch.equal(skew, expected)
    assert torch.equal(z.realise(site, torch.float32), expected.float())
    scaled = torch.zeros(37, 23)
    z.add_to(scaled, site, torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(scaled, expected.float() * 0.3)


SHAPES_OF_FRAMES = {"tall": (30, 12), "wide": (12, 30), "square": (12, 12), "other": (30, 12), "thin": (9, 7)}


def frames_of(ranks):
    """Bases on their grids, and cores, for matrices whose shorter sides are left, right, shared and alone."""

    def basis(name, side):
        rows = SHAPES_OF_FRAMES[name][side]
        return random_basis(source(side), Site(name, SHAPES_OF_FRAMES[name]), str(side), (rows, ranks[name]))

    pairs = {name: (basis(name, 0), basis(name, 1)) for name in SHAPES_OF_FRAMES}
    cores = {name: 3.7 * normal_matrix(source("core"), Site(name, ()), "core", (r, r)) for name, r in ranks.items()}
    return pairs, cores


@pytest.mark.parametrize("ranks", [(5, 5, 5, 5, 5), (5, 5, 3, 5, 1)])
def test_cores_between_bases(ranks):
    """Into the shorter factor; the longer one is the same tensor each time. Off by the grids of core and product: 2**-22."""
    pairs, cores = frames_of(dict(zip(SHAPES_OF_FRAMES, ranks, strict=True)))
    frames = Frames(pairs)
    z = frames.around(lambda batch: torch.stack([cores[name] for name in batch.names]))
    assert list(frames.pairs) == list(pairs)
    assert set(z.factors) == set(pairs)
    for name, (left, right) in pairs.items():
        made, (m, n) = z.factors[name], SHAPES_OF_FRAMES[name]
        assert torch.equal(frames.pairs[name][0], left)
        assert torch.equal(frames.pairs[name][1], right)
        assert made.kept is frames.pairs[name][0 if m > n else 1]
        assert made.kept.t().is_contiguous(), "thin products would copy it"
        assert made.fresh == ("right" if m > n else "left")
        expected = left.double() @ cores[name] @ right.double().T
        found = made.run(0, m * n, torch.device("cpu")).view(m, n)
        assert float((found - expected).abs().max()) < 5 * 5 * 2.0**-20 * float(expected.abs().max()), name
        assert torch.equal(found, in_order(made, reversed(range(made.rank)))), "not exact"
        assert torch.equal(on_grid(made.changing, made.rank).float(), made.changing), "not on its grid"
        assert made.ceiling / 2 <= float(made.changing.abs().max()) <= made.ceiling


def test_the_company_of_a_matrix_does_not_show():
    """Alone or beside others, the same factors to the bit."""
    pairs, cores = frames_of(dict.fromkeys(SHAPES_OF_FRAMES, 4))
    cores["square"] *= 1e6  # another grid than its neighbours'
    cores["other"] *= 0.0
    stacked = Frames(pairs).around(lambda batch: torch.stack([cores[name] for name in batch.names]))
    for name in pairs:
        alone = Frames({name: pairs[name]}).around(lambda batch, name=name: cores[name][None].clone())
        assert torch.equal(alone.factors[name].changing, stacked.factors[name].changing), name
    assert not stacked.factors["other"].changing.any()


def test_many_grids_are_those_of_each():
    generator = torch.Generator().manual_seed(4)
    many = [torch.randn(7, 3, generator=generator) * 10.0**k for k in range(-6, 7)] + [torch.zeros(2, 3)]
    rounded, ceilings = on_grids(many, 300)  # of rank 300: grids coarser than fp32
    for values, made, ceiling in zip(many, rounded, ceilings, strict=True):
        assert torch.equal(on_grid(values, 300).float(), made)
        assert float(made.abs().max()) <= ceiling
    assert on_grids([], 3) == ([], [])


# ----------------------------------------------------------------------------------------------------------------------
# Noise of many small tensors


COUNTS = {"a": 1, "b": 64, "c": 65, "d": 511, "e": 512, "f": 513, "g": 4, "h": 6, "nothing": 0, "i": 3000}


@pytest.mark.parametrize("kind", ["normal", "gaussian", "rademacher"])
def test_noise_of_many_is_the_noise_of_each(kind):
    """Whatever the company and the order; the whole, and its beginning."""
    expected = {name: Noise(source(), kind).realise(Site(name, (count,))) for name, count in COUNTS.items()}
    for names in (list(COUNTS), list(COUNTS)[::-1], ["e"], ["c", "a"], []):
        flat, sizes = draw_flat(source(), names, [COUNTS[name] for name in names], kind)
        for name, values in zip(names, torch.split(flat, list(sizes)), strict=True):
            assert torch.equal(values[: COUNTS[name]], expected[name]), f"{name} among {names}"
        stacked = draw_stack(source(), names, 5, kind)
        assert stacked.shape == (len(names), 5)
        for name, values in zip(names, stacked, strict=True):
            assert torch.equal(values, Noise(source(), kind).realise(Site(name, (5,))))
    sheet, sizes = normal_sheet(source(), {"a": (13, 5), "b": (2, 2)}, "left", kind)
    assert sum(sizes) == len(sheet)
    assert torch.equal(sheet[:65].view(13, 5).double(), normal_matrix(source(), Site("a", ()), "left", (13, 5), kind))


@pytest.mark.parametrize("rank", [1, 4, 128, 2048])
def test_products_of_table_noise_are_exact_in_fp32(rank):
    """Also of its largest numbers: 83**2 * 2**11 < 2**24. The same bits as by fp64 arithmetic, for any output."""
    site = Site("w", (6, 5))
    sides = [
        normal_matrix(source(side), site, side, (rows, rank), "normal").float() for side, rows in (("l", 6), ("r", 5))
    ]
    for left, right in (sides, [torch.full_like(side, 83 / 32) for side in sides]):
        single, double = Factors(left, right, single=True), Factors(left, right)
        assert single.run(0, 30, torch.device("cpu")).dtype == torch.float32
        assert double.run(0, 30, torch.device("cpu")).dtype == torch.float64
        assert torch.equal(single.run(0, 30, torch.device("cpu")).view(6, 5), in_order(single, reversed(range(rank))))
        for dtype in DTYPES:
            a, b = (LowRank({"w": factors}).realise(site, dtype) for factors in (single, double))
            assert torch.equal(a, b)
            chosen = site.take(torch.tensor([4, 1]))
            out = torch.zeros(2, 5, dtype=dtype)
            LowRank({"w": single}).add_to(out, chosen, 0.3)
            assert torch.equal(out, a[[4, 1]] * 0.3)


def test_factors_of_unequal_ranks():
    with pytest.raises(ConfigError, match=r"\(4, 2\) and \(5, 3\)"):
        Factors.of(torch.zeros(4, 2), torch.zeros(5, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Bases and small matrices


@given(rows=st.integers(1, 30), rank=st.integers(1, 30), seed=st.integers(0, 100))
def test_orthonormal_columns(rows, rank, seed):
    rank = min(rows, rank)
    matrix = normal_matrix(source(seed), Site("w", (rows, rank)), "any", (rows, rank))
    q = orthonormal(matrix)
    assert float((q.T @ q - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-13  # fp64, sums of 30
    upper = q.T @ matrix
    assert bool((upper.diagonal() > 0).all()), "the sign is not fixed"
    assert float((q @ upper - matrix).abs().max()) < 1e-12
    assert float(upper.tril(-1).abs().max()) < 1e-12


def test_bases_are_uniform():
    """Haar: the first element of the first column has mean 0 and variance 1/m; without the sign its mean would not be 0."""
    count, rows = 2000, 4
    firsts = torch.stack(
        [orthonormal(normal_matrix(source(i), Site("w", (rows, 2)), "u", (rows, 2))) for i in range(count)]
    )
    mean, second = firsts.mean(dim=0), (firsts**2).mean(dim=0)
    assert float(mean.abs().max()) < 5 * math.sqrt(1 / rows / count)  # five standard errors
    assert float((second - 1 / rows).abs().max()) < 5 * math.sqrt(3 / 16 / count)  # fourth moment below 3/16


def test_small_matrices_belong_to_a_name_and_a_role():
    site, other = Site("a", (6, 5)), Site("b", (6, 5))
    made = normal_matrix(source(), site, "core", (3, 3))
    assert torch.equal(made, normal_matrix(source(), Site("a", (60, 50)), "core", (3, 3)))
    assert torch.equal(made.flatten()[:6], normal_matrix(source(), site, "core", (2, 3)).flatten())
    for different in (
        normal_matrix(source(), other, "core", (3, 3)),
        normal_matrix(source(), site, "left", (3, 3)),
        normal_matrix(source(1), site, "core", (3, 3)),
    ):
        assert not torch.equal(made, different)
    names = [f"site {number}" for number in range(1000)]
    many = signs(source(), names, "xi")
    assert set(many.tolist()) == {-1.0, 1.0}
    assert abs(float(many.mean())) < 5 / math.sqrt(1000)  # five standard errors
    assert torch.equal(signs(source(), names[500:], "xi"), many[500:])


# ----------------------------------------------------------------------------------------------------------------------
# As directions


def test_sites_without_factors():
    z = direction()
    bias = Site("bias", (7,))
    assert z.touches(Site("w", (37, 23)))
    assert not z.touches(bias)
    noise = Noise(source(), "normal")
    both = LowRank(z.factors, otherwise=noise)
    assert both.touches(bias)
    assert torch.equal(both.realise(bias), noise.realise(bias))
    assert not LowRank({}, HERE).touches(bias)


def test_low_rank_on_matrices_and_noise_elsewhere_on_the_groups_scale():
    tensors = {"w": torch.zeros(37, 23), "bias": torch.zeros(7)}
    factors = {"w": factors_of((37, 23), 3)}
    plain = realised(low_rank_or_noise(bare_context(tensors, None), LowRank(factors)), tensors)
    assert torch.equal(plain["w"], LowRank(factors).realise(Site("w", (37, 23)), torch.float64))
    noise = Noise(stream(0, "step", 0, 0))
    assert torch.equal(plain["bias"], noise.realise(Site("bias", (7,)), torch.float64))
    ctx = bare_context(tensors, None)
    ctx._factors = {"w": 0.5, "bias": 4.0}
    grouped = realised(low_rank_or_noise(ctx, LowRank(factors)), tensors)
    assert torch.equal(grouped["w"], 0.5 * plain["w"])
    assert torch.equal(grouped["bias"], 4.0 * plain["bias"])


@pytest.mark.parametrize(
    ("shape", "square", "expected"),
    [
        ((6, 5), False, (6, 5)),
        ((6, 1, 5), False, (6, 5)),
        ((6, 5), True, (5, 6)),
        ((2, 50), True, (10, 10)),
        ((2, 37), True, (2, 37)),
        ((5,), False, None),
        ((1, 5), False, None),
        ((2, 3, 4), True, None),
        ((), False, None),
    ],
)
def test_shapes_of_matrices(shape, square, expected):
    assert as_matrix(Site("w", shape), square) == expected
