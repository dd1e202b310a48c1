"""One launch for many tensors: the bits of a launch each."""

import pytest
import torch
from tests.support.triton import DEVICES, backend, kernels

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.weights import Weights
from zotune.kernels.contract import Addition, Run, Term
from zotune.kernels.dispatch import using

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)

SIZES = {"a": (128, 80), "b": (48,), "odd": (33,), "c": (9008,), "empty": (0,), "d": (16,)}  # c has two tiles
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def model(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = Weights([(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in SIZES.items()])
    for slot in weights:
        weights.update(slot, lambda w, part: Noise(stream(0, "before")).add_to(w, part, 1e-4))
    return weights


def items(device, weights, terms):
    copies = {slot.site.name: (slot.tensor.to(device, copy=True), slot.carried) for slot in weights}
    return [
        Addition(
            stored, None if carried is None else carried.to(device, copy=True), weights.slots[name].site.id, terms(name)
        )
        for name, (stored, carried) in copies.items()
    ]


def check(made, weights):
    for item, slot in zip(made, weights, strict=True):
        assert torch.equal(item.stored.cpu(), slot.tensor), slot.site.name
        if slot.carried is not None:
            assert torch.equal(item.carried.cpu(), slot.carried), slot.site.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tensors_get_what_each_would_get(device, dtype):
    """Groups have scales of their own; the second step finds the tables of addresses again."""
    weights = model(dtype)
    updates = kernels(device).many.ManyUpdates(backend(device))
    scale = dict.fromkeys(SIZES, 1e-3) | {"b": -2e-3}
    made = items(device, weights, lambda name: ())
    for step in range(2):
        source = stream(0, "step", step)
        made = [
            type(item)(item.stored, item.carried, item.site, [Term(source.key, "normal", scale[name])])
            for item, name in zip(made, SIZES, strict=True)
        ]
        updates.update(made)
        for slot in weights:
            weights.update(slot, lambda w, part, s=source: Noise(s).add_to(w, part, scale[part.name]))
    check(made, weights)
    assert updates.launches == 2  # all that fit, and the odd one
    assert len(updates._places) == 1


def test_several_terms_and_books_and_a_scale_on_the_device(device):
    weights = model(torch.bfloat16)
    rho = torch.tensor(0.3, dtype=torch.float64, device=device)
    keys = [stream(0, "term", k).key for k in range(3)]
    pool = [Term(keys[0], "normal", rho), Term(keys[1], "rademacher", -1e-3), Term(keys[2], "normal", 1e-3)]
    chosen = {"a": pool, "b": pool[:1], "odd": pool, "c": pool[1:2], "empty": pool, "d": []}
    made = items(device, weights, lambda name: chosen[name])
    updates = kernels(device).many.ManyUpdates(backend(device))
    updates.update(made)
    each = items(device, weights, lambda name: chosen[name])
    for item in each:
        if item.stored.numel() and item.terms:
            backend(device).update(
                item.stored.view(-1), item.carried.view(-1), Run(item.site, 0, item.stored.numel()), item.terms
            )
    for one, other in zip(made, each, strict=True):
        assert torch.equal(one.stored, other.stored)
        assert torch.equal(one.carried, other.carried)
    assert updates.launches == 4


def test_tensors_that_moved_are_found(device):
    """The addresses are looked at in every call."""
    updates = kernels(device).many.ManyUpdates(backend(device))
    terms = [Term((1, 2), "normal", 1.0)]
    for _ in range(3):
        tensors = [torch.zeros(64, device=device) for _ in range(3)]
        updates.update([Addition(t, None, 5, terms) for t in tensors])
        assert all(t.any() for t in tensors)
        del tensors
        _ = torch.zeros(640, device=device)


def test_addresses_that_are_no_multiples_of_16(device):
    updates = kernels(device).many.ManyUpdates(backend(device))
    whole = torch.zeros(65, device=device)
    item = Addition(whole[1:], None, 5, [Term((1, 2), "normal", 1.0)])
    updates.update([item])
    expected = torch.zeros(64, device=device)
    backend(device).add(expected, Run(5, 0, 64), item.terms)
    assert torch.equal(whole[1:], expected)
    assert whole[0] == 0


def test_a_step_of_the_optimizer_is_one_launch(device):
    """What `Weights.update_all` hands over together; the same bits as one tensor after the other."""
    made, expected = model(torch.bfloat16), model(torch.bfloat16)
    for slot in made:
        slot.tensor.data = slot.tensor.data.to(device)
    z = -1e-3 * Noise(stream(0, "z"))
    changes = [(slot, lambda w, part: z.add_to(w, part), z) for slot in made]
    triton = backend(device)
    with using(triton, torch.device(device).type):
        made.update_all(changes)
    for slot in expected:
        expected.update(slot, lambda w, part: z.add_to(w, part))
    for slot, other in zip(made, expected, strict=True):
        assert torch.equal(slot.tensor.cpu(), other.tensor), slot.site.name
        assert torch.equal(slot.carried.cpu(), other.carried), slot.site.name
    assert triton.many.launches == 2  # all that fit, and the odd one
