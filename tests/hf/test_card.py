"""The model card, and pushing to the hub, without a network."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import transformers

from zotune.hf.card import complete_card


@pytest.fixture
def trainer(run):
    return run(
        method_options={"n": 2}, seed=7, data_seed=8, eps=2e-3, gradient_accumulation_steps=2, ledger="ledger.jsonl"
    )


def card_of(trainer):
    return huggingface_hub.ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def test_the_card_tells_what_was_done_and_how_to_cite_it(trainer):
    trainer.create_model_card(model_name="small", dataset="toy", tags="mine")
    card = card_of(trainer)
    assert {"zeroth-order", "forward-only", "mezo", "mine"} <= set(card.data.tags)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, flags=re.MULTILINE))
    assert rows["method"].startswith("mezo (n=2, sides=2)")
    checks = trainer.zo.engine.check_forwards
    assert rows["forward passes"] == f"16, each over a batch of 8; {checks} more to look at the model"
    assert rows["tokens"] == f"288 of training data; {trainer.record()['tokens_forwarded']:,} through the model"
    assert rows["eps"] == "0.002"
    assert rows["lr"] == "0.001 (given), constant"
    assert rows["seeds"] == "7 (noise), 8 (data)"
    assert "https://arxiv.org/abs/2305.17333" in card.text
    assert "### How to cite" in card.text
    assert "rebuilds these weights bit for bit" in card.text


def test_the_card_names_no_optimizer_that_did_not_run(trainer):
    trainer.create_model_card()
    text = card_of(trainer).text
    assert "adam" not in text.lower()
    assert "- optimizer: zotune.ZO, method mezo, rule sgd" in text


def test_writing_the_card_twice_changes_nothing(trainer):
    trainer.create_model_card()
    path = Path(trainer.args.output_dir) / "README.md"
    once = path.read_text()
    complete_card(path, trainer.record())
    assert path.read_text() == once
    complete_card(path.with_name("absent.md"), trainer.record())
    assert not path.with_name("absent.md").exists()


def test_pushing_to_the_hub_takes_model_card_and_ledger_along(trainer, monkeypatch):
    pushed = {}

    def upload(*args, repo_id=None, folder_path=None, **kwargs):
        pushed[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    if hasattr(transformers.trainer, "upload_folder"):
        monkeypatch.setattr(transformers.trainer, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    trainer.hub_model_id = "someone/small"
    trainer.push_to_hub(dataset="toy")
    assert {"model.safetensors", "README.md", "ledger.jsonl", "zotune.json"} <= pushed["someone/small"]
    assert "forward-only" in card_of(trainer).data.tags
