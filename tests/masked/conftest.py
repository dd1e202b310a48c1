"""Tiny random RoBERTa and BERT with tokenizers made on the spot: nothing is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

WORDS = "terrible bad okay good great Yes No Maybe Expression Entity Description Human Location Number"
CORPUS = [f" {WORDS}", "a gripping film It was great.", "a dull film It was terrible.", "The cat sat? No, the cat ran."]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 420
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # not 0.02, with which all tokens are about equally likely and few faults would show
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with RoBERTa's special tokens."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


@pytest.fixture(params=["roberta", "bert"])
def model(request):
    """RoBERTa counts positions from behind the padding token's, BERT from 0."""
    made = {
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=66)),
        "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=64)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made[request.param]().eval()
