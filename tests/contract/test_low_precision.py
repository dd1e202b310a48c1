"""Contract 4: low precision still learns. An update is never simply added to fp16 or bf16 weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.checks.precision import check_carried_bits_keep_small_updates, displacement_cosine
from tests.support.models import bits
from torch import nn

from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.core.weights import STORAGES, Slot, Stochastic, Weights
from zotune.engines.recorded import Recorded
from zotune.errors import ConfigError
from zotune.kernels.halves import JOIN, SPLIT
from zotune.optim.optimizer import ZO

LOW = [torch.bfloat16, torch.float16]
low = pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
fp32_bits = st.integers(0, 2**32 - 1).filter(lambda word: (word >> 23) & 255 != 255)  # every finite fp32 number
# powers of two, numbers half-way between two bf16 or fp16 numbers, the ends of the ranges, and their neighbours
EDGES = [
    sign | (word + near) & 0x7FFFFFFF
    for sign in (0, 1 << 31)
    for word in (0, 1, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x00800000, 0x7F7F0000, 0x38800000)
    for near in (-1, 0, 1)
    if word + near >= 0
]


def floats(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32).copy())


def round_trip(values, dtype):
    stored, carried = torch.empty_like(values, dtype=dtype), torch.empty_like(values, dtype=torch.int16)
    SPLIT[dtype](values, stored, carried)
    joined = stored.to(torch.float32)
    JOIN[dtype](joined, stored, carried)
    return stored, joined


# ----------------------------------------------------------------------------------------------------------------------
# Splitting and joining


@given(st.lists(fp32_bits, min_size=1, max_size=64))
def test_bf16_and_carried_bits_hold_every_fp32_number(words):
    """Bit for bit, -0.0 and subnormals included."""
    values = floats(words + EDGES)
    _, joined = round_trip(values, torch.bfloat16)
    assert torch.equal(bits(joined), bits(values))


@given(st.lists(fp32_bits, min_size=1, max_size=64))
def test_the_stored_bf16_number_is_the_nearest(words):
    """Half an ulp at most, so forwards see what plain rounding would have given (halves may go the other way)."""
    values = floats(words + EDGES)
    stored, _ = round_trip(values, torch.bfloat16)
    ours, nearest = stored.double() - values.double(), values.bfloat16().double() - values.double()
    same = torch.equal(stored, values.bfloat16())
    assert same or bool(((ours.abs() == nearest.abs()) | (stored == values.bfloat16())).all())


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=64))
def test_fp16_and_carried_bits(numbers):
    """Every fp32 number above 2**-13 exactly; below, to 2**-40 absolute. The stored number is the nearest fp16."""
    values = torch.tensor([*numbers, *(v for v in floats(EDGES).tolist() if abs(v) <= 65504)])
    stored, joined = round_trip(values, torch.float16)
    assert torch.equal(stored, values.to(torch.float16))
    large = values.abs() >= 2.0**-13
    assert torch.equal(joined[large], values[large])
    assert float((joined - values).abs().max()) <= 2.0**-40


@low
def test_weights_that_were_never_moved_are_their_stored_numbers(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    slot = Weights([("w", nn.Parameter(every.clone()))]).slots["w"]
    assert torch.equal(slot.storage.read(slot, slot.site), every.float())
    with torch.no_grad():
        slot.storage.write(slot, slot.site, every.float())
    assert torch.equal(bits(slot.tensor), bits(every))
    assert not slot.carried.any()


# ----------------------------------------------------------------------------------------------------------------------
# Against fp32 master weights


def trained(parameters, losses, **settings):
    """The optimizer after the steps whose losses are given, with no model."""
    opt = ZO(parameters, lr=1e-3, eps=1e-2, seed=3, **settings)
    for step, pair in enumerate(losses):
        opt.engine = Recorded(pair, step)
        opt.step(lambda: 0.0)
    return opt


def pairs(steps=30):
    generator = torch.Generator().manual_seed(1)
    return [(1 + 0.02 * torch.randn(2, generator=generator)).tolist() for _ in range(steps)]


@pytest.mark.parametrize("n", [1, 2])
def test_a_bf16_run_is_the_fp32_master_run(n):
    """Given the same losses: stored + carried equals the fp32 weights bit for bit, and stored is their rounding."""
    start = [("a.weight", torch.randn(40, 33).bfloat16()), ("b.bias", torch.randn(7).bfloat16())]
    losses = [first + second for first, second in zip(pairs(), pairs()[::-1], strict=True)] if n == 2 else pairs()
    settings = {"weight_decay": 0.1, "method_options": {"n": n}}
    ours = trained([(name, nn.Parameter(w.clone())) for name, w in start], losses, **settings)
    master = trained([(name, nn.Parameter(w.float())) for name, w in start], losses, **settings)
    for name, slot in ours.weights.slots.items():
        expected = master.weights.slots[name].tensor
        assert torch.equal(slot.storage.read(slot, slot.site).view(expected.shape), expected)
        assert torch.equal(slot.tensor, expected.bfloat16())
        assert not torch.equal(slot.tensor, dict(start)[name])


def test_an_fp16_run_follows_the_fp32_master_run():
    """Values near 1 are held exactly; those below 2**-13 to 2**-40 a step."""
    start = torch.randn(40, 33).half()
    ours = trained([("a", nn.Parameter(start.clone()))], pairs())
    master = trained([("a", nn.Parameter(start.float()))], pairs())
    slot, expected = ours.weights.slots["a"], master.weights.slots["a"].tensor.detach()
    values = slot.storage.read(slot, slot.site).detach().view(expected.shape)
    assert float((values - expected).abs().max()) <= 30 * 2.0**-40


@low
def test_tensors_that_are_not_contiguous(dtype):
    """A transposed parameter gives the numbers of the same parameter stored in rows."""
    start = torch.randn(6, 5).to(dtype)
    turned = nn.Parameter(start.t().contiguous().t())
    assert not turned.is_contiguous()
    ours = trained([("a", turned)], pairs(5))
    rows = trained([("a", nn.Parameter(start.clone()))], pairs(5))
    assert torch.equal(turned.detach(), rows.weights.slots["a"].tensor.detach())
    slots = [opt.weights.slots["a"] for opt in (ours, rows)]
    values = [slot.storage.read(slot, slot.site).reshape(6, 5) for slot in slots]
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("mode", STORAGES)
@low
def test_the_working_chunk_does_not_show(monkeypatch, mode, dtype):
    def run():
        torch.manual_seed(0)
        opt = trained([("a", nn.Parameter(torch.randn(37, 65).to(dtype)))], pairs(3), low_precision=mode)
        slot = opt.weights.slots["a"]
        return bits(slot.tensor), slot.storage.read(slot, slot.site).view(-1)

    whole = run()
    for module in ("noise", "direction", "weights"):
        monkeypatch.setattr(f"zotune.core.{module}.CHUNK", 100)
    pieces = run()
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Small updates


@low
def test_carried_bits_keep_small_updates(dtype):
    check_carried_bits_keep_small_updates(dtype)


@pytest.mark.parametrize("mode", ["plain", "stochastic"])
def test_what_the_carried_bits_are_for(mode):
    """bf16 rounding loses 1,000 updates of 1e-6 (cosine 0.17 and 0.13 here): the comparison variants are what they say."""
    assert abs(displacement_cosine(torch.bfloat16, mode)) < 0.3


# ----------------------------------------------------------------------------------------------------------------------
# Stochastic rounding


def rounded(value, dtype, draws):
    """`draws` independent roundings of one number."""
    storage = Stochastic()
    tensor = torch.zeros(draws, dtype=dtype)
    slot = Slot(Site("w", (draws,)), tensor, storage)
    storage.write(slot, slot.site, torch.full((draws,), value))
    return tensor


@low
@pytest.mark.parametrize("value", [1.001, -1.001, 0.0123, -3.14159, 1.99999, 1e-3])
def test_stochastic_rounding_is_unbiased(dtype, value):
    """The two neighbours only, and their mean is the number: 5 sigma of 100,000 draws of a two-point variable."""
    draws = 100_000
    found = rounded(value, dtype, draws).double()
    exact = float(torch.tensor(value))
    low_, high = sorted(found.unique().tolist())
    assert low_ < exact < high
    assert float(torch.tensor(low_).to(dtype)) == low_
    share = (exact - low_) / (high - low_)
    sigma = (high - low_) * math.sqrt(share * (1 - share) / draws)
    assert abs(float(found.mean()) - exact) < 5 * sigma


@low
def test_stochastic_rounding_leaves_exact_numbers_alone(dtype):
    for value in (0.0, -0.0, 1.0, -0.5, 2.0**-20):
        assert rounded(value, dtype, 100).tolist() == [value] * 100


@low
def test_stochastic_rounding_from_zero_goes_the_right_way(dtype):
    tiny = float(torch.finfo(dtype).smallest_normal) / 2**12
    assert set(rounded(tiny, dtype, 1000).sign().tolist()) <= {0.0, 1.0}
    assert set(rounded(-tiny, dtype, 1000).sign().tolist()) <= {0.0, -1.0, -0.0}


def test_stochastic_rounding_draws_new_bits_each_step_and_tensor():
    runs = {}
    for key in [(0, 0, "w"), (1, 0, "w"), (0, 1, "w"), (0, 0, "v")]:
        seed, step, name = key
        storage = Stochastic()
        storage.begin(seed, step)
        tensor = torch.zeros(1000, dtype=torch.bfloat16)
        slot = Slot(Site(name, (1000,)), tensor, storage)
        storage.write(slot, slot.site, torch.full((1000,), 1.002))
        runs[key] = tuple(tensor.tolist())
    assert len(set(runs.values())) == 4
    assert stream(0, "rounding", 0) != stream(0, "rounding", 1)


# ----------------------------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("mode", STORAGES)
def test_the_stated_extra_bytes_are_the_bytes_taken(mode):
    mixed = [("a", nn.Parameter(torch.randn(8, 9).bfloat16())), ("b", nn.Parameter(torch.randn(5)))]
    opt = trained(mixed, pairs(2), low_precision=mode)
    taken = sum(slot.carried.nbytes for slot in opt.weights if slot.carried is not None)
    assert opt.weights.extra_bytes() == taken == (2 * 72 if mode == "carry" else 0)


def test_nothing_is_carried_before_the_first_move():
    """accelerate saves and loads the state of an optimizer that was just made."""
    opt = ZO([("a", nn.Parameter(torch.randn(4).bfloat16()))], eps=1e-2)
    assert opt.weights.slots["a"].carried is None
    assert not opt.state


def test_unknown_mode():
    with pytest.raises(ConfigError, match="carry, plain, stochastic; got 'kahan'"):
        ZO([torch.zeros(3, requires_grad=True)], low_precision="kahan")


def test_minus_zero_survives_carried_bits_in_fp16():
    """-0.0 + 0 * ulp would be 0.0: a change of a bit at lr 0."""
    weight = nn.Parameter(torch.tensor([-0.0, 1.0, 2.0], dtype=torch.float16))
    opt = ZO([("w", weight)], lr=1e-5, eps=1e-2, seed=1)
    opt.step(lambda: weight[1:].float().square().sum())  # carried bits exist from here on
    with torch.no_grad():
        weight[0] = -0.0
        opt.weights.slots["w"].carried[0] = 0
    slot = opt.weights.slots["w"]
    assert bits(slot.storage.read(slot, slot.site))[0] == bits(torch.tensor([-0.0]))[0]


def test_a_kept_state_does_not_go_on_counting():
    weight = nn.Parameter(torch.ones(3))
    opt = ZO([("w", weight)], lr=1e-5, seed=1)
    state = opt.state_dict()
    opt.step(lambda: weight.square().sum())
    assert state["param_groups"][0]["zo_counts"] == {"updates": 0, "forwards": 0, "refused": 0}
