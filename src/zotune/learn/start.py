"""What networks are before they learn, and how far they have come."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.finetuner.networks import HIDDEN, NUMBERS, Networks, from_flat, untrained


def random_start(names: Sequence[str], seed: int) -> Networks:
    """As published: as torch.nn.Linear initialises them, so the first scales are a random draw."""
    return untrained(names, seed)


def equal_start(names: Sequence[str], seed: int) -> Networks:
    """All scales are 1, which is MeZO, and remain so until something is learned: only the last layer is not random."""
    flat = untrained(names, seed).flat().float()
    flat[:, -1 - HIDDEN : -1] = 0.0
    flat[:, -1] = 1.0
    return from_flat(names, flat)


def distance(networks: Networks, start: Networks) -> Tensor:
    """(n,) fp64: the largest change of any of a network's 449 numbers."""
    return (networks.flat() - start.flat()).abs().amax(dim=1)


def learned(networks: Networks, start: Networks) -> dict[str, Any]:
    """How far networks moved, in JSON values."""
    moved = distance(networks, start)
    changed = networks.flat() != start.flat()
    furthest = moved.argsort(descending=True)[:5].tolist()
    return {
        "distance": {q: float(moved.quantile(p)) for q, p in (("median", 0.5), ("p95", 0.95), ("most", 1.0))},
        "never_changed": int((~changed.any(dim=1)).sum()),
        "numbers_changed": float(changed.sum()) / (NUMBERS * len(networks.names)),
        "furthest": {networks.names[i]: float(moved[i]) for i in furthest},
    }


def profile(factors: dict[str, float], counts: Sequence[int]) -> dict[str, Any]:
    """The scales nf sigma_i in JSON values, and where the noise's energy goes."""
    scales = torch.tensor(list(factors.values()), dtype=torch.float64)
    energy = torch.tensor(counts, dtype=torch.float64) * scales.square()
    quantiles = (("least", 0.0), ("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("most", 1.0))
    return {
        "squared": {name: float(scales.square().quantile(p)) for name, p in quantiles},
        "energy_of_ten": float(energy.sort(descending=True).values[:10].sum() / energy.sum()),
        "scales": {name: float(f"{scale:.6g}") for name, scale in factors.items()},
    }
