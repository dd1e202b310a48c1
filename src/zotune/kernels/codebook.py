"""The codebook: 4,096 fixed rows of 64 normal-like numbers, from which the default noise is made.

A random row index costs two random bytes and buys 64 numbers, so noise is copied from cache instead of computed: no
logarithm, no cosine, the same bits on every device, and memory speed with nothing but torch.

    row(sign, w, b) = sign * LEVELS[perm_b] * flips_b * WALSH[w]       2 signs x 64 Walsh rows x 32 base rows

* Every number is an integer over 32, so it is exact in fp32, fp16 and bf16, and so is every sign change of it.
* In each column the 32 base rows hold each of the 32 levels once, and sum(LEVELS**2) / 32 = 32**2: unit variance, exactly.
* The Walsh rows are orthogonal, so sum over rows of row^T row = 4096 * I, exactly: a tight frame. The two signs make the
  mean zero, exactly. Hence E[z z^T] = I within a block of 64, and blocks are independent.
* E[z^4] = 3.00003: the levels are half-normal quantiles moved by a few 32nds to make the fourth moment Gaussian.
  E[z^6] = 13.9 (Gaussian 15), and |z| <= 83/32: the tail is cut at 2.6.
* The permutations and flips come from one fixed key, chosen among 6,000 so that |row|^2 has the variance 128.02 that 64
  Gaussian numbers have (128), with the smallest worst-case correlation of squares between two columns.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from zotune.kernels.philox import MASK, philox_numpy

WIDTH = 64  # numbers in a row
INDEX_BITS = 12  # 4,096 rows
BASE_ROWS = 32
SCALE = 32  # numbers are integers over SCALE
# fmt: off
LEVELS = (1, 1, 2, 5, 6, 8, 8, 10, 10, 11, 13, 14, 15, 19, 20, 20,
          23, 24, 27, 27, 29, 32, 33, 35, 38, 40, 43, 46, 50, 56, 65, 83)
# fmt: on
_KEY = (0x7A6F7475, 0x6E65037C)  # which permutations and flips the base rows use: never change it. See the docstring.


def _base_words(lane: int) -> np.ndarray:
    """(BASE_ROWS, WIDTH) fixed random words."""
    index = np.arange(BASE_ROWS * WIDTH, dtype=np.uint64)
    zeros = np.zeros_like(index)
    return philox_numpy((index & np.uint64(MASK), zeros, zeros.copy(), zeros.copy()), _KEY)[lane].reshape(
        BASE_ROWS, WIDTH
    )


def _walsh() -> np.ndarray:
    """(WIDTH, WIDTH) of +-1 with orthogonal rows: entry (i, j) is the parity of the common bits of i and j."""
    common = np.arange(WIDTH)[:, None] & np.arange(WIDTH)[None, :]
    return np.array([[1 - 2 * (bin(v).count("1") % 2) for v in row] for row in common])


@lru_cache(maxsize=1)
def integer_rows() -> np.ndarray:
    """The codebook times SCALE: (4096, 64) int64."""
    levels = np.array(LEVELS)[np.argsort(_base_words(0), axis=0, kind="stable")]  # each column a permutation of LEVELS
    base = levels * np.where(_base_words(1) >> np.uint64(31), -1, 1)
    half = (base[None, :, :] * _walsh()[:, None, :]).reshape(-1, WIDTH)
    return np.concatenate([half, -half])


@lru_cache(maxsize=8)
def normal_rows(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The codebook of the default normal: (4096, 64)."""
    return (torch.from_numpy(integer_rows()).to(dtype) / SCALE).to(device)


@lru_cache(maxsize=8)
def sign_rows(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The codebook of Rademacher signs: (256, 8), row i holds the bits of i as +-1, lowest bit first."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)[None, :]) & 1
    return (1 - 2 * bits).to(dtype).to(device)


@lru_cache(maxsize=16)
def _scaled(rows: str, scale: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A codebook times a number; a direction uses one scale for a whole pass, so the product is kept.

    The number is given as its hexadecimal digits: as a key, -0.0 would be 0.0.
    """
    number, book = float.fromhex(scale), BOOKS[rows](dtype, device)
    return book if number == 1.0 else book * number


BOOKS = {"normal": normal_rows, "rademacher": sign_rows}


def scaled_rows(book: str, scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`scale` times the codebook, one rounding each. A 0-d tensor on a GPU is multiplied without reading it on the host."""
    if isinstance(scale, Tensor) and scale.device.type != "cpu":
        return BOOKS[book](dtype, device) * scale.to(device=device, dtype=dtype)
    return _scaled(book, float(scale).hex(), dtype, device)
