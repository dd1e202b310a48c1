"""Low-rank directions are exact: the same bits for any slice, row choice, thread count and order of summation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.bare import bare_context, realised

from zotune.core.direction import HERE, Noise
from zotune.core.errors import ConfigError
from zotune.core.low_rank import (
    MAX_RANK,
    Factors,
    LowRank,
    as_matrix,
    grid_bits,
    low_rank_or_noise,
    matrix_product,
    normal_matrix,
    on_grid,
    one_thread,
    orthonormal,
    random_basis,
    signs,
)
from zotune.core.noise import stream
from zotune.core.site import Site

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
            z = LowRank({"w": Factors.around(left, normal_matrix(source("core"), site, "core", (rank, rank)), right)})
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


def test_products_of_small_factors_are_exact_on_their_grids():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(9, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    made = matrix_product(left, right)
    assert torch.equal(made, in_order(Factors(on_grid(left, 9), on_grid(right.T, 9)), reversed(range(9))))
    # two factors, each off by 2**-24 of its largest number (24 bits), nine terms
    assert float((made - left @ right).abs().max()) < 9 * 2 * 2.0**-23 * float(left.abs().max() * right.abs().max())


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_a_core_between_factors(shape):
    """Into the shorter factor; the longer one is the caller's own tensor. Off by the grid of one product: 2**-22."""
    factors = factors_of(shape, 5)
    core = normal_matrix(source("core"), Site("w", shape), "core", (5, 5))
    made = Factors.around(factors.left, core, factors.right)
    kept, its = (made.left, factors.left) if shape[0] > shape[1] else (made.right, factors.right)
    assert kept is its
    expected = factors.left.double() @ core @ factors.right.double().T
    found = made.run(0, shape[0] * shape[1], torch.device("cpu")).view(shape)
    assert float((found - expected).abs().max()) < 5 * 5 * 2.0**-20 * float(expected.abs().max())
    assert torch.equal(found, in_order(made, reversed(range(5))))  # still exact


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
    many = signs(source(), site, "xi", 1000)
    assert set(many.tolist()) == {-1.0, 1.0}
    assert abs(float(many.mean())) < 5 / math.sqrt(1000)  # five standard errors


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
    plain = realised(low_rank_or_noise(bare_context(tensors, None), factors), tensors)
    assert torch.equal(plain["w"], LowRank(factors).realise(Site("w", (37, 23)), torch.float64))
    noise = Noise(stream(0, "step", 0, 0))
    assert torch.equal(plain["bias"], noise.realise(Site("bias", (7,)), torch.float64))
    ctx = bare_context(tensors, None)
    ctx._factors = {"w": 0.5, "bias": 4.0}
    grouped = realised(low_rank_or_noise(ctx, factors), tensors)
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
