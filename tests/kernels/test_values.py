"""Values of bf16 tensors read, written and summed: the compiled kernels against torch, bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.test_backends import SETTINGS, low_bits, numbers, same

from zotune.kernels.moments import PIECE, piece_sums
from zotune.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.usefixtures("every_setting")
REFERENCE = ReferenceBackend()
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
COUNTS = st.one_of(st.integers(0, 5000), st.sampled_from([1, 63, 64, 65, 128]))


def prepare(native, setting):
    level, threads = setting
    native.level(level)
    torch.set_num_threads(threads)


@given(SETTINGS, COUNTS, st.sampled_from([BF16, FP16]), st.booleans(), st.integers(0, 99))
def test_read(native, setting, count, dtype, carry, seed):
    stored, carried = numbers(count, dtype, seed), low_bits(count, seed) if carry else None
    ours, expected = torch.empty(count), torch.empty(count)
    before = ours._version
    prepare(native, setting)
    native.read(stored, carried, ours)
    REFERENCE.read(stored, carried, expected)
    same(ours, expected)
    assert ours._version > before  # autograd is told


@given(SETTINGS, COUNTS, st.sampled_from([BF16, FP16]), st.integers(0, 99))
def test_write(native, setting, count, dtype, seed):
    values = numbers(count, FP32, seed)
    ours, expected = ((torch.empty(count, dtype=dtype), torch.empty(count, dtype=torch.int16)) for _ in "ab")
    versions = [tensor._version for tensor in ours]
    prepare(native, setting)
    native.write(values, *ours)
    REFERENCE.write(values, *expected)
    same(ours[0], expected[0])
    same(ours[1], expected[1])
    if count:  # autograd is told
        assert all(tensor._version > before for tensor, before in zip(ours, versions, strict=True))
    if dtype == BF16:  # nothing is lost
        back = torch.empty(count)
        native.read(*ours, back)
        same(back, values)


@pytest.mark.parametrize("level", range(4))
def test_every_number_is_read(native, level):
    """Infinities and NaN too."""
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    native.level(level)
    ours = torch.empty(2**16)
    native.read(stored, None, ours)
    same(ours, stored.to(FP32))


def test_other_layouts_are_read_and_written_by_torch(native):
    stored, carried = numbers(600, BF16, 1).view(20, 30).t(), low_bits(600, 1).view(20, 30).t()
    out = torch.empty(30, 20)
    native.read(stored, carried, out)
    flat = torch.empty(600)
    native.read(stored.contiguous().view(-1), carried.contiguous().view(-1), flat)
    same(out.view(-1), flat)
    native.write(out * 2, stored, carried)
    native.read(stored, carried, out)
    same(out.view(-1), flat * 2)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 4096, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE - 77])
def test_moments(native, level, threads, dtype, count):
    values = torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(count))
    prepare(native, (level, threads))
    ours = native.moments(values, 0.3)
    same(ours, piece_sums(values, 0.3))
    assert ours.shape == (math.ceil(count / PIECE), 2)
    for piece, (first, second) in zip(values.split(PIECE), ours.tolist(), strict=True) if count else ():
        near = [x - 0.3 for x in piece.tolist()]
        # fp64 sums of at most 32,768 numbers of size 1, in a tree of depth 15
        assert first == pytest.approx(math.fsum(near), abs=1e-10)
        assert second == pytest.approx(math.fsum(x * x for x in near), rel=1e-13)


def test_moments_of_what_is_not_finite(native):
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.ones(200)
        values[130] = bad
        assert not native.moments(values, 0.0).isfinite().any()
        same(native.moments(values, 0.0), piece_sums(values, 0.0))


def test_the_kernels_look_at_what_they_are_given(native):
    """Addresses are passed on."""
    with pytest.raises(ValueError, match="contiguous"):
        native.read(torch.zeros(5, dtype=BF16), None, torch.zeros(4))
    with pytest.raises(ValueError, match="contiguous"):
        native.write(torch.zeros(5), torch.zeros(5, dtype=BF16), torch.zeros(4, dtype=torch.int16))
    with pytest.raises(ValueError, match="contiguous"):
        native.moments(torch.zeros(5, dtype=BF16), 0.0)


@pytest.mark.parametrize("level", range(4))
def test_halves_are_rounded_away_from_zero(native, level):
    """Then the carried bits are all that is left: no number in the middle between two bf16 numbers is lost."""
    high = torch.arange(-(2**15), 2**15 - 1, 7, dtype=torch.int32) << 16
    values = torch.cat([(high | low).view(FP32) for low in (0x7FFF, 0x8000, 0x8001)])
    values = values[values.isfinite()]
    ours, expected = ((torch.empty(len(values), dtype=BF16), torch.empty(len(values), dtype=torch.int16)) for _ in "ab")
    native.level(level)
    native.write(values, *ours)
    REFERENCE.write(values, *expected)
    same(ours[0], expected[0])
    same(ours[1], expected[1])
    back = torch.empty_like(values)
    native.read(*ours, back)
    same(back, values)
