"""What the codebook's docstring claims, checked in integers: no tolerance anywhere."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from zotune.kernels.codebook import BASE_ROWS, LEVELS, SCALE, WIDTH, integer_rows, normal_rows, scaled_rows, sign_rows

GOLDEN = "c92dd2b8f4e84589b1e7b874ec8012fa75491114643ac4add6748cf673b9adb6"
CPU = torch.device("cpu")


def rows():
    return integer_rows()


def test_the_noise_has_not_changed():
    found = hashlib.sha256(rows().astype("<i4").tobytes()).hexdigest()
    assert found == GOLDEN, (
        f"The codebook hashes to {found}. Every run, ledger and recorded trajectory depends on it: a change is a Numerics "
        "change. If it is meant, say so under Numerics in CHANGELOG.md, raise the minor version in zotune/version.py and "
        "the ledger FORMAT in core/ledger.py (old ledgers can no longer be replayed), renew the hash here and "
        "tests/math/golden.json."
    )


def test_shape_and_range():
    assert rows().shape == (4096, WIDTH)
    assert int(np.abs(rows()).max()) == max(LEVELS) == 83


def test_tight_frame():
    """sum over rows of row^T row = 4096 * 32**2 * I: so E[z z^T] = I and rho * z is unbiased, exactly."""
    assert np.array_equal(rows().T @ rows(), 4096 * SCALE**2 * np.eye(WIDTH, dtype=np.int64))


def test_mean_is_zero_in_every_column():
    assert not rows().sum(axis=0).any()


def test_odd_moments_vanish():
    """With every row its negative is there."""
    assert not (rows() ** 3).sum(axis=0).any()
    assert np.array_equal(rows()[:2048], -rows()[2048:])


def test_levels_have_unit_variance():
    assert sum(level**2 for level in LEVELS) == BASE_ROWS * SCALE**2


def test_each_column_of_the_base_rows_is_a_permutation_of_the_levels():
    """Walsh row 0 is all ones, so the first 32 rows are the base rows."""
    base = np.abs(rows()[:BASE_ROWS])
    assert all(sorted(base[:, column]) == sorted(LEVELS) for column in range(WIDTH))


def test_kurtosis():
    """E[z^4] = 3.00003 as stated, E[z^6] = 13.9."""
    fourth = Fraction(sum(level**4 for level in LEVELS), BASE_ROWS * SCALE**4)
    sixth = Fraction(sum(level**6 for level in LEVELS), BASE_ROWS * SCALE**6)
    assert round(float(fourth), 5) == 3.00003
    assert round(float(sixth), 1) == 13.9


def test_row_norms_vary_as_those_of_gaussian_rows():
    """|row|^2 has mean 64 and variance 128.02; 64 Gaussian numbers have 64 and 128."""
    squares = [int(v) for v in (rows() ** 2).sum(axis=1)]
    mean = Fraction(sum(squares), len(squares) * SCALE**2)
    variance = Fraction(sum(v * v for v in squares), len(squares) * SCALE**4) - mean**2
    assert mean == WIDTH
    assert round(float(variance), 2) == 128.02


def test_fourth_moment_along_any_direction_is_near_gaussian():
    """E[(g.z)^2 |z|^2] = (64 + 2) |g|^2 for Gaussian rows: what makes E|rho z|^2 = (d + 2)|g|^2.

    Exact over the codebook. On average over directions it is (Var|row|^2 + 64^2)/64 = 66.0004. For a gradient in a single
    column it lies between 58.8 and 71.2, because the squares of some columns are correlated: at most 7.2 of d + 2 in a
    tensor of d numbers, as the other blocks are independent.
    """
    z = rows().astype(object)
    norms = (z**2).sum(axis=1)
    per_column = [Fraction(int((z[:, c] ** 2 * norms).sum()), 4096 * SCALE**4) for c in range(WIDTH)]
    assert round(float(sum(per_column) / WIDTH), 4) == 66.0004
    assert all(58.8 < float(m) < 71.3 for m in per_column)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_in_every_dtype(dtype):
    """7-bit integers over 32 fit the 8 bits of bf16."""
    assert np.array_equal((normal_rows(dtype, CPU).double() * SCALE).numpy(), integer_rows())


def test_signs_are_the_bits_of_the_row_number():
    signs = sign_rows(torch.float32, CPU)
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert len({tuple(row) for row in signs.tolist()}) == 256
    assert torch.equal(signs[0b00000101], torch.tensor([-1.0, 1, -1, 1, 1, 1, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_scale_gives_the_bits_of_a_number_scale(dtype):
    """Probes are scaled by a Python number, updates by a 0-d tensor: the product must not depend on which."""
    scale = 0.1234567890123
    by_number = scaled_rows("normal", scale, dtype, CPU)
    assert torch.equal(by_number, scaled_rows("normal", torch.tensor(scale, dtype=torch.float64), dtype, CPU))
    assert torch.equal(by_number, normal_rows(dtype, CPU) * torch.tensor(scale, dtype=torch.float64).to(dtype))
