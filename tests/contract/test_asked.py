"""Is a call the one that was recorded? Inputs are compared by what they hold, without reading them where that can be helped."""

import torch

from zotune.engines.batched_calls import Asked, flatten


def asked(x):
    leaves, spec = flatten((x,), {})
    return Asked.of(leaves, spec), spec


def again(known, spec, x):
    return known.again(flatten((x,), {})[0], spec)


def test_the_same_tensor_until_it_is_written_to():
    ids = torch.arange(6)
    known, spec = asked(ids)
    assert again(known, spec, ids)
    assert again(known, spec, ids.clone())
    assert not again(known, spec, ids + 1)
    ids.add_(1)
    assert not again(known, spec, ids)


def test_another_view_of_the_same_numbers_is_not_read(monkeypatch):
    """A closure that cuts its batch makes new views in each call; on a GPU a comparison would wait for it."""
    ids = torch.arange(12).view(3, 4)
    known, spec = asked(ids[:, :-1])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", None)
        assert again(known, spec, ids[:, :-1])
    assert not again(known, spec, ids[:, 1:])
    ids.add_(1)  # views share the count of writes
    assert not again(known, spec, ids[:, :-1])


def test_the_same_place_read_in_another_order():
    square = torch.arange(9).view(3, 3)
    known, spec = asked(square)
    assert not again(known, spec, square.T)
