"""A tiny Llama and questions that it can learn: the label is a token of the prompt."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zotune.tasks.encoding import Encoded

VOCABULARY = 64
OPTIONS = ([40], [41])
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@pytest.fixture
def make_llama():
    def make(dtype=torch.float32, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**{**SETTINGS, **settings})).eval()
        model.config.use_cache = False
        return model.to(dtype)

    return make


def questions(count, seed):
    """Prompts of 3 to 8 tokens whose last one is 10 or 11; the options are one token each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 8, (), generator=generator))
        label = int(torch.randint(2, (), generator=generator))
        body = torch.randint(12, 40, (length,), generator=generator).tolist()
        made.append(Encoded([*body, 10 + label], OPTIONS, label))
    return made
