"""Tiny random language models of every family, with the embedding and the output layer tied or not. Nothing is downloaded."""

import warnings

import torch
from torch import nn

VOCABULARY = 67
WIDE = {"initializer_range": 0.3}  # small random weights would make all models nearly linear


def _causal(name, **settings):
    import transformers

    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**{**shape, **heads, "pad_token_id": 0, **WIDE, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def llama():
    return _causal("Llama", tie_word_embeddings=True)


def llama_untied():
    return _causal("Llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True)


def qwen2():
    return _causal("Qwen2", tie_word_embeddings=True)


def qwen3():
    return _causal("Qwen3", tie_word_embeddings=False)


def gemma():
    return _causal("Gemma", tie_word_embeddings=True)


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
    }
    return OPTForCausalLM(OPTConfig(**shape, num_attention_heads=2, max_position_embeddings=32, init_std=0.3))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **WIDE))


def _masked(name):
    import transformers

    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**shape, num_attention_heads=2, max_position_embeddings=34, **WIDE)
    return getattr(transformers, f"{name}ForMaskedLM")(config)


def bert():
    return _masked("Bert")


def roberta():
    return _masked("Roberta")


def lora():
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a name it is dropping
        adapted = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted


class Classifier(nn.Sequential):
    """No transformer: rows of numbers in, two numbers out."""

    def __init__(self):
        super().__init__(nn.Linear(8, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 2))


MODELS = {
    "llama": llama,
    "llama_untied": llama_untied,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "opt": opt,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "lora": lora,
    "mlp": Classifier,
}


def make(name, dtype=torch.float64, rows=3, positions=7):
    """A model in evaluation mode with named trained tensors and a closure over a fixed batch with padding."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # zero biases and unit norms hide faults
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "mlp":
        x = torch.randn(rows, 8, dtype=dtype)
        return model, named, lambda: model(x).to(wide).square().mean()
    ids = torch.randint(2, VOCABULARY, (rows, positions))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0

    def closure():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].to(wide)
        return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    return model, named, closure
