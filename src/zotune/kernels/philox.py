"""Philox4x32-10: random bits as a pure function of (key, counter).

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit counter words and two
32-bit key words give four 32-bit output words; there is no state, so any element can be drawn in any order on any
device. The same function is written twice because the arrays differ: numpy on the CPU (in place, cache-sized), torch
integer arithmetic everywhere else. Tests hold both to the published known answers and to each other.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = tuple[int, int]
U64 = NDArray[np.uint64]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
ROUNDS = 10

# Counters worked on at once: four 64-bit arrays of this length and two products stay inside a second-level cache.
_NUMPY_CHUNK = 16384


def round_keys(key: Words) -> list[Words]:
    """The key words of each round (the key moves by a constant between rounds)."""
    k0, k1 = key
    return [((k0 + i * KEY_STEPS[0]) & MASK, (k1 + i * KEY_STEPS[1]) & MASK) for i in range(ROUNDS)]


def philox_numpy(counter: tuple[U64, U64, U64, U64], key: Words) -> tuple[U64, U64, U64, U64]:
    """Ten rounds on four equally long uint64 arrays holding 32-bit words. The inputs are overwritten."""
    c0, c1, c2, c3 = counter
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    m0, m1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
    shift, mask = np.uint64(32), np.uint64(MASK)
    for k0, k1 in round_keys(key):
        np.multiply(c0, m0, out=p0)
        np.multiply(c2, m1, out=p1)
        np.right_shift(p1, shift, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(p0, shift, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(p1, mask, out=c1)
        np.bitwise_and(p0, mask, out=c3)
    return c0, c1, c2, c3


def philox_torch(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Words) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four int64 tensors holding 32-bit words (products wrap modulo 2**64, which keeps every bit)."""
    c0, c1, c2, c3 = counter
    for k0, k1 in round_keys(key):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
    return c0, c1, c2, c3


def philox_scalar(counter: tuple[int, int, int, int], key: Words) -> tuple[int, int, int, int]:
    """One counter in Python integers: scalars of a step, and the readable twin of the two above."""
    c0, c1, c2, c3 = counter
    for k0, k1 in round_keys(key):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
    return c0, c1, c2, c3


def words(key: Words, site: int, blocks: Tensor) -> Tensor:
    """Four random 32-bit words for each block of a site.

    Args:
        key: two 32-bit words naming the stream.
        site: 64-bit id of the tensor.
        blocks: (n,) int64 block numbers; the result lies on its device.

    Returns:
        (n, 4) int64, each in [0, 2**32).
    """
    low, high = site & MASK, (site >> 32) & MASK
    if blocks.device.type != "cpu":
        counter = (blocks & MASK, blocks >> 32, torch.full_like(blocks, low), torch.full_like(blocks, high))
        return torch.stack(philox_torch(counter, key), dim=1)
    flat = blocks.numpy().astype(np.uint64)
    out = np.empty((flat.size, 4), dtype=np.uint64)
    for start in range(0, flat.size, _NUMPY_CHUNK):
        part = flat[start : start + _NUMPY_CHUNK]
        counter_np = (
            part & np.uint64(MASK),
            part >> np.uint64(32),
            np.full_like(part, np.uint64(low)),
            np.full_like(part, np.uint64(high)),
        )
        for lane, values in enumerate(philox_numpy(counter_np, key)):
            out[start : start + part.size, lane] = values
    return torch.from_numpy(out.view(np.int64))
