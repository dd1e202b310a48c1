"""Directions and weights reach the kernels, and get the bits that the longer ways give them."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import bits
from torch import nn

from zotune.core.context import Estimate
from zotune.core.direction import Combination, Noise, Scaled, Stored, kernel_terms
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.core.weights import STORAGES, Weights
from zotune.kernels.dispatch import choice_for, using
from zotune.kernels.reference import ReferenceBackend
from zotune.rules.sgd import SGD

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
A, B = Noise(stream(0, "a")), Noise(stream(0, "b"), "rademacher")
GAUSSIAN = Noise(stream(0, "c"), "gaussian")
SHAPE = (37, 65)
CPU = torch.device("cpu")


class Counting(ReferenceBackend):
    """Counts the calls, and makes noise as the reference does."""

    def __init__(self):
        self.calls = []

    def add(self, out, run, terms):
        self.calls.append(("add", len(terms)))
        super().add(out, run, terms)

    def perturb(self, outs, stored, carried, run, terms):
        self.calls.append(("perturb", [sign for _, sign in outs]))
        kept, self.calls = self.calls, []
        super().perturb(outs, stored, carried, run, terms)
        self.calls = kept

    def update(self, stored, carried, run, terms):
        self.calls.append(("update", len(terms)))
        kept, self.calls = self.calls, []
        super().update(stored, carried, run, terms)
        self.calls = kept


@pytest.fixture(autouse=True)
def _no_graph():
    """As in a step."""
    with torch.no_grad():
        yield


@pytest.fixture
def counting():
    backend = Counting()
    with using(backend):
        yield backend


def weights(dtype=FP32, mode="carry", carried=True):
    generator = torch.Generator().manual_seed(0)
    made = Weights([("w", nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype)))], mode)
    slot = made.slots["w"]
    if carried and mode == "carry" and dtype.itemsize == 2:
        words = torch.randint(-(2**15), 2**15, SHAPE, generator=generator)
        slot.carried = words.to(torch.int16)
    return made, slot


def long_way(slot, part, point):
    """round(value + point), from `Storage.read` and `add_to` alone, on the whole site."""
    values = slot.storage.read(slot, slot.site).detach().reshape(-1).clone()
    moved = torch.full_like(values, -0.0)
    point.add_to(moved, slot.site)
    whole = (values + moved).to(slot.tensor.dtype).view(SHAPE)
    return whole[part.rows] if part.rows is not None else whole.reshape(-1)[part.start : part.start + part.count]


# ----------------------------------------------------------------------------------------------------------------------
# Directions


def test_which_directions_are_one_pass():
    site = Site("w", SHAPE)
    both = 0.5 * A - 2.0 * Scaled(B, {"w": 3.0})
    assert [(t.key, t.book, t.scale) for t in kernel_terms(both, site, CPU, 2.0)] == [
        (A.source.key, "normal", 1.0),
        (B.source.key, "rademacher", -12.0),
    ]
    assert kernel_terms(Combination(), site, CPU) == ()
    assert kernel_terms(Scaled(A, {"w": 0.0}), site, CPU) == ()
    assert kernel_terms(A + GAUSSIAN, site, CPU) is None
    assert kernel_terms(Combination(((1.0, A), (1.0, A + B))), site, CPU) is None  # a sum of sums is rounded twice


def test_terms_that_are_the_same_everywhere_are_made_once():
    one, other = Site("w", SHAPE), Site("v", (3,))
    everywhere, here_only = 0.5 * A - 2.0 * B, 0.5 * Scaled(A, {"w": 3.0})
    assert everywhere.uniform
    assert kernel_terms(everywhere, one, CPU) is kernel_terms(everywhere, other, CPU)
    assert [t.scale for t in kernel_terms(everywhere, one, CPU, 2.0)] == [1.0, -4.0]  # another scale, other terms
    assert not here_only.uniform
    assert [kernel_terms(here_only, site, CPU)[0].scale for site in (one, other)] == [1.5, 0.5]
    assert not (everywhere + 1.0 * Stored({"w": torch.ones(SHAPE)})).uniform


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("part", [slice(0, 37 * 65), slice(100, 1700), [36, 0, 0, 5]], ids=["whole", "run", "rows"])
def test_a_sum_of_noise_is_one_call_with_the_same_bits(counting, dtype, part):
    site = Site("w", SHAPE)
    where = site.take(torch.tensor(part)) if isinstance(part, list) else site.part(part.start, part.stop - part.start)
    point = 0.3 * A + torch.tensor(1e-3) * B - 0.7 * Noise(stream(0, "d"))
    start = torch.randn(where.numel, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out, by_hand = start.clone(), torch.full_like(start, -0.0)
    point.add_to(out, where, -2.0)
    assert counting.calls == [("add", 3)]
    for coefficient, leaf in point.terms:
        leaf.add_to(by_hand, where, -2.0 * coefficient)
    assert torch.equal(bits(out), bits(start + by_hand))


def test_sums_with_other_directions_go_the_long_way(counting):
    site = Site("w", SHAPE)
    stored = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    out = (0.3 * A + 0.1 * Stored({"w": stored})).realise(site)
    assert counting.calls == [("add", 1)]
    assert torch.equal(out, torch.zeros(SHAPE) + ((0.3 * A).realise(site) + stored * 0.1))


# ----------------------------------------------------------------------------------------------------------------------
# Perturbing


@dtypes
@pytest.mark.parametrize("mode", STORAGES)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("backend", ["chosen", "reference"])
def test_perturb(dtype, mode, carried, backend):
    made, slot = weights(dtype, mode, carried)
    parts = [slot.site, slot.site.part(65, 1000), slot.site.take(torch.tensor([36, 2, 2]))]
    with using(choice_for("cpu").backend if backend == "chosen" else ReferenceBackend()):
        for part in parts:
            for point in (1e-2 * A, 1e-2 * A + 0.1 * B):
                expected = long_way(slot, part, point)
                out = torch.empty(expected.shape, dtype=dtype)
                made.perturb(slot, part, point, out)
                assert torch.equal(bits(out), bits(expected))


@dtypes
def test_perturb_into_the_stored_tensor(dtype):
    made, slot = weights(dtype)
    expected = long_way(slot, slot.site, 0.1 * A)
    made.perturb(slot, slot.site, 0.1 * A, slot.tensor)
    assert torch.equal(bits(slot.tensor.view(-1)), bits(expected))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_tensors_that_are_not_dense_go_the_long_way(counting, dtype):
    made, slot = weights(dtype)
    turned = torch.empty(SHAPE[::-1], dtype=dtype).t()
    made.perturb(slot, slot.site, 0.1 * A, turned)
    assert [name for name, _ in counting.calls] == ["add"]
    assert torch.equal(turned.reshape(-1), long_way(slot, slot.site, 0.1 * A))


POINTS = {
    "pair": ([0.1 * A, -0.1 * A], [("perturb", [1.0, -1.0])]),
    "centre and pair": ([Combination(), 0.1 * A, -0.1 * A], [("perturb", [1.0, -1.0])]),
    "two pairs": ([0.1 * A, 0.1 * B, -0.1 * A, -0.1 * B], [("perturb", [1.0, -1.0])] * 2),
    "the same twice": ([0.1 * A + B, 0.1 * A + B], [("perturb", [1.0, 1.0])]),
    "two sizes": ([0.1 * A, 0.2 * A], [("perturb", [1.0])] * 2),
    "sums of both signs": ([0.1 * A + B, -0.1 * A - B], [("perturb", [1.0])] * 2),
    "others among them": ([0.1 * A, 0.1 * GAUSSIAN, -0.1 * A], [("perturb", [1.0, -1.0])]),
    "another stream": ((0.1 * A, -0.1 * Noise(stream(0, "other"))), [("perturb", [1.0]), ("perturb", [1.0])]),
    "another book of the stream": (
        (0.1 * A, -0.1 * Noise(A.source, "rademacher")),
        [("perturb", [1.0]), ("perturb", [1.0])],
    ),
}


@dtypes
@pytest.mark.parametrize("name", POINTS)
def test_perturb_many_draws_equal_streams_once(counting, dtype, name):
    points, calls = POINTS[name]
    made, slot = weights(dtype)
    outs = [torch.empty(SHAPE, dtype=dtype) for _ in points]
    made.perturb_many(slot, slot.site, points, outs)
    assert [call for call in counting.calls if call[0] == "perturb"] == calls
    for point, out in zip(points, outs, strict=True):
        one = torch.empty(SHAPE, dtype=dtype)
        made.perturb(slot, slot.site, point, one)
        assert torch.equal(bits(out), bits(one))


@given(st.lists(st.sampled_from([-0.0, 0.0, 1e-45, -1e-45, 0.1, -0.1, 1e38]), min_size=2, max_size=4), st.booleans())
def test_perturb_many_has_the_bits_of_perturb(scales, two):
    """Products that underflow, and sums that cancel, on weights that are zeros of both signs."""
    made = Weights([("w", nn.Parameter(torch.tensor([0.0, -0.0]).repeat(200)))])
    slot = made.slots["w"]
    points = [s * A - s * A if two else s * A for s in scales]
    outs, ones = ([torch.empty(400) for _ in points] for _ in range(2))
    made.perturb_many(slot, slot.site, points, outs)
    for point, out, one in zip(points, outs, ones, strict=True):
        made.perturb(slot, slot.site, point, one)
        assert torch.equal(bits(out), bits(one))


# ----------------------------------------------------------------------------------------------------------------------
# Updating


def sgd_step(made, slot, direction, along, group):
    rule, estimate = SGD(), Estimate(direction, 0.0)
    displacement = rule.displacements([slot.site], estimate, group)[0] if along else None
    made.update(slot, lambda w, part: rule(w, part, estimate, group, {}), displacement)


@dtypes
@pytest.mark.parametrize("mode", STORAGES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "direction", [0.7 * A, A, 0.7 * A + 0.1 * B, Scaled(A, {"w": 0.3}), A + GAUSSIAN, Combination()]
)
def test_sgd_in_one_pass_is_sgd(dtype, mode, decay, direction):
    group = {"lr": 1e-3, "weight_decay": decay}
    (made, slow), (other, fast) = (weights(dtype, mode, carried=False) for _ in range(2))
    for _ in range(3):
        sgd_step(made, slow, direction, False, group)
        sgd_step(other, fast, direction, True, group)
    assert torch.equal(bits(slow.tensor), bits(fast.tensor))
    assert (slow.carried is None) == (fast.carried is None)
    assert slow.carried is None or torch.equal(slow.carried, fast.carried)


def test_sgd_in_one_pass_is_one_call(counting):
    made, slot = weights(BF16)
    sgd_step(made, slot, 0.7 * A + 0.1 * B, True, {"lr": 1e-3, "weight_decay": 0.0})
    assert counting.calls == [("update", 2)]


def test_when_sgd_is_more_than_a_displacement():
    estimate, site = Estimate(1.0 * A, 0.0), SimpleNamespace(name="w")
    rule = SGD()
    norm = SimpleNamespace(name="norm.weight")  # not decayed
    assert rule.displacements([site, norm], estimate, {"lr": 0.0, "weight_decay": 0.0}) == [None, None]
    decayed, moved = rule.displacements([site, norm], estimate, {"lr": 1.0, "weight_decay": 0.1})
    assert decayed is None
    assert moved is not None
    one, other = rule.displacements([site, norm], estimate, {"lr": 1.0, "weight_decay": 0.0})
    assert one is other is not None  # so that kernels take it for one
