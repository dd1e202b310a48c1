"""M5: a GPU draws the bits that the CPU draws. Needs a CUDA device (`make test-gpu`)."""

import pytest
import torch
from tests.checks.noise import anew

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.kernels.philox import words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SITE = Site("layer.weight", (300, 301))
PARTS = [SITE, SITE.part(65, 700), SITE.take(torch.tensor([299, 0, 7]))]


def both(kind, part):
    z = Noise(stream(0, "device"), kind)
    return anew(z, part), anew(z, part, torch.float32, "cuda").cpu()


def test_random_words_are_the_same():
    """Integers: numpy on the CPU, torch on the GPU."""
    blocks = torch.arange(1000) + 2**33
    assert torch.equal(words((1, 2), 3 << 40, blocks.cuda()).cpu(), words((1, 2), 3 << 40, blocks))


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("part", PARTS, ids=["whole", "run", "rows"])
def test_table_noise_has_the_same_bits(kind, part):
    cpu, gpu = both(kind, part)
    assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("part", PARTS, ids=["whole", "run", "rows"])
def test_exact_normals_agree_to_rounding(part):
    """log and cos differ in the last bits: a few ulp of numbers up to 6."""
    cpu, gpu = both("gaussian", part)
    assert torch.allclose(cpu, gpu, rtol=1e-5, atol=1e-5)
