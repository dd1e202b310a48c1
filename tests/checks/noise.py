"""Claims about noise that mutations must break."""

import math

import torch

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site

N = 1 << 16


def z_of(name, shape=(256, 256), seed=0, kind="normal", purpose=("test",)):
    return Noise(stream(seed, *purpose), kind).realise(Site(name, shape))


def assert_uncorrelated(a, b, bound=5.0):
    """|corr| < 5/sqrt(N): five sigma for independent unit-variance numbers (M12)."""
    a, b = a.flatten().double(), b.flatten().double()
    corr = float((a * b).mean())
    assert abs(corr) < bound / math.sqrt(a.numel()), f"correlation {corr:.5f} over {a.numel()} pairs"


def check_equal_shapes_do_not_share_noise(kind="normal"):
    assert_uncorrelated(z_of("layers.0.weight", kind=kind), z_of("layers.1.weight", kind=kind))


def check_order_does_not_matter(kind="normal"):
    """A tensor's noise is the same whatever was drawn before it (M4)."""
    first = z_of("b", kind=kind)
    z_of("a", kind=kind)
    assert torch.equal(z_of("b", kind=kind), first)
