"""Contracts on the real model: run with `make test-real`."""

import pytest
import torch

import zotune
from zotune.core.ledger import weights_hash
from zotune.models import load_model
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import encode_all
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import make_examples

pytestmark = pytest.mark.real
ROWS = [{"sentence": text, "label": label} for text, label in (("a joy to watch", 1), ("a dull and lifeless film", 0))]


def prepared(dtype, autocast=None):
    model, tokenizer = load_model("smollm2-135m", dtype=dtype)
    scorer = OptionScorer(model, pad_id=tokenizer.pad_token_id, autocast=autocast)
    batch = encode_all(make_examples(find_task("sst2"), ROWS), tokenizer, 128)
    return model, lambda: scorer.loss(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_do_not_drift_and_engines_agree(dtype):
    """lr 0: bit-identical weights. Engines: the head is multiplied in other pieces, so losses differ by rounding only:
    1e-5 is 100 ulp of an fp32 loss near 1; a bf16 matrix product rounds to 2**-8, and the loss is a mean over two rows."""
    losses = {}
    for engine in ("layerwise", "in_place"):
        model, closure = prepared(dtype)
        before = weights_hash(model.named_parameters())
        opt = zotune.ZO(model.named_parameters(), lr=0.0, eps=1e-2, engine=engine)
        for _ in range(3):
            opt.step(closure)
        assert weights_hash(model.named_parameters()) == before
        losses[engine] = opt.last.losses
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert losses["layerwise"] == pytest.approx(losses["in_place"], abs=tolerance)
    assert losses["layerwise"][0] != losses["layerwise"][1]


def test_a_run_replays_on_the_base_weights_bit_for_bit(tmp_path):
    model, closure = prepared(torch.bfloat16)
    opt = zotune.ZO(model.named_parameters(), lr=1e-4, eps=1e-2, ledger=tmp_path / "ledger.jsonl")
    for _ in range(3):
        opt.step(closure)
    again, _ = prepared(torch.bfloat16)
    other = zotune.ZO(again.named_parameters(), lr=1e-4, eps=1e-2)
    zotune.replay(other, zotune.read_ledger(tmp_path / "ledger.jsonl").entries)
    assert weights_hash(again.named_parameters()) == weights_hash(model.named_parameters())
