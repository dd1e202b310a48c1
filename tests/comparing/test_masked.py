"""Masked models are compared too, but for demonstrations, which they cannot read."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from zotune.comparison.comparing import compare
from zotune.errors import ConfigError
from zotune.runs.config import TrainConfig

TEXTS = ("a gripping film", "a dull film")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    bare.train_from_iterator([f"{text} It was great terrible." for text in TEXTS] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=80, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    RobertaForMaskedLM(shape).save_pretrained(folder / "model")
    for split in ("train", "validation"):
        rows = [{"sentence": TEXTS[number % 2], "label": 1 - number % 2} for number in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        model=str(folder / "model"), data=str(folder), task="sst2", batch_size=4, precision="fp32", device="cpu",
    )  # fmt: skip


def test_masked_models_are_compared(config, tmp_path):
    names = ["zero-shot", "prior-corrected", "probe", "mezo", "adamw", "adamw-lora"]
    entries = compare(replace(config, out=str(tmp_path / "out")), names, forwards=8)
    assert [entry["name"] for entry in entries] == names
    assert not any("failed" in entry for entry in entries)


def test_demonstrations_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="fills in masks; leave it out"):
        compare(replace(config, out=str(tmp_path / "out")), ["zero-shot", "in-context"], forwards=8)
    assert not (tmp_path / "out").exists()
