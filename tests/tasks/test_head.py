"""Log-probabilities without the matrix of logits."""

import pytest
import torch
from torch import nn

from zotune.tasks import head
from zotune.tasks.head import TokenLogProbability


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 256 rows, summed up a few states at a time, as is done with pieces of thousands."""
    monkeypatch.setattr(head, "PIECE", 1)
    monkeypatch.setattr(head, "TILES", {"cpu": 3 * 256})


def asked_of(vocabulary, dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    states = spread * torch.randn(11, 8, generator=generator, dtype=torch.float64).to(dtype)
    query = torch.randint(0, 11, (17,), generator=generator)
    token = torch.randint(0, vocabulary, (17,), generator=generator)
    edges = [0, min(255, vocabulary - 1), min(256, vocabulary - 1), vocabulary - 1]  # first and last of a piece
    token[:4] = torch.tensor(edges)
    return states, query, token


def plain(layer, asked):
    states, query, token = asked
    logits = layer(states)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1)[query, token]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", [5, 256, 257, 600, 1024])
@torch.no_grad()
def test_equal_to_log_softmax(vocabulary, bias, small_pieces):
    layer = nn.Linear(8, vocabulary, bias=bias).double()
    asked = asked_of(vocabulary)
    found = TokenLogProbability(layer)(asked)
    # fp64 sums of up to 1,024 terms in another order
    torch.testing.assert_close(found, plain(layer, asked), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_loses_nothing_after_the_product(dtype, small_pieces):
    layer = nn.Linear(8, 600, bias=False).to(dtype)
    asked = asked_of(600, dtype)
    found = TokenLogProbability(layer)(asked)
    assert found.dtype == torch.float32
    # the pieces' products may be rounded apart from the whole's by a unit of the dtype of logits below 16
    unit = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, plain(layer, asked), rtol=0, atol=2 * unit if dtype != torch.float32 else 1e-5)
    assert not torch.equal(found, found.to(torch.bfloat16).float())


@torch.no_grad()
def test_large_and_infinite_logits(small_pieces):
    layer = nn.Linear(8, 600).double()
    layer.bias[:300] = -torch.inf  # whole pieces may have no weight at all
    layer.bias[555] = 2000.0  # far beyond exp
    asked = (*asked_of(600)[:2], torch.full((17,), 555))
    found = TokenLogProbability(layer)(asked)
    assert torch.equal(found, plain(layer, asked))
    assert torch.equal(found, torch.zeros(17, dtype=torch.float64)), "certain"


def test_never_more_than_a_piece_of_logits(small_pieces):
    layer, widths = nn.Linear(8, 1000), []

    def product(states, first, last):
        widths.append((first, last))
        return states @ layer.weight[first:last].T

    module = TokenLogProbability(layer)
    asked = asked_of(1000, torch.float32)
    found = module.in_pieces(product, asked)
    assert widths == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    torch.testing.assert_close(found, module(asked), rtol=0, atol=1e-5)  # the same fp32 products


def test_it_shares_the_parameters():
    layer = nn.Linear(8, 600)
    module = TokenLogProbability(layer)
    assert module.weight is layer.weight
    assert module.bias is layer.bias
    asked = asked_of(600, torch.float32)
    ours = torch.autograd.grad(module(asked).sum(), [layer.weight, layer.bias])
    naive = torch.autograd.grad(plain(layer, asked).sum(), [layer.weight, layer.bias])
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-4)  # fp32 sums of 17 terms of size 10
