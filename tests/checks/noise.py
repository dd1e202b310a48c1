"""Claims about noise that mutations must break."""

import math

import torch

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.kernels import row_numbers

N = 1 << 16


def anew(direction, site, *args):
    """The direction on a site, with everything forgotten that was kept from before: a kept answer would prove nothing."""
    row_numbers.local.__dict__.clear()
    return direction.realise(site, *args)


def z_of(name, shape=(256, 256), seed=0, kind="normal", purpose=("test",)):
    return anew(Noise(stream(seed, *purpose), kind), Site(name, shape))


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


def check_parts_equal_the_whole(kind="normal"):
    """Runs that begin and end anywhere, and chosen rows, of a width that is no multiple of a block."""
    z, site = Noise(stream(0, "test"), kind), Site("w", (50, 70))
    whole = z.realise(site)
    for start, count in ((0, 1), (1, 500), (63, 66), (513, 2000), (3499, 1)):
        assert torch.equal(z.realise(site.part(start, count)), whole.view(-1)[start : start + count])
    rows = torch.tensor([49, 0, 7])
    assert torch.equal(z.realise(site.take(rows)).view(3, 70), whole[rows])
