"""Low-rank products of the compiled kernels against the same in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.kernels import native_packing
from zotune.kernels.reference import ReferenceBackend

SIZES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def _as_before(native, monkeypatch):
    monkeypatch.setattr(native_packing, "WORTH_A_THREAD", 1)
    yield
    torch.set_num_threads(1)
    native.level()


def operands(copies, each, width, out, rank, dtype, turned, seed=0):
    draws = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(copies * each, n, generator=draws).to(dtype) for n in (out, width))
    kept = torch.randn(rank, width, generator=draws)
    fresh = torch.randn((copies, out, rank) if turned else (copies, rank, out), generator=draws)
    return y, x, kept, fresh.transpose(1, 2) if turned else fresh


@pytest.mark.parametrize("by", ["native", "reference"])
@given(
    copies=st.integers(1, 4), each=st.integers(1, 6), width=SIZES, out=SIZES, rank=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), turned=st.booleans(), level=st.integers(0, 3),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_products(native, by, copies, each, width, out, rank, dtype, turned, level, threads):
    """Sums in fp32: 2**-24 for each of the width + rank + 1 roundings of numbers whose sizes add up to `size`.

    Then one rounding to the dtype.
    """
    y, x, kept, fresh = operands(copies, each, width, out, rank, dtype, turned)
    inner = (x.double() @ kept.double().T).view(copies, each, rank)
    expected = y.double().view(copies, each, out) + inner @ fresh.double()
    size = (x.double().abs() @ kept.double().abs().T).view(copies, each, rank) @ fresh.double().abs()
    bound = 2.0**-24 * (width + rank + 1) * (size + y.double().abs().view(copies, each, out))
    native.level(level)
    torch.set_num_threads(threads)
    (native if by == "native" else ReferenceBackend()).add_low_rank(y, x, kept, fresh)
    found = y.double().view(copies, each, out)
    rounding = torch.finfo(dtype).eps / 2 * (expected.abs() + bound)
    assert bool(((found - expected).abs() <= bound + rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(native, dtype):
    made = []
    for threads in (1, 2, 3):
        y, x, kept, fresh = operands(2, 31, 576, 300, 4, dtype, True)
        torch.set_num_threads(threads)
        native.add_low_rank(y, x, kept, fresh)
        made.append(y)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_what_does_not_fit_is_refused(native):
    y, x, kept, fresh = operands(2, 3, 8, 5, 2, torch.float32, False)
    wrong = [
        (y[:, :4], x, kept, fresh),
        (y, x.bfloat16(), kept, fresh),
        (y, x, kept.double(), fresh),
        (y, x, kept, fresh.double()),
        (y, x, kept[:, :7], fresh),
        (y, x, kept, fresh.repeat(2, 1, 1)),
        (y, x, kept.t().contiguous().t(), fresh),
        (y.t().contiguous().t(), x, kept, fresh),
        (y, x.t().contiguous().t(), kept, fresh),
        (y, x, kept, fresh[:, :, :4]),
        (y, x, kept, fresh.transpose(0, 2).contiguous().transpose(0, 2)),
    ]
    for operands_ in wrong:
        with pytest.raises(ValueError, match="No thin product"):
            native.add_low_rank(*operands_)


def test_which_dtypes(native):
    assert native.adds_low_rank(torch.float32)
    assert native.adds_low_rank(torch.bfloat16)
    assert not native.adds_low_rank(torch.float64)
    assert not native.adds_low_rank(torch.float16)


def test_autograd_is_told(native):
    y, x, kept, fresh = operands(2, 3, 8, 5, 2, torch.float32, False)
    before = y._version
    native.add_low_rank(y, x, kept, fresh)
    assert y._version > before
