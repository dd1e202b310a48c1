"""Sparse MeZO as a reader of its paper would write it: fp64, stored masks and noise; and masks one element at a time."""

import torch

from zotune.kernels.philox import philox_scalar


def mask_of(source, site, density):
    """One element after the other: kept if its 16 bits are below density * 2**16. Two elements share a 32-bit word."""
    low, high = site.id & 0xFFFFFFFF, site.id >> 32
    kept = []
    for k in range(site.numel):
        word = philox_scalar((k // 8, 0, low, high), source.key)[k % 8 // 2]
        kept.append(((word >> 16) if k % 2 else (word & 0xFFFF)) < round(density * 65536))
    return torch.tensor(kept).view(site.shape)


def sparse_step(weights, loss, draw, masks, *, lr, eps, n=1):
    """One step in place. `draw`: (direction number, name) -> z; `masks`: name -> 0/1. Returns the loss to log."""
    z = [{name: draw(i, name) * masks[name] for name in weights} for i in range(n)]
    rhos, probes = [], []
    for i in range(n):
        plus = loss({name: w + eps * z[i][name] for name, w in weights.items()})
        minus = loss({name: w - eps * z[i][name] for name, w in weights.items()})
        rhos.append((plus - minus) / (2 * eps))
        probes += [plus, minus]
    for name, w in weights.items():
        w -= lr * sum(rho * z[i][name] for i, rho in enumerate(rhos)) / n
    return sum(probes) / len(probes)
