"""Masks, and numbers of tensors, in the compiled kernels: the bits of what torch does with them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.test_backends import SCALES, SITES, WORDS, low_bits, numbers, prepare, same
from tests.support.models import bits
from torch import nn

from zotune.core.direction import Combination, Noise, Scaled, Stored, kernel_terms
from zotune.core.factors import Factors
from zotune.core.low_rank import LowRank
from zotune.core.masked import Masked
from zotune.core.noise import Stream, lanes, stream
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.kernels import native_packing
from zotune.kernels.contract import LANES, Addition, Mask, Run, Term
from zotune.kernels.dispatch import using
from zotune.kernels.reference import ReferenceBackend

CPU = torch.device("cpu")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZE, WIDTH = 9000, 60  # of a site: more than two tiles, and rows that begin anywhere in the kernels' own


class Twin(ReferenceBackend):
    """Sums spelled out: each product on all elements, rounded, then added in turn to -0.0."""

    def sums(self, like, run, terms):
        products = [self.product(like, run, term) for term in terms]

        def total(offset, count):
            whole = torch.full((count,), -0.0, dtype=like.dtype)
            for product in products:
                whole += product[offset : offset + count]
            return whole

        return total

    def product(self, like, run, term):
        if term.replayed:
            made = super().sums(like, run, [Term(term.key, term.book, term.scale)])(0, size(run)).clone()
        else:
            all_of_it = whole(term).to(like.dtype) * term.scale
            rows = all_of_it.view(-1, run.width)[run.rows].reshape(-1) if run.rows is not None else all_of_it
            made = rows if run.rows is not None else rows[run.start : run.start + run.count]
        if term.mask is None:
            return made
        site = SimpleNamespace(id=run.site, start=run.start, count=run.count, rows=run.rows, width=run.width)
        kept = lanes(Stream(term.mask.key), site, CPU) < term.mask.limit
        return torch.where(kept, made, torch.tensor(-0.0, dtype=made.dtype))


pytestmark = pytest.mark.usefixtures("every_setting")
TWIN = Twin()


def whole(term):
    """The numbers of all elements of the site."""
    if term.numbers is not None:
        return term.numbers
    return (term.factors.left.double() @ term.factors.right.double()).view(-1)


def size(run):
    return run.count if run.rows is None else run.rows.numel() * run.width


@st.composite
def thin_factors(draw):
    """Of matrices that are narrower and wider than the kernels' rows; the left one in either layout."""
    rows, rank, single = draw(st.sampled_from([1, 2, 60, 75, 125, 9000])), draw(st.integers(1, 5)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sides = [torch.randn(n, rank, generator=generator) for n in (rows, SIZE // rows)]
    sides = [(side * 32).round() / 32 for side in sides] if single else sides
    factors = replace(Factors.of(*sides), single=single).thin
    return replace(factors, left=factors.left.t().contiguous().t()) if draw(st.booleans()) else factors


@st.composite
def one_term(draw):
    limit = st.one_of(st.integers(1, LANES), st.sampled_from([1, LANES // 4, LANES - 1, LANES]))
    mask = draw(st.one_of(st.none(), st.builds(Mask, st.tuples(WORDS, WORDS), limit)))
    book, key, scale = (
        draw(st.sampled_from(["normal", "rademacher", "given"])),
        draw(st.tuples(WORDS, WORDS)),
        draw(SCALES),
    )
    if book != "given":
        return Term(key, book, scale, mask)
    dtype = draw(st.sampled_from([FP32, FP64, BF16]))
    return Term((0, 0), book, scale, mask, numbers(SIZE, dtype, draw(st.integers(0, 99))))


def several(draw):
    return tuple(draw(st.lists(one_term(), min_size=1, max_size=3)))


def a_run(draw):
    site = draw(SITES)
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(0, SIZE // WIDTH - 1), min_size=1, max_size=6))
        return Run(site, 0, 0, torch.tensor(rows), WIDTH)
    start = draw(st.one_of(st.integers(0, SIZE - 1), st.sampled_from([0, 63, 64, 4095, 4096])))
    return Run(site, start, draw(st.integers(1, SIZE - start)))


@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from([FP32, FP64]))
def test_add(native, data, seed, dtype):
    run, terms = a_run(data.draw), several(data.draw)
    start = numbers(size(run), dtype, seed)
    ours, expected = start.clone(), start.clone()
    prepare(native, data)
    assert native.takes(terms)
    native.add(ours, run, terms)
    TWIN.add(expected, run, terms)
    same(ours, expected)


@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from([FP32, FP64, BF16, FP16]))
def test_perturb(native, data, seed, dtype):
    run, terms = a_run(data.draw), several(data.draw)
    stored = numbers(size(run), dtype, seed)
    carried = low_bits(size(run), seed) if dtype.itemsize == 2 and data.draw(st.booleans()) else None
    ours, expected = ([torch.empty_like(stored) for _ in "ab"] for _ in "ab")
    prepare(native, data)
    native.perturb(list(zip(ours, (1.0, -1.0), strict=True)), stored, carried, run, terms)
    TWIN.perturb(list(zip(expected, (1.0, -1.0), strict=True)), stored, carried, run, terms)
    same(ours[0], expected[0])
    same(ours[1], expected[1])


@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from([FP32, FP64, BF16, FP16]))
def test_update_and_what_reads_it(native, data, seed, dtype):
    update, terms = several(data.draw), several(data.draw)
    stored, low = numbers(SIZE, dtype, seed), low_bits(SIZE, seed) if dtype.itemsize == 2 else None
    site = data.draw(SITES)
    ours, together, expected = (
        Addition(stored.clone(), None if low is None else low.clone(), site, update) for _ in "abc"
    )
    sides = [torch.empty_like(stored) for _ in "ab"]
    prepare(native, data)
    native.update_and_perturb(ours, [(sides[0], -1.0)], terms)
    native.update_many([together])
    expected.apply(TWIN.update)
    TWIN.perturb([(sides[1], -1.0)], *expected.flat, terms)
    same(sides[0], sides[1])
    for one in (ours, together):
        same(one.stored, expected.stored)
        if low is not None:
            same(one.carried, expected.carried)


def test_tensors_of_one_update_have_numbers_of_their_own(native):
    several = [Addition(torch.zeros(70), None, 1, (Term.given(torch.full((70,), v), 2.0),)) for v in (1.0, 5.0)]
    native.update_many(several)
    assert [addition.stored.unique().tolist() for addition in several] == [[2.0], [10.0]]


# ----------------------------------------------------------------------------------------------------------------------
# Directions


SHAPE = (37, 65)
SITE = Site("w", SHAPE)
A = Noise(stream(0, "a"))
THIN = LowRank({"w": Factors.of(torch.randn(37, 3), torch.randn(65, 3))})
RESHAPED = LowRank({"w": Factors.of(torch.randn(13, 3), torch.randn(185, 3))})
LEARNED = Stored({"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))})
SPARSE = Masked(A, stream(0, "mask"), {"w": 0.3})
DIRECTIONS = {
    "masked": 0.1 * SPARSE,
    "masked signs": 0.1 * Masked(Noise(stream(0, "b"), "rademacher"), stream(0, "mask"), {}, 0.7),
    "masked, scaled inside": 0.1 * Masked(Scaled(A, {"w": 3.0}), stream(0, "mask"), {"w": 0.3}),
    "all are kept": 0.1 * Masked(A, stream(0, "mask")),
    "stored": 0.1 * LEARNED,
    "stored in half": 0.1 * Stored({"w": LEARNED.tensors["w"].to(BF16)}),
    "mean and noise": 0.1 * LEARNED + 0.2 * A,
    "low-rank": 0.1 * THIN,
    "low-rank, reshaped": 0.1 * RESHAPED,
    "low-rank, signs": 0.1 * LowRank({"w": Factors.of(torch.ones(37, 1), torch.ones(65, 1))}),
    "low-rank and noise": 0.1 * THIN + 0.2 * A - 0.3 * RESHAPED,
    "mean and masked noise": 0.1 * (LEARNED + 2.0 * SPARSE),
}
LONG_WAY = {
    "exact normals": 0.1 * Masked(Noise(stream(0, "c"), "gaussian"), stream(0, "mask"), {"w": 0.3}),
    "a masked sum": 0.1 * Masked(A + 0.5 * A, stream(0, "mask"), {"w": 0.3}),
    "a masked mean": 0.1 * Masked(LEARNED, stream(0, "mask"), {"w": 0.3}),
    "a mask twice": 0.1 * Masked(SPARSE, stream(0, "other"), {"w": 0.5}),
    "turned": 0.1 * Stored({"w": LEARNED.tensors["w"].t().contiguous().t()}),
    "of a part": 0.1 * Stored({"w": LEARNED.tensors["w"][:5].contiguous()}),
    "low-rank of another size": 0.1 * LowRank({"w": Factors.of(torch.randn(37, 3), torch.randn(64, 3))}),
    "more masks than a call takes": Combination(((0.1, SPARSE),) * (native_packing.MOST_TERMS + 1)),
    "fp16": 0.1 * Stored({"w": LEARNED.tensors["w"].to(FP16)}),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_what_the_kernels_take(native, name):
    with using(native):
        assert kernel_terms(DIRECTIONS[name], SITE, CPU)
    with using(ReferenceBackend()):
        drawn = name == "all are kept"
        assert bool(kernel_terms(DIRECTIONS[name], SITE, CPU)) == drawn


@pytest.mark.parametrize("name", LONG_WAY)
def test_what_they_do_not(native, name):
    with using(native):
        assert kernel_terms(LONG_WAY[name], SITE, CPU) is None


def test_zero_where_nothing_is_kept(native):
    with using(native):
        assert kernel_terms(0.1 * Masked(A, stream(0, "mask"), {"w": 0.0}), SITE, CPU) == ()


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_with_the_kernels_and_without(native, dtype, name):
    """Points of both signs, parts, rows, and a move: the same bits."""
    direction, results = DIRECTIONS[name], []
    for backend in (native, ReferenceBackend()):
        with using(backend), torch.no_grad():
            weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))
            made = Weights([("w", weight)])
            slot, outs = made.slots["w"], tuple(torch.empty(SHAPE, dtype=dtype) for _ in "abc")
            made.update(slot, lambda values, part: direction.add_to(values, part, 0.5), 0.5 * direction)
            made.perturb_many(slot, slot.site, (direction, -direction, Combination()), outs)
            parts = [slot.site.part(65, 1000), slot.site.take(torch.tensor([36, 2, 2]))]
            some = [torch.empty(part.numel, dtype=dtype) for part in parts]
            for part, out in zip(parts, some, strict=True):
                made.perturb(slot, part, direction, out)
            results.append([*outs, *some, weight.detach().clone()])
            assert not torch.equal(outs[0], outs[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_points_along_other_masks_or_numbers_are_drawn_apart(native):
    """Equal keys and scales are not enough to be one draw."""
    other = Stored({"w": torch.ones(SHAPE)})
    points = (0.1 * SPARSE, 0.1 * A, 0.1 * Masked(A, stream(0, "mask"), {"w": 0.4}), 0.1 * LEARNED, 0.1 * other)
    outs = tuple(torch.empty(SHAPE) for _ in points)
    made = Weights([("w", nn.Parameter(torch.zeros(SHAPE)))])
    with using(native), torch.no_grad():
        made.perturb_many(made.slots["w"], SITE, points, outs)
    for point, out in zip(points, outs, strict=True):
        assert torch.equal(out.view(-1), point.realise(SITE).view(-1))
    assert len({float(out.norm()) for out in outs}) == len(points)


def test_both_sides_of_a_low_rank_pair_are_one_draw(native):
    made = Weights([("w", nn.Parameter(torch.zeros(SHAPE)))])
    grouped, rest = made._draws.of((0.1 * THIN, -0.1 * THIN, 0.1 * RESHAPED), SITE, CPU)
    assert rest == []
    assert [signs for _, signs in grouped] == [[(0, 1.0), (1, -1.0)], [(2, 1.0)]]


def test_a_late_move_along_a_learned_vector_is_not_late(native):
    """The vector may be another when the next query reads the tensor."""
    learned = torch.ones(SHAPE)
    made = Weights([("w", nn.Parameter(torch.zeros(SHAPE)))])
    slot, along = made.slots["w"], 1.0 * Stored({"w": learned})
    with using(native), torch.no_grad():
        made.update_all([(slot, lambda values, part: along.add_to(values, part), along)], late=True)
        learned.zero_()
        assert math.prod(SHAPE) == float(slot.tensor.sum())


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("element", [5, 6, 40, 200, 4100])
def test_a_limit_is_the_first_number_that_is_left_out(native, level, element):
    bits_of_all = lanes(Stream((1, 2)), SimpleNamespace(id=7, start=0, count=SIZE, rows=None, width=1), CPU)
    native.level(level)
    for limit in (int(bits_of_all[element]), int(bits_of_all[element]) + 1):
        out = torch.zeros(SIZE)
        native.add(out, Run(7, 0, SIZE), (Term((3, 4), "rademacher", 1.0, Mask((1, 2), limit)),))
        assert torch.equal(out != 0, bits_of_all < limit)
