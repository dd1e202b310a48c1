"""Moments, counts and the normaliser."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.core.site import Site
from zotune.finetuner.profile import PART, counted, moments, moments_of, rms


@pytest.mark.parametrize("shape", [(3,), (5, 7), (4096,), (4097,), (600, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_numpy_s(shape, dtype):
    """fp64 sums of at most 4e5 numbers: 1e-12."""
    values = torch.randn(shape, dtype=dtype) * 0.02 + 0.3
    mean, variance = moments(values)
    assert mean == pytest.approx(np.mean(values.numpy(), dtype=np.float64), rel=1e-12)
    assert variance == pytest.approx(np.var(values.numpy().astype(np.float64), ddof=1), rel=1e-12)


def test_moments_of_a_large_mean():
    """The mean is 1e4 times the deviation, as in no weight: sums around a number of the tensor do not cancel."""
    values = 1e4 + torch.randn(100_000, dtype=torch.float64)
    _, variance = moments(values)
    assert variance == pytest.approx(float(values.var()), rel=1e-11)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.full((9,), 0.1), (float(torch.tensor(0.1)), 0.0)),  # equal numbers have no variance at all
        (torch.tensor(0.7), (float(torch.tensor(0.7)), 0.0)),  # torch's variance of one number is not a number
        (torch.empty(0), (0.0, 0.0)),
    ],
)
def test_moments_at_the_edge(values, expected):
    assert moments(values) == expected


@pytest.mark.parametrize("numel", [5, PART, PART + 5, 2 * PART + 4097])
def test_moments_of_parts_are_those_of_the_whole(numel):
    values = torch.randn(numel)
    assert moments_of(values.split(PART)) == moments(values)
    assert moments_of([]) == (0.0, 0.0)


def test_moments_of_what_is_not_finite():
    for bad in (math.inf, math.nan):
        values = torch.ones(10)
        values[4] = bad
        assert not all(map(math.isfinite, moments(values)))


def test_moments_do_not_depend_on_layout_or_threads():
    values = torch.randn(700, 900)
    expected = moments(values)
    assert moments(values.t().contiguous().t()) == expected
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert moments(values) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (1000, 8), 15 * 4 * 8),
        ("model.decoder.embed_positions.weight", (50, 8), 15 * 4 * 8),  # the released code's rule holds by name
        ("model.layers.0.mlp.up_proj.weight", (6, 8), 48),
        ("model.norm.weight", (8,), 8),
        ("embed_norm.weight", (8,), 8),
        ("scale", (), 1),
        ("conv.weight", (2, 3, 4), 0),
    ],
)
def test_what_counts(name, shape, expected):
    assert counted(Site(name, shape), examples=4) == expected


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 10**9)), min_size=1, max_size=20), st.randoms())
def test_rms_does_not_see_the_order(pairs, random):
    there = rms(*map(list, zip(*pairs, strict=True)))
    random.shuffle(pairs)
    assert rms(*map(list, zip(*pairs, strict=True))) == there


@given(st.integers(-20, 20), st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_rms_of_equal_powers_of_two_is_exact(exponent, counts):
    assert rms([2.0**exponent] * len(counts), counts) == 2.0**exponent


def test_rms_of_nothing():
    assert math.isnan(rms([0.5], [0]))
    assert math.isnan(rms([math.nan, 1.0], [1, 1]))
