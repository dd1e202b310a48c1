"""What networks began with is computed again, and how far they came is measured (T10)."""

import pytest
import torch
from tests.finetuner.conftest import cuda_like, fresh_network, llama_names

from zotune.finetuner.fingerprint import cuda_network, cuda_uniform, fingerprint, scale
from zotune.finetuner.importer import read_released
from zotune.finetuner.networks import BOUNDS, SIZES, Networks, from_flat, untrained
from zotune.kernels.philox import philox_scalar

NAMES = llama_names(4)  # 22 networks
STARTS = (0, 1, 8, 15)  # four GPUs, the first with a single network


def test_one_number_by_hand():
    """Thread 7 of call 3 with seed 42: the first word of Philox, scaled, in the order of the rounding."""
    word = philox_scalar((3, 0, 7, 0), (42, 0))[0]
    unit = torch.tensor(float(word), dtype=torch.float64).float().double() * 2.0**-32 + 2.0**-33
    bound = torch.tensor(0.125)
    expected = (unit.float().double() * 0.25 - bound.double()).float()
    assert float(cuda_uniform(42, 3, 64, 0.125)[7]) == float(expected)


def test_large_seeds_fill_both_key_words():
    assert not (cuda_uniform(42, 0, 8, 1.0) == cuda_uniform(42 + 2**32, 0, 8, 1.0)).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", [42, 2**40 + 5])
def test_cuda_draws_these_numbers(seed):
    torch.manual_seed(seed)
    for number in range(3):
        with torch.device("cuda"):
            made = fresh_network()
        flat = torch.cat([p.detach().flatten() for p in made.parameters()]).cpu()
        assert torch.equal(flat, cuda_network(number, seed))


def test_initialisation_has_its_range_and_moments():
    """100 networks; mean and variance of uniform numbers within 5 standard errors."""
    rows = torch.stack([cuda_network(i) for i in range(100)]).double()
    for part, bound in zip(rows.split_with_sizes(SIZES, dim=1), BOUNDS, strict=True):
        n = part.numel()
        assert float(part.abs().max()) <= bound * (1 + 1e-7)
        assert abs(float(part.mean())) < 5 * bound / (3 * n) ** 0.5
        assert abs(float(part.square().mean()) / bound**2 - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    assert len(set(rows[:, 0].tolist())) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", [42, 7])
def test_untouched_networks_are_recognised_bit_for_bit(dtype, seed):
    flat = torch.stack([cuda_network(i, seed) for i in range(len(NAMES))])
    found = fingerprint(from_flat(NAMES, flat.to(dtype)), seed)
    assert found.identical == len(NAMES)
    assert found.number == tuple(range(len(NAMES)))
    assert found.runs == (0,)
    assert fingerprint(from_flat(NAMES, flat.to(dtype)), seed + 1) is None


def planted():
    """Changes of size 1e-4 to 0.03 in half of the numbers; networks 3 and 9 untouched; 5 far away."""
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-4, -1.5, len(NAMES))[:, None]
    change = size * (2 * torch.rand(len(NAMES), 449, generator=generator) - 1)
    change[:, ::2] = 0.0
    change[[3, 9]] = 0.0
    change[5] = torch.randn(449, generator=generator)
    return change


def test_restarts_and_distances_are_found():
    change = planted()
    networks = cuda_like(NAMES, STARTS, change=change)
    found = fingerprint(networks)
    assert found.runs == STARTS
    assert found.identical == 2
    # the changes as they were planted, up to the rounding of numbers below 0.5 to fp32
    assert torch.allclose(found.distance, change.abs().amax(dim=1), atol=1e-7)
    assert int(found.changed[5]) == 449
    assert (found.changed[[0, 21]] <= 224).all()


def test_networks_in_fp16_hide_small_changes():
    """What is smaller than half a unit rounds away, here in all but a few of 9,878 numbers: those near a rounding border."""
    change = torch.full((len(NAMES), 449), 1e-9)
    found = fingerprint(cuda_like(NAMES, STARTS, torch.float16, change))
    assert found.runs == STARTS
    assert int(found.changed.sum()) < 10
    assert found.identical > len(NAMES) // 2


def test_networks_made_on_a_cpu_are_not_recognised(release):
    held = {name: fresh_network() for name in NAMES}
    networks, _ = read_released(release(held))
    assert fingerprint(networks) is None
    assert fingerprint(untrained(NAMES, 42)) is None


def test_scale_says_whether_numbers_left_the_initial_range():
    """449 * 22 uniform numbers: root mean squares within 5 standard errors of 1 (b2: 22 numbers, 0.48)."""
    start = untrained(NAMES, 0)
    found = scale(start)
    for value, size in zip(found.rms, SIZES, strict=True):
        assert abs(value - 1) < 5 * (0.2 / (size * len(NAMES))) ** 0.5
    assert found.outside == 0
    moved = Networks(start.names, 2 * start.w1, start.b1, start.w2, start.b2)
    assert scale(moved).rms[0] == pytest.approx(2 * found.rms[0], rel=1e-6)
    assert scale(moved).outside > 3000  # half of 22 * 320 numbers, less chance


def test_the_released_file_is_close_to_its_initialisation(released_file):
    """T10 as far as this file goes: seed 42, four GPUs, median change 7e-4, largest 0.059 of numbers up to 0.447."""
    found = fingerprint(read_released(released_file)[0])
    assert found.runs == (0, 1, 55, 109)
    assert float(found.distance.median()) == pytest.approx(7e-4, rel=0.1)
    assert float(found.distance.max()) == pytest.approx(0.059, rel=0.02)
    # 12,202 numbers are bit for bit the initial ones; without the fused multiply-add only 6,722 would be
    assert 146 * 449 - int(found.changed.sum()) == 12202
    assert found.identical == 0
