"""Directions form a vector space, and every way of adding one gives the same numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.core.direction import HERE, Combination, Direction, Noise, Scaled, Stored
from zotune.core.noise import stream
from zotune.core.site import Site

SITE = Site("layer.weight", (40, 30))
OTHER = Site("layer.bias", (30,))
number = st.floats(-10, 10, allow_subnormal=False)


def z(index=0, kind="normal"):
    return Noise(stream(0, "direction", index), kind)


def stored():
    generator = torch.Generator().manual_seed(5)
    return Stored({SITE.name: torch.randn(*SITE.shape, generator=generator), OTHER.name: torch.randn(30)})


MAKERS = {
    "noise": z,
    "gaussian": lambda: z(kind="gaussian"),
    "stored": stored,
    "stored, not contiguous": lambda: Stored({SITE.name: stored().tensors[SITE.name].t().contiguous().t()}),
    "scaled": lambda: Scaled(z(), {SITE.name: 0.3}, otherwise=2.0),
    "scaled by a tensor": lambda: Scaled(z(), {SITE.name: torch.tensor(0.3, dtype=torch.float64)}),
    "one term": lambda: 0.7 * z(),
    "three terms": lambda: 0.7 * z(0) - z(1) / 3 + torch.tensor(0.1, dtype=torch.float64) * stored(),
    "nested": lambda: 2.0 * Scaled(0.5 * z(0) + z(1), {SITE.name: 0.25}),
}
directions = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def realise(direction, site=SITE):
    return direction.realise(site, torch.float64)


def close(a, b, terms=3):
    """fp64 sums of a few products of numbers below 1e3: a handful of roundings of 2**-53 each."""
    return torch.allclose(realise(a), realise(b), rtol=0, atol=terms * 1e3 * 2.0**-52)


@given(number, number)
def test_vector_space_laws(a, b):
    """To rounding, since terms are added in another order."""
    x, y, w = z(0), Scaled(z(1), {SITE.name: 0.5}), stored()
    assert close((x + y) + w, x + (y + w))
    assert close(x + y, y + x)
    assert close(a * (x + y), a * x + a * y)
    assert close((a + b) * x, a * x + b * x)
    assert close(a * (b * x), (a * b) * x)
    assert close(x - y, x + -1.0 * y)
    assert close(x / 8, x * 0.125)
    assert close(x + HERE, x)
    assert close(0.0 * x + y, y)


@directions
def test_a_combination_is_the_sum_of_its_terms(make):
    """Compared with the sum made of realised tensors, so that the laws above cannot hold by all being wrong."""
    one = make()
    expected = 1.5 * realise(one) - 0.25 * realise(z(9))
    assert torch.allclose(realise(1.5 * one - 0.25 * z(9)), expected, rtol=0, atol=1e-13)


@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_parts_and_rows_agree_bit_for_bit(make, dtype):
    direction = make()
    start = torch.randn(SITE.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    whole = start.clone()
    direction.add_to(whole, SITE, 0.123)

    pieces = start.clone().view(-1)
    for begin, end in ((0, 1), (1, 77), (77, 640), (640, 1200)):
        direction.add_to(pieces[begin:end], SITE.part(begin, end - begin), 0.123)
    assert torch.equal(pieces.view(SITE.shape), whole)

    rows = torch.tensor([7, 0, 39, 7])
    chosen = start[rows]
    direction.add_to(chosen, SITE.take(rows), 0.123)
    assert torch.equal(chosen, whole[rows])

    block = start[5:9].clone()
    direction.add_to(block, SITE.row_range(5, 9), 0.123)
    assert torch.equal(block, whole[5:9])


@directions
def test_outputs_that_are_not_contiguous(make):
    direction = make()
    expected = torch.ones(SITE.shape)
    direction.add_to(expected, SITE)
    turned = torch.ones(SITE.shape[::-1]).t()
    assert not turned.is_contiguous()
    direction.add_to(turned, SITE)
    assert torch.equal(turned, expected)


@directions
def test_a_tensor_scale_gives_the_bits_of_a_number_scale(make):
    """Probes scale by numbers and updates by 0-d tensors: contract 2 needs them to agree."""
    by_number, by_tensor = torch.zeros(SITE.shape), torch.zeros(SITE.shape)
    make().add_to(by_number, SITE, 0.1)
    make().add_to(by_tensor, SITE, torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(by_number, by_tensor)


@directions
def test_adding_is_repeatable(make):
    direction = make()
    assert torch.equal(realise(direction), realise(direction))


@pytest.mark.parametrize("factor", [2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), 2])
def test_factors_on_either_side(factor):
    for product in (factor * z(), z() * factor, factor * (1.0 * z())):
        assert isinstance(product, Direction)
        assert torch.equal(realise(product), 2 * realise(z()))
    assert torch.equal(realise(z() / factor), realise(z()) / 2)


def test_signs():
    assert torch.equal(realise(-z()), -realise(z()))
    assert +z(0) is not None
    assert torch.equal(realise(+z()), realise(z()))


def test_here_is_zero_and_touches_nothing():
    out = torch.full(SITE.shape, math.nan)
    HERE.add_to(out, SITE)
    assert bool(out.isnan().all())
    assert not HERE.touches(SITE)
    assert not HERE
    assert not -HERE * 3
    assert z() * 0.0


def test_scaled_by_zero_touches_nothing_and_reads_nothing():
    block = Scaled(z(), {SITE.name: 1.0}, otherwise=0.0)
    assert block.touches(SITE)
    assert not block.touches(OTHER)
    assert not (3.0 * block).touches(OTHER)
    assert torch.equal(realise(block, OTHER), torch.zeros(30, dtype=torch.float64))
    assert not Scaled(HERE, {}).touches(SITE)


def test_stored_without_a_tensor_is_zero_in_a_combination():
    partial = Stored({SITE.name: torch.ones(SITE.shape)})
    assert not partial.touches(OTHER)
    assert torch.equal(realise(partial + z(), OTHER), realise(z(), OTHER))


def test_several_terms_round_the_output_once():
    """w + (a z1 + b z2) and not (w + a z1) + b z2: with a large w the second loses bits twice. Exact in fp32."""
    out = torch.full(SITE.shape, 4096.0)
    combination = 1e-3 * z(0) + 1e-3 * z(1)
    combination.add_to(out, SITE)
    assert torch.equal(out, 4096.0 + combination.realise(SITE))


def test_combination_is_immutable():
    """An estimate that is kept must not change when a method goes on adding."""
    first = Combination()
    total = first
    total += 1.0 * z()
    assert not first
    assert total
