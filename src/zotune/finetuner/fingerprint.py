"""How far networks are from the random numbers that they began with.

Networks that were made on a GPU without further seeding began with numbers that can be computed again: PyTorch draws
torch.nn.Linear's weights from curand's Philox 4x32-10, one thread per number. For a small tensor of n numbers, and call
number c since seeding,

    word_j = first word of Philox(key = seed, counter = (c, 0, j, 0))        j = 0 ... n - 1
    u_j    = fl(fl32(word_j) 2^-32 + 2^-33)                                  of (0, 1]; 1 counts as 0
    x_j    = fl(u_j (2 bound) - bound)                                       one rounding: a fused multiply-add

A network makes four calls, in the order w1, b1, w2, b2. Every GPU counts its own calls from 0, so networks spread over
GPUs repeat the same numbers; where they do is found from the networks alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zotune.finetuner.networks import BOUNDS, SIZES, Networks
from zotune.kernels.philox import MASK, philox_numpy

HF_SEED = 42  # what transformers' TrainingArguments seed with by default
_CLOSER = 4.0  # a network is recognised if its own initialisation is this many times closer than any other


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Networks beside their initialisation: CUDA's network number `number[i]` after seeding for the i-th.

    `runs` are the networks at which the counter restarted: each begins what was made on one GPU.
    """

    seed: int
    number: tuple[int, ...]
    runs: tuple[int, ...]
    distance: Tensor  # (n,) largest change of any of the 449 numbers
    changed: Tensor  # (n,) how many of them changed in any bit

    @property
    def identical(self) -> int:
        """Networks that are bit for bit their initialisation."""
        return int((self.changed == 0).sum())


def cuda_uniform(seed: int, call: int, count: int, bound: float) -> NDArray[np.float32]:
    """(count,) numbers: what `torch.empty(count, device="cuda").uniform_(-bound, bound)` draws as call number `call`."""
    threads = np.arange(count, dtype=np.uint64)
    zero = np.zeros_like(threads)
    word = philox_numpy((zero + np.uint64(call), zero.copy(), threads, zero.copy()), (seed & MASK, seed >> 32))[0]
    unit = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    unit[unit == 1.0] = 0.0
    low = np.float64(np.float32(bound))
    # both products and the difference fit into fp64, so rounding once at the end is what a fused multiply-add does
    return (unit.astype(np.float64) * (2.0 * low) - low).astype(np.float32)


@lru_cache(maxsize=2048)
def cuda_network(number: int, seed: int = HF_SEED) -> Tensor:
    """(449,) fp32: how CUDA initialises the network made as number `number` on a device after seeding."""
    calls = range(len(SIZES) * number, len(SIZES) * (number + 1))
    drawn = [cuda_uniform(seed, call, *what) for call, *what in zip(calls, SIZES, BOUNDS, strict=True)]
    return torch.from_numpy(np.concatenate(drawn))


def cuda_networks(numbers: Sequence[int], seed: int = HF_SEED, dtype: torch.dtype = torch.float32) -> Tensor:
    """(k, 449) of the networks made as these numbers, rounded to a dtype."""
    return torch.stack([cuda_network(number, seed) for number in numbers]).to(dtype)


def fingerprint(networks: Networks, seed: int = HF_SEED) -> Fingerprint | None:
    """The initialisation that networks began with, or None if they did not begin with CUDA's numbers of this seed.

    Each network is compared with every one that could have been made so far. A few that moved too far to be recognised
    are taken for the successors of the recognised ones before them; more than half unrecognised is None.
    """
    flat = networks.flat().float()
    n = len(flat)
    start = cuda_networks(range(n), seed, networks.w1.dtype).float()
    recognised: list[int | None] = [_recognise(row, start[: i + 1]) for i, row in enumerate(flat)]
    if sum(number is not None for number in recognised) * 2 < n:
        return None
    numbers: list[int] = []
    for number in recognised:
        numbers.append(number if number is not None else numbers[-1] + 1 if numbers else 0)
    change = (flat - start[numbers]).abs()
    runs = tuple(i for i in range(n) if i == 0 or numbers[i] != numbers[i - 1] + 1)
    return Fingerprint(seed, tuple(numbers), runs, change.amax(dim=1), (change > 0).sum(dim=1))


def _recognise(row: Tensor, start: Tensor) -> int | None:
    """The number of the initialisation that most of a network's 449 numbers are close to."""
    distance = (start - row).abs().median(dim=1).values
    # what two unrelated draws have between them, where there are no others to compare with
    unrelated = (cuda_network(1 << 20) - row).abs().median()
    best = int(distance.argmin())
    others = torch.cat([distance[:best], distance[best + 1 :], unrelated[None]])
    return best if float(distance[best]) * _CLOSER < float(others.min()) else None


@dataclass(frozen=True)
class Scale:
    """For networks of unknown initialisation: what can be said without it."""

    rms: tuple[float, float, float, float]  # of w1, b1, w2, b2 over what U(-bound, bound) has: 1 if nothing was learned
    outside: int  # numbers beyond the bounds, which no default initialisation draws


def scale(networks: Networks) -> Scale:
    """How networks compare with PyTorch's default initialisation on any device."""
    parts = networks.flat().split_with_sizes(SIZES, dim=1)
    rms = [float(p.square().mean().sqrt()) / (b / 3**0.5) for p, b in zip(parts, BOUNDS, strict=True)]
    outside = sum(int((p.abs() > b * (1 + 1e-3)).sum()) for p, b in zip(parts, BOUNDS, strict=True))
    return Scale((rms[0], rms[1], rms[2], rms[3]), outside)
