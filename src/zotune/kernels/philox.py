"""Philox4x32-10: random bits as a pure function of (key, counter).

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit counter words and two
32-bit key words give four 32-bit output words; there is no state, so any element can be drawn in any order on any
device. The same function is written twice because the arrays differ: numpy on the CPU (in cache-sized pieces), torch
integer arithmetic everywhere else. Tests hold both to the published known answers and to each other.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = tuple[int, int]
U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]

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
    """Ten rounds on four equally long uint64 arrays holding 32-bit words."""
    # Words 0 and 2 are multiplied, 1 and 3 are not: two rows of an array each, because a call costs more than its numbers.
    even, odd = np.stack((counter[0], counter[2])), np.stack((counter[1], counter[3]))
    product = np.empty_like(even)
    factors = np.array(MULTIPLIERS, dtype=np.uint64)[:, None]
    shift, mask = np.uint64(32), np.uint64(MASK)
    for keys in round_keys(key):
        np.multiply(even, factors, out=product)
        np.right_shift(product[::-1], shift, out=even)
        even ^= odd
        even ^= np.array(keys, dtype=np.uint64)[:, None]
        np.bitwise_and(product[::-1], mask, out=odd)
    return even[0], odd[0], even[1], odd[1]


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
    return torch.from_numpy(words32(key, site, blocks.numpy().astype(np.uint64)).astype(np.int64))


def words32(key: Words, site: int | U64, blocks: U64) -> U32:
    """`words` as numpy arrays: (n,) block numbers -> (n, 4) little-endian 32-bit words, whose bytes are the random bytes.

    `site` may be an array as well, with a site for each block.
    """
    sites = np.broadcast_to(np.asarray(site, dtype=np.uint64), blocks.shape)
    out = np.empty((blocks.size, 4), dtype="<u4")
    for start in range(0, blocks.size, _NUMPY_CHUNK):
        part, where = blocks[start : start + _NUMPY_CHUNK], sites[start : start + _NUMPY_CHUNK]
        counter = (part & np.uint64(MASK), part >> np.uint64(32), where & np.uint64(MASK), where >> np.uint64(32))
        for lane, values in enumerate(philox_numpy(counter, key)):
            out[start : start + part.size, lane] = values
    return out
