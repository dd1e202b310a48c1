"""Directions of examples: what they are, and the same bits for any slice."""

import pytest
import torch
from tests.checks import grzo as checks

from zotune.core.direction import HERE, Noise, Scaled
from zotune.core.noise import CHUNK, stream
from zotune.core.signed import WEIGHT_BITS, differs, for_example, on_coarse_grid, signs_of
from zotune.core.site import Site
from zotune.errors import EngineError


def test_elements_are_those_of_u():
    checks.check_elements_are_those_of_u()


def test_rows_and_columns_turn():
    checks.check_rows_and_columns_turn()


def test_examples_and_shapes_share_no_signs():
    checks.check_examples_and_shapes_share_no_signs()


def test_sum_is_the_sum_of_examples():
    checks.check_sum_is_the_sum_of_examples()


@pytest.mark.parametrize("examples", [1, 5, 16, 17, 40])
def test_slices_have_the_bits_of_the_whole(examples):
    checks.check_slices_have_the_bits_of_the_whole(examples)


@pytest.mark.parametrize("examples", [6, 33])
def test_bits_are_those_of_exact_sums(examples):
    """Threads, chunks, reduced precision of matrix products and autocast have no part in an exact sum."""
    z = checks.direction()
    draws = torch.Generator().manual_seed(1)
    made = z.weighted(torch.randn(examples, generator=draws).tolist())
    site = Site("w", (700, 2 * CHUNK // 700))
    expected = made.realise(site)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(made.realise(site), expected)
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(made.realise(site), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.realise(site), expected)
    rows, columns = (signs_of(z.source, site, side, examples).double() for side in ("rows", "columns"))
    weights = torch.tensor(made.weights, dtype=torch.float64)
    exact = ((rows * weights[:, None]).T @ columns).float()
    assert torch.equal(expected, z.inner.realise(site) * exact)


def test_signs_do_not_depend_on_the_number_of_examples():
    site = Site("w", (3, 5))
    source = stream(0, "s")
    assert torch.equal(signs_of(source, site, "rows", 7)[:2], signs_of(source, site, "rows", 2))


def test_coarse_grid():
    """Half a unit of 2**-20 of the power of two above the largest."""
    made = on_coarse_grid([0.3, -1.7, 1e-9])
    assert max(abs(a - b) for a, b in zip(made, [0.3, -1.7, 1e-9], strict=True)) <= 2.0 ** (1 - WEIGHT_BITS) / 2
    assert all(float(x * 2 ** (WEIGHT_BITS - 1)).is_integer() for x in made)
    assert on_coarse_grid([0.0, 0.0]) == (0.0, 0.0)
    bad = on_coarse_grid([1.0, float("nan")])
    assert bad[0] == 1.0
    assert bad[1] != bad[1]


def test_there_is_no_one_tensor():
    with pytest.raises(EngineError, match="example"):
        (0.5 * checks.direction()).realise(Site("w", (2, 2)))


def test_example_of_combinations():
    z, u = checks.direction(), Noise(stream(0, "other"))
    site = Site("w", (4, 3))
    point = 0.5 * z + 2.0 * Scaled(u, {"w": 3.0})
    expected = 0.5 * z.example(2).realise(site) + 6.0 * u.realise(site)
    assert torch.allclose(for_example(point, 2).realise(site), expected, rtol=0, atol=1e-5)  # a few roundings of fp32
    scaled = Scaled(z, {"w": 4.0})
    assert torch.equal(for_example(scaled, 1).realise(site), 4 * z.example(1).realise(site))
    assert differs(point)
    assert differs(scaled)
    assert not differs(HERE)
    assert not differs(2.0 * u)


def test_zero_weights_touch_nothing():
    z = checks.direction()
    assert not z.weighted([0.0, 0.0]).touches(checks.SITES[0])
    assert not z.weighted([0.0, 0.0]).realise(checks.SITES[0]).any()
