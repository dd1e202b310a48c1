"""All back ends of the CPU give the same bits: the compiled kernels, the pure-torch one, and a spelled-out twin."""

import ctypes
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import peak_bytes

from zotune.kernels import native_packing
from zotune.kernels.codebook import SCALE, integer_rows
from zotune.kernels.contract import Addition, Run, Term
from zotune.kernels.philox import philox_scalar
from zotune.kernels.reference import ReferenceBackend

REFERENCE = ReferenceBackend()
WORDS = st.integers(0, 2**32 - 1)
SITES = st.integers(0, 2**64 - 1)
# First blocks, the ends of rows, tiles and blocks, and numbers whose block needs both counter words.
STARTS = st.one_of(st.integers(0, 10_000), st.sampled_from([63, 64, 4095, 4096, 2**41 - 5]), st.integers(0, 2**50))
COUNTS = st.one_of(st.integers(1, 9000), st.sampled_from([1, 64, 512, 4096, 8192]))
# Ordinary, tiny (products underflow), huge (they overflow), zero of both signs, and 0-d tensors.
NUMBERS = st.one_of(
    st.floats(-3, 3), st.sampled_from([0.0, -0.0, 1e-45, -3e-44, 1e-38, 2e38, -3e38, 1.0, -1e-3, 1e300, -1e-310])
)
SCALES = st.one_of(
    NUMBERS,
    NUMBERS.map(lambda x: torch.tensor(x, dtype=torch.float64)),
    st.floats(-3, 3, width=32).map(torch.tensor),
)
TERMS = st.builds(Term, st.tuples(WORDS, WORDS), st.sampled_from(["normal", "rademacher"]), SCALES)
SEVERAL = st.lists(TERMS, min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SETTINGS = st.tuples(st.integers(0, 3), st.integers(1, 3))  # instruction set, threads


@pytest.fixture
def every_call_may_wake_threads(monkeypatch):
    monkeypatch.setattr(native_packing, "WORTH_A_THREAD", 1)


@pytest.fixture(autouse=True)
def _as_before(native):
    yield
    torch.set_num_threads(1)
    native.level()
    native.apart()


def same(a, b):
    """Bit for bit, apart from which NaN it is."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    assert a.dtype == b.dtype
    assert torch.equal(nan, b.isnan() if b.is_floating_point() else nan)
    assert torch.equal(a.view(ints)[~nan], b.view(ints)[~nan])


def numbers(count, dtype, seed):
    """Any finite bits, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float64:
        values = torch.randn(count, generator=generator, dtype=dtype) * 10 ** torch.randint(
            -300, 300, (count,), generator=generator
        ).to(dtype)
    else:
        size, low = (torch.int32, 32) if dtype == torch.float32 else (torch.int16, 16)
        words = torch.randint(-(2 ** (low - 1)), 2 ** (low - 1), (count,), generator=generator, dtype=torch.int64)
        values = words.to(size).view(dtype)
    values = torch.where(values.isfinite(), values, torch.ones((), dtype=dtype))
    values[::7] = torch.randn(len(values[::7]), generator=generator).to(dtype)  # ordinary sizes, where rounding matters
    values[3::11] = -0.0
    return values


def low_bits(count, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(-(2**15), 2**15, (count,), generator=generator, dtype=torch.int64).to(torch.int16)


def run_for(data):
    if data.draw(st.booleans()):
        return Run(data.draw(SITES), data.draw(STARTS), data.draw(COUNTS))
    width = data.draw(st.sampled_from([1, 3, 63, 64, 65, 192, 576, 700]))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=6)))
    return Run(data.draw(SITES), 0, 0, rows, width)


def size(run):
    return run.count if run.rows is None else run.rows.numel() * run.width


def prepare(native, data):
    level, threads = data.draw(SETTINGS)
    native.level(level)
    native.apart(data.draw(st.booleans()))
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.usefixtures("every_call_may_wake_threads")
@given(data=st.data(), seed=st.integers(0, 99), terms=SEVERAL)
def test_add(native, data, seed, terms):
    run = run_for(data)
    start = numbers(size(run), data.draw(st.sampled_from([torch.float32, torch.float64])), seed)
    ours, expected = start.clone(), start.clone()
    prepare(native, data)
    native.add(ours, run, terms)
    REFERENCE.add(expected, run, terms)
    same(ours, expected)


@pytest.mark.parametrize("book", ["normal", "rademacher"])
def test_one_and_minus_one(native, book):
    """Scales that need no product."""
    run = Run(7, 0, 1 << 15)  # enough for a scaled codebook
    for backend in (native, REFERENCE):
        plus, minus, twice = (torch.zeros(run.count) for _ in "abc")
        for out, scale in ((plus, 1.0), (minus, -1.0), (twice, 2.0)):
            backend.add(out, run, [Term((1, 2), book, scale)])
        assert torch.equal(plus, -minus)
        assert torch.equal(plus, twice / 2)


@pytest.mark.usefixtures("every_call_may_wake_threads")
@given(data=st.data(), seed=st.integers(0, 99), terms=SEVERAL, dtype=DTYPES)
def test_perturb(native, data, seed, terms, dtype):
    run = run_for(data)
    stored = numbers(size(run), dtype, seed)
    signs = data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=3))
    carried = low_bits(size(run), seed) if dtype.itemsize == 2 and data.draw(st.booleans()) else None
    before = stored.clone()
    ours, expected = ([torch.empty_like(stored) for _ in signs] for _ in range(2))
    prepare(native, data)
    native.perturb(list(zip(ours, signs, strict=True)), stored, carried, run, terms)
    REFERENCE.perturb(list(zip(expected, signs, strict=True)), stored, carried, run, terms)
    same(stored, before)
    for one, other in zip(ours, expected, strict=True):
        same(one, other)
    if len(signs) == 1:  # the output may be the stored tensor
        native.perturb([(stored, signs[0])], stored, carried, run, terms)
        same(stored, expected[0])


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 1e-40, 1e-38, 1e-3, 3e38])
@pytest.mark.parametrize("carry", [False, True])
def test_every_bf16_number(native, level, scale, carry):
    """Subnormal ones, infinities and NaN too, which instructions for bf16 round otherwise."""
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    carried = low_bits(2**16, 0) if carry else None
    ours, expected = ([torch.empty_like(stored) for _ in "ab"] for _ in "ab")
    native.level(level)
    run, terms = Run(7, 0, 2**16), [Term((1, 2), "normal", scale)]
    native.perturb(list(zip(ours, (1.0, -1.0), strict=True)), stored, carried, run, terms)
    REFERENCE.perturb(list(zip(expected, (1.0, -1.0), strict=True)), stored, carried, run, terms)
    same(ours[0], expected[0])
    same(ours[1], expected[1])


@pytest.mark.usefixtures("every_call_may_wake_threads")
@given(data=st.data(), seed=st.integers(0, 99), terms=SEVERAL, dtype=DTYPES, start=STARTS, count=COUNTS)
def test_update(native, data, seed, terms, dtype, start, count):
    run = Run(data.draw(SITES), start, count)
    stored, carried = numbers(count, dtype, seed), low_bits(count, seed) if dtype.itemsize == 2 else None
    ours, expected = ((stored.clone(), None if carried is None else carried.clone()) for _ in range(2))
    prepare(native, data)
    native.update(*ours, run, terms)
    REFERENCE.update(*expected, run, terms)
    same(ours[0], expected[0])
    if carried is not None:
        same(ours[1], expected[1])


SIZES = st.sampled_from([0, 1, 63, 64, 511, 512, 513, 4097, 9000])


@pytest.mark.usefixtures("every_call_may_wake_threads")
@given(data=st.data(), seed=st.integers(0, 99), update=SEVERAL, terms=SEVERAL, dtype=DTYPES, count=SIZES)
def test_update_and_perturb(native, data, seed, update, terms, dtype, count):
    """One pass over a tensor: the bits of an update and of what reads it afterwards."""
    signs = data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=3))
    stored, carried = numbers(count, dtype, seed), low_bits(count, seed) if dtype.itemsize == 2 else None
    ours, expected = (
        Addition(stored.clone(), None if carried is None else carried.clone(), data.draw(SITES), update) for _ in "ab"
    )
    expected = replace(expected, site=ours.site)
    sides = [[torch.zeros_like(stored) for _ in signs] for _ in "ab"]
    versions = [t._version for t in (ours.stored, *sides[0])]
    prepare(native, data)
    native.update_and_perturb(ours, list(zip(sides[0], signs, strict=True)), terms)
    expected.apply(REFERENCE.update)
    REFERENCE.perturb(list(zip(sides[1], signs, strict=True)), *expected.flat, terms)
    same(ours.stored, expected.stored)
    if carried is not None:
        same(ours.carried, expected.carried)
    for one, other in zip(*sides, strict=True):
        same(one, other)
    if count:  # autograd is told
        assert all(t._version > before for t, before in zip((ours.stored, *sides[0]), versions, strict=True))


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 3)])
@pytest.mark.parametrize("book", ["normal", "rademacher"])
def test_an_update_and_a_query_of_so_many_terms(native, level, dtype, sizes, book):
    """Each has loops of its own for one term of numbers."""
    update, terms = ([Term((k, n), book if k == 0 else "normal", 0.1 + k) for k in range(n)] for n in sizes)
    low = low_bits(2000, 1) if dtype == torch.bfloat16 else None
    one, other = (Addition(numbers(2000, dtype, 1), None if low is None else low.clone(), 3, update) for _ in "ab")
    outs = [torch.empty(2000, dtype=dtype) for _ in "ab"]
    native.level(level)
    native.update_and_perturb(one, [(outs[0], 1.0)], terms)
    REFERENCE.update_and_perturb(other, [(outs[1], 1.0)], terms)
    same(outs[0], outs[1])
    same(one.stored, other.stored)


@pytest.mark.usefixtures("every_call_may_wake_threads")
@pytest.mark.parametrize("apart", [0, 1])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("update", [(), (Term((5, 6), "normal", 0.3),)])
def test_which_thread_writes_what_changes_no_bit(native, level, apart, dtype, update):
    """Half of both outs, or one of them whole: after an update that both need, and of chosen rows."""
    low = low_bits(5000, 1) if dtype == torch.bfloat16 else None
    one, other = (Addition(numbers(5000, dtype, 1), None if low is None else low.clone(), 3, update) for _ in "ab")
    outs = [[torch.empty(5000, dtype=dtype) for _ in "ab"] for _ in "ab"]
    terms, rows = [Term((1, 2), "normal", 0.7)], Run(3, 0, 0, torch.tensor([4, 0, 9, 2, 7]), 1000)
    native.level(level)
    native.apart(apart)
    torch.set_num_threads(2)
    for backend, whole, sides in [(native, one, outs[0]), (REFERENCE, other, outs[1])]:
        signed = list(zip(sides, (1.0, -1.0), strict=True))
        if update:
            backend.update_and_perturb(whole, signed, terms)
        else:
            backend.perturb(signed, *whole.flat, terms)
        assert not torch.equal(*sides)
    same(one.stored, other.stored)
    for ours, expected in zip(*outs, strict=True):
        same(ours, expected)
    for backend, whole, sides in [(native, one, outs[0]), (REFERENCE, other, outs[1])]:
        backend.perturb(list(zip(sides, (1.0, -1.0), strict=True)), *whole.flat[:2], rows, terms)
    for ours, expected in zip(*outs, strict=True):
        same(ours, expected)


@pytest.fixture
def one_thread_however_many_are_asked_for(native):
    """As in a parallel region of somebody else."""
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    run = ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(lambda each, data, *_: each(data))
    number, team = (ctypes.CFUNCTYPE(ctypes.c_int)(lambda n=n: n) for n in (0, 1))
    native._library.zotune_threads(run, number, team)
    yield
    native._library.zotune_threads(*(ctypes.c_void_p(address) for address in native.runtime.addresses or (None,) * 3))


@pytest.mark.usefixtures("every_call_may_wake_threads", "one_thread_however_many_are_asked_for")
@pytest.mark.parametrize("apart", [0, 1])
def test_fewer_threads_than_asked_for_do_it_all(native, apart):
    stored, terms = numbers(5000, torch.float32, 1), [Term((1, 2), "normal", 0.7)]
    outs = [[torch.zeros(5000) for _ in "ab"] for _ in "ab"]
    native.apart(apart)
    torch.set_num_threads(2)
    for backend, sides in zip((native, REFERENCE), outs, strict=True):
        backend.perturb(list(zip(sides, (1.0, -1.0), strict=True)), stored, None, Run(3, 0, 5000), terms)
    for ours, expected in zip(*outs, strict=True):
        same(ours, expected)


def test_how_dear_it_is_to_read_what_another_thread_wrote(native):
    """Some time with threads; how much is for nobody to test."""
    assert (native.crossing() > 0) == bool(native.runtime.addresses)
    assert native.apart(1)
    assert not native.apart(0)
    assert native.apart() in (True, False)


@pytest.mark.parametrize("few", [1, 200])
def test_an_update_and_a_query_of_many_terms(native, few):
    many = [Term((k, 0), "rademacher", 1e-3) for k in range(native_packing.MOST_TERMS)]
    one, other = (Addition(torch.zeros(700), None, 3, many[:few]) for _ in "ab")
    outs = [torch.zeros(700) for _ in "ab"]
    native.update_and_perturb(one, [(outs[0], 1.0)], many)
    REFERENCE.update_and_perturb(other, [(outs[1], 1.0)], many)
    same(outs[0], outs[1])
    same(one.stored, other.stored)


@pytest.mark.usefixtures("every_call_may_wake_threads")
@given(data=st.data(), shared=SEVERAL, places=st.lists(st.tuples(SIZES, DTYPES, st.booleans()), min_size=1, max_size=6))
def test_update_many(native, data, shared, places):
    """Tensors of any sizes and dtypes, some along the same terms, as one after the other."""
    ours, expected = [], []
    shared = tuple(shared)
    for number, (count, dtype, own) in enumerate(places):
        stored, carried = numbers(count, dtype, number), low_bits(count, number) if dtype.itemsize == 2 else None
        terms = tuple(data.draw(SEVERAL)) if own else shared
        for where in (ours, expected):
            low = None if carried is None else carried.clone()
            where.append(Addition(stored.clone(), low, 5 * number, terms))
    prepare(native, data)
    native.update_many(ours)
    for one in expected:
        one.apply(REFERENCE.update)
    for one, other in zip(ours, expected, strict=True):
        same(one.stored, other.stored)
        if one.carried is not None:
            same(one.carried, other.carried)


@pytest.mark.usefixtures("every_call_may_wake_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(9000, 512, 0, 4097, 1), (1, 4097, 9000), (512,) * 7])
def test_threads_share_tensors_of_different_sizes(native, threads, sizes):
    terms = (Term((1, 2), "normal", 0.1),)
    ours, expected = ([Addition(torch.zeros(n), None, k, terms) for k, n in enumerate(sizes)] for _ in range(2))
    torch.set_num_threads(threads)
    native.update_many(ours)
    for one in expected:
        one.apply(REFERENCE.update)
    assert all(torch.equal(one.stored, other.stored) for one, other in zip(ours, expected, strict=True))


def test_one_call_for_what_moves_along_the_same_terms(native, monkeypatch):
    calls = []
    monkeypatch.setattr(native, "_update_many", lambda job, places, count, threads: calls.append((count, threads)))
    terms, equal, other = ((Term((1, 2), "normal", scale),) for scale in (0.0, 0.0, -0.0))
    torch.set_num_threads(2)
    native.update_many([Addition(torch.zeros(40_000), None, k, terms) for k in range(5)])
    assert calls == [(5, 2)]  # 200,000 elements are worth a second thread, 40,000 are not
    native.update_many([Addition(torch.zeros(10), None, k, t) for k, t in enumerate((terms, other, equal))])
    assert calls[1:] == [(2, 1), (1, 1)]


def test_one_buffer_for_all_lengths_of_a_role():
    """The same tensor for the same question, and no second buffer when a longer one was asked for in between."""
    from zotune.kernels.workspace import _local, workspace

    def ask(count, role="test"):
        return workspace(role, count, torch.float32, torch.device("cpu"))

    short, long = ask(10), ask(1000)
    assert ask(1000) is long
    assert ask(10) is not short
    assert ask(10).data_ptr() == long.data_ptr() != ask(10, "another").data_ptr()
    for count in range(1, 1000):
        ask(count)
    assert len(_local.held) <= 256
    assert ask(999).data_ptr() == long.data_ptr()


def test_terms_are_packed_anew_when_they_may_have_changed(native):
    """A tuple of numbers is packed once; a list, or a tensor as scale, may hold other numbers in the next call."""
    run, scale = Run(0, 0, 64), torch.tensor(1.0)
    written, read = [Term((1, 2), "normal", 1.0)], (Term((1, 2), "normal", scale),)
    for terms in (written, read):
        for value in (1.0, 0.25):
            written[0] = Term((1, 2), "normal", value)
            scale.fill_(value)
            ours, expected = torch.zeros(64), torch.zeros(64)
            native.add(ours, run, terms)
            REFERENCE.add(expected, run, terms)
            same(ours, expected)


def z_by_hand(run, term):
    """One element at a time, from a counter in Python integers (which tests hold to the published Philox vectors)."""
    found = []
    for element in range(run.start, run.start + run.count):
        per_block = 512 if term.book == "normal" else 128
        block, inside = divmod(element, per_block)
        site = run.site & 0xFFFFFFFF, run.site >> 32
        drawn = philox_scalar((block & 0xFFFFFFFF, block >> 32, *site), term.key)
        if term.book == "normal":
            row = inside // 64
            found.append(integer_rows()[drawn[row // 2] >> 16 * (row % 2) & 0xFFF, inside % 64] / SCALE)
        else:
            found.append(1 - 2 * (drawn[inside // 32] >> inside % 32 & 1))
    return np.array(found, dtype=np.float64)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("book", ["normal", "rademacher"])
@pytest.mark.parametrize("start", [0, 500, 4090, 2**60 + 7])
def test_the_twin_that_is_spelled_out(native, backend, book, start):
    """scale * z of one term, in fp64, exactly; the first block of site 0 and key 0 is the first published known answer."""
    run, term = (
        Run(0 if start == 0 else 2**63 + 5, start, 600),
        Term((0, 0) if start == 0 else (7, 2**32 - 1), book, 0.3),
    )
    out = torch.zeros(600, dtype=torch.float64)
    {"native": native, "reference": REFERENCE}[backend].add(out, run, [term])
    assert np.array_equal(out.numpy(), 0.3 * z_by_hand(run, term))


def test_the_order_of_terms_is_the_order_of_summation(native):
    """Three fp32 products that round differently in another order: the contract is their order, not their set."""
    terms = [Term((i, 0), "normal", scale) for i, scale in enumerate((0.3, 1 / 7, -1 / 3))]
    run, sums = Run(1, 0, 4096), []
    for order in (terms, terms[::-1]):
        out = torch.zeros(4096)
        native.add(out, run, order)
        sums.append(out)
        by_hand = np.full(4096, -0.0, dtype=np.float32)
        for term in order:
            by_hand += np.float32(term.scale) * z_by_hand(run, term).astype(np.float32)
        assert np.array_equal(out.numpy(), by_hand)
    assert not torch.equal(*sums)


def test_more_terms_than_a_call_takes(native, monkeypatch):
    monkeypatch.setattr(native_packing, "MOST_TERMS", 3)
    terms = [Term((i, 9), "normal", 0.1 + i) for i in range(5)]
    run = Run(3, 10, 700)
    for dtype in (torch.float32, torch.bfloat16):
        stored, carried = numbers(700, dtype, 1), low_bits(700, 1) if dtype == torch.bfloat16 else None
        both = [(stored.clone(), None if carried is None else carried.clone()) for _ in range(2)]
        native.update(*both[0], run, terms)
        REFERENCE.update(*both[1], run, terms)
        same(both[0][0], both[1][0])


# ----------------------------------------------------------------------------------------------------------------------
# What comes with raw addresses


@pytest.mark.parametrize(
    ("out", "run"),
    [
        (torch.zeros(10, 10).t(), Run(0, 0, 100)),  # not contiguous
        (torch.zeros(99), Run(0, 0, 100)),  # too short
        (torch.zeros(10), Run(0, 0, 0, torch.tensor([1, 2]), 6)),  # rows do not fill it
    ],
)
def test_a_tensor_that_is_not_what_the_run_means_is_refused(native, out, run):
    with pytest.raises(ValueError, match="contiguous"):
        native.add(out, run, [Term((0, 0), "normal", 1.0)])


def test_outs_of_another_dtype_or_carried_bits_of_another_size_are_refused(native):
    stored, run, terms = torch.zeros(64, dtype=torch.bfloat16), Run(0, 0, 64), [Term((0, 0), "normal", 1.0)]
    with pytest.raises(ValueError, match="bfloat16"):
        native.perturb([(torch.zeros(64), 1.0)], stored, None, run, terms)
    with pytest.raises(ValueError, match="int16"):
        native.update(stored, torch.zeros(63, dtype=torch.int16), run, terms)


def test_additions_that_do_not_fit_are_refused(native):
    terms = (Term((0, 0), "normal", 1.0),)
    with pytest.raises(ValueError, match="contiguous"):
        native.update_many([Addition(torch.zeros(10, 10).t(), None, 1, terms)])
    too_few = Addition(torch.zeros(64, dtype=torch.bfloat16), torch.zeros(63, dtype=torch.int16), 1, terms)
    with pytest.raises(ValueError, match="int16"):
        native.update_many([too_few])


@pytest.mark.parametrize("together", [False, True])
def test_autograd_sees_that_a_tensor_was_written(native, together):
    """As after torch's own operations in place: a backward that needs the old values must fail, not be wrong."""
    weight, terms = torch.ones(64, requires_grad=True), (Term((0, 0), "normal", 1.0),)
    loss = (weight * weight).sum()
    with torch.no_grad():
        if together:
            native.update_many([Addition(weight, None, 0, terms)])
        else:
            native.add(weight, Run(0, 0, 64), terms)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do(native):
    native.add(torch.zeros(0), Run(0, 0, 0), [Term((0, 0), "normal", 1.0)])
    out = torch.tensor([-0.0])
    native.add(out, Run(0, 0, 1), [])
    assert math.copysign(1.0, float(out)) == -1.0
    stored, copy = torch.tensor([1.0, -0.0]), torch.empty(2)
    native.perturb([(copy, 1.0)], stored, None, Run(0, 0, 2), [])
    same(copy, stored)


MARK = 64  # bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_the_size_of_the_tensor(native, dtype):
    """The compiled kernels ask torch for nothing: they have 16 KB a term of their own. Pure torch works in five buffers of
    2**19 elements (two megabytes of fp32)."""
    count = 1 << 22
    stored, plus, minus = (torch.zeros(count, dtype=dtype) for _ in range(3))
    carried = torch.zeros(count, dtype=torch.int16) if dtype == torch.bfloat16 else None
    run, terms = Run(0, 0, count), [Term((0, 0), "normal", 0.1), Term((1, 0), "rademacher", 0.1)]

    def all_of_it(backend):
        backend.perturb([(plus, 1.0), (minus, -1.0)], stored, carried, run, terms)
        backend.update(stored, carried, run, terms)

    def with_fresh_buffers(backend):
        from zotune.kernels import row_numbers, workspace

        workspace._local.__dict__.clear()
        row_numbers.local.__dict__.clear()
        all_of_it(backend)
        torch.empty(MARK, dtype=torch.uint8)  # something at least, or the instrument says that it does not work

    assert peak_bytes(lambda: with_fresh_buffers(native)) <= MARK
    assert 1 << 20 < peak_bytes(lambda: with_fresh_buffers(REFERENCE)) < 16 << 20


def test_threads_are_those_of_torch(native):
    """A call makes no threads of its own: the team is one that torch has made, of the size that was asked for."""
    if not native.runtime.addresses:
        pytest.skip(native.runtime.reason)
    from pathlib import Path

    tasks = Path("/proc/self/task")
    torch.set_num_threads(2)
    large = torch.ones(1 << 22)
    large.add_(1.0)
    before = len(list(tasks.iterdir())) if tasks.is_dir() else 0
    assert native.team(2) == 2
    native.add(large, Run(0, 0, 1 << 22), [Term((0, 0), "normal", 1.0)])
    assert (len(list(tasks.iterdir())) if tasks.is_dir() else 0) == before
    assert native.team(1) == 1
