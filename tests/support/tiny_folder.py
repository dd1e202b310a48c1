"""The folder of a tiny causal language model with a tokenizer, as `save_pretrained` writes it, and what it reads."""

from pathlib import Path

import torch

GOOD, BAD = ("a gripping film", "what a joy", "great songs"), ("a dull film", "what a bore", "terrible songs")


def save_tiny_model(folder: Path) -> None:
    """The same random weights at every call."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    bare.train_from_iterator([f"{text} It was great terrible" for text in GOOD + BAD] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
