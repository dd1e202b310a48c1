"""Tiny random models of the architectures that people tune: nothing is downloaded."""

import peft
import pytest
import torch
import transformers

VOCABULARY = 97
# weights of scale 0.3, not the usual 0.02: with the latter few faults would show
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}  # grouped queries, heads wider than hidden / heads
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "init_std": 0.3, "word_embed_proj_dim": 16,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**SMALL, "num_key_value_heads": 2}),
    "llama_tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**SMALL, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {**SMALL, "num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, GROUPED),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, GROUPED),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, GROUPED),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {**GPT2, "bos_token_id": 0, "eos_token_id": 0}),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, OPT),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {**SMALL, "num_key_value_heads": 2}),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, SMALL),
    "phi": (transformers.PhiForCausalLM, transformers.PhiConfig, {**SMALL, "pad_token_id": None}),
    "bloom": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    ),
    "mamba": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, {**SMALL, "pad_token_id": 1}),
}
CAUSAL = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt",
    "mistral",
    "gpt_neox",
    "phi",
    "bloom",
)


def refused_by_oldest(name, mode):
    """With the oldest versions a prefix before these does not act as the tokens it was made of; zotune says so."""
    oldest = (transformers.__version__, peft.__version__) == ("5.0.0", "0.19.0")
    return oldest and mode == "prefix" and name in ("gemma2", "gemma3")


@pytest.fixture
def make_model():
    """A model by the name of its architecture: the same weights at each call, norms and biases away from 1 and 0."""

    def make(name, dtype=torch.float32):
        model, config, settings = ARCHITECTURES[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = model(config(**settings)).eval()
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.dim() < 2:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        made.config.use_cache = False
        if dtype == torch.float64:
            return made.to(dtype)
        for parameter in made.parameters():  # as loading does: buffers of rotary frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        made.config.dtype = dtype
        return made

    return make
