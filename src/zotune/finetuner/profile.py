"""From weights to scales: the two features that a tensor gives, and the one number that keeps the step's size.

    nf = sqrt( sum_i w_i / sum_i w_i sigma_i^2 )        w_i = numel_i, and 15 B hidden for embeddings

nf sigma_i is what noise on tensor i is multiplied with; equal sigmas give 1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zotune.core.site import Site
from zotune.kernels.dispatch import backend_for

TOKENS = 15  # tokens per example that the released code reckons with
PART = 1 << 18  # numbers read at once


def moments(values: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of a tensor's numbers; the variance of a single number is 0."""
    return moments_of([values])


def moments_of(parts: Iterable[Tensor]) -> tuple[float, float]:
    """The same of a tensor that comes in parts, all but the last of them multiples of PART.

    Summed in fp64 around the first number, in a fixed order, then exactly: neither parts, threads nor devices are seen.
    """
    n, pivot, sums = 0, 0.0, []
    for part in parts:
        flat = part.reshape(-1)
        if not flat.numel():
            continue
        pivot = float(flat[0]) if n == 0 else pivot
        n += flat.numel()
        sums.append(backend_for(flat.device).moments(flat, pivot))
    if n == 0:
        return 0.0, 0.0
    s1, s2 = (_exact(column) for column in torch.cat(sums).T.tolist())
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
