"""Claims about small updates of low-precision weights that mutations must break."""

import torch
from torch import nn

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.weights import Weights


def displacement_cosine(dtype, low_precision, updates=1000, size=1e-6):
    """Cosine between what the full-precision values moved by and the sum of 1,000 updates of 1e-6 * z."""
    start = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weights = Weights([("w", nn.Parameter(start.clone()))], low_precision)
    slot = weights.slots["w"]
    true = torch.zeros(4096, dtype=torch.float64)
    with torch.no_grad():
        for step in range(updates):
            z = Noise(stream(0, "update", step))
            if low_precision == "stochastic":
                slot.storage.begin(0, step)
            weights.update(slot, lambda w, part, z=z: z.add_to(w, part, size))
            z.add_to(true, slot.site, size)
        moved = slot.storage.read(slot, slot.site).double() - start.double()
    return float(moved @ true / (moved.norm() * true.norm()).clamp_min(1e-300))


def check_carried_bits_keep_small_updates(dtype=torch.bfloat16):
    """fp32 values lose a share of about 2**-24 * 0.02 / 1e-6 = 0.1 % an update, at random: the cosine is 1 to 1e-6."""
    cosine = displacement_cosine(dtype, "carry")
    assert cosine > 0.999, f"cosine {cosine:.3f}"
