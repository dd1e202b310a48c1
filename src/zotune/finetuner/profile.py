"""From weights to scales: the two features that a tensor gives, and the one number that keeps the step's size.

    nf = sqrt( sum_i w_i / sum_i w_i sigma_i^2 )        w_i = numel_i, and 15 B hidden for embeddings

nf sigma_i is what noise on tensor i is multiplied with; equal sigmas give 1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zotune.core.site import Site
from zotune.core.workspace import workspace

TOKENS = 15  # tokens per example that the released code reckons with
PART = 1 << 18  # numbers read at once
_PIECE = 1 << 15  # numbers worked on while they lie in the cache
_ROW = 4096  # numbers summed at once: rows are summed whole by one thread


def moments(values: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of a tensor's numbers; the variance of a single number is 0."""
    return moments_of([values])


def moments_of(parts: Iterable[Tensor]) -> tuple[float, float]:
    """The same of a tensor that comes in parts, all but the last of them multiples of PART.

    Summed in fp64 around the first number, in rows of fixed length, then exactly: neither parts nor threads are seen.
    """
    n, pivot = 0, 0.0
    first: list[Tensor] = []
    second: list[Tensor] = []
    for part in parts:
        flat = part.reshape(-1)
        pivot = float(flat[0]) if n == 0 and flat.numel() else pivot
        n += flat.numel()
        for piece in torch.split(flat, _PIECE):
            x = workspace("moments", len(piece), torch.float64, piece.device).copy_(piece).sub_(pivot)
            rows = (torch.nn.functional.pad(x, (0, -len(x) % _ROW)) if len(x) % _ROW else x).view(-1, _ROW)
            first.append(rows.sum(dim=1))
            second.append(rows.square_().sum(dim=1))
    if n == 0:
        return 0.0, 0.0
    sums = torch.cat(first + second).tolist()
    s1, s2 = (_exact(half) for half in (sums[: len(sums) // 2], sums[len(sums) // 2 :]))
    variance = max(s2 - s1 * s1 / n, 0.0) / (n - 1) if n > 1 else 0.0
    return pivot + s1 / n, variance


def _exact(numbers: list[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan


def counted(site: Site, examples: int) -> int:
    """w_i: how many numbers of a tensor count in nf.

    Embeddings (a matrix whose name holds "embed") count with the rows that a batch uses, reckoned as 15 per example.
    Tensors of three and more dimensions do not count, as in the released code, which has none.

    Args:
        site: a whole tensor.
        examples: in the batch, over all processes.
    """
    if "embed" in site.name and len(site.shape) == 2:
        return TOKENS * examples * site.shape[1]
    return math.prod(site.shape) if len(site.shape) <= 2 else 0


def rms(sigmas: Sequence[float], counts: Sequence[int]) -> float:
    """sqrt( sum_i w_i sigma_i^2 / sum_i w_i ), that is 1 / nf. Not a number if nothing counts.

    Sums are exact, so their order is not seen, and equal sigmas that are powers of two come back exactly.
    """
    total = sum(counts)
    terms = [count * sigma * sigma for sigma, count in zip(sigmas, counts, strict=True)]
    return math.sqrt(_exact(terms) / total) if total else math.nan
