"""Tiny models of every shape that an engine must answer for. Nothing is downloaded.

`CASES[name](dtype)` gives a `Case`: named tensors, a closure, and the module if there is one. Weights come from torch's
global generator, which `conftest` seeds before each test.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Case:
    named: list[tuple[str, nn.Parameter]]
    closure: Callable[[], Tensor]
    module: nn.Module | None = None


def of_module(module, run, dtype):
    """A case whose loss is the mean square of what `run(module)` returns, in fp32 or better."""
    module = module.to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return Case(trained, lambda: run(module).to(kept).square().mean(), module)


class Mlp(nn.Module):
    """Two layers, dropout, a norm, a 0-d and a non-contiguous parameter."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.skew = nn.Parameter(torch.randn(4, 12).t())

    def forward(self, x):
        hidden = self.dropout(self.norm(torch.tanh(self.inner(x))))
        return self.head(hidden) * self.scale + hidden @ self.skew


class WeightGiver(nn.Module):
    """A module that hands out its own weight, and one that uses it."""

    def __init__(self):
        super().__init__()
        self.holder = _Holder()
        self.after = nn.Linear(6, 6)  # runs while the handed-out weight is still needed

    def forward(self, x):
        weight = self.holder()
        return F.linear(self.after(x), weight)


class _Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self):
        return self.weight


class Shared(nn.Module):
    """A submodule called twice, once inside another module."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.outer = nn.Sequential(self.block, nn.Tanh())

    def forward(self, x):
        return self.block(self.outer(x))


class Attention(nn.Module):
    """nn.MultiheadAttention reads its output layer's weight without calling that layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """nn.LSTM keeps its weights in a list of its own."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def mlp(dtype):
    x = torch.randn(16, 8, dtype=dtype)
    return of_module(Mlp(), lambda m: m(x), dtype)


def dropout_mlp(dtype):
    x = torch.randn(16, 8, dtype=dtype)
    return of_module(Mlp(dropout=0.5), lambda m: m(x), dtype)


def weight_giver(dtype):
    x = torch.randn(4, 6, dtype=dtype)
    return of_module(WeightGiver(), lambda m: m(x), dtype)


def shared(dtype):
    x = torch.randn(4, 6, dtype=dtype)
    return of_module(Shared(), lambda m: m(x), dtype)


def attention(dtype):
    x = torch.randn(2, 5, 8, dtype=dtype)
    return of_module(Attention(), lambda m: m(x), dtype)


def lstm(dtype):
    x = torch.randn(2, 4, 6, dtype=dtype)
    return of_module(Recurrent(), lambda m: m(x), dtype)


def weight_norm(dtype):
    x = torch.randn(4, 6, dtype=dtype)
    made = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2))
    return of_module(made, lambda m: m(x), dtype)


def leaky(dtype):
    """The closure multiplies by a weight itself, beside the model's own forward."""
    x = torch.randn(4, 6, dtype=dtype)
    made = of_module(_stack(), lambda m: m(x), dtype)
    of_the_model, weight = made.closure, made.module[2].weight
    return Case(made.named, lambda: of_the_model() + F.linear(x, weight).float().square().mean(), made.module)


def penalty(dtype):
    """The closure adds a penalty on a weight."""
    x = torch.randn(4, 6, dtype=dtype)
    made = of_module(_stack(), lambda m: m(x), dtype)
    of_the_model, weight = made.closure, made.module[2].weight
    return Case(made.named, lambda: of_the_model() + 0.1 * weight.float().square().sum(), made.module)


def _stack():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def bare(dtype):
    """Two tensors and a formula: no module anywhere."""
    a, b = nn.Parameter(torch.randn(5, 6).to(dtype)), nn.Parameter(torch.randn(6).to(dtype))
    return Case([("a", a), ("b", b)], lambda: (a.float() @ b.float()).tanh().square().mean())


def llama(dtype):
    """Embeddings and head are one tensor, as in SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
        use_cache=False,
    )
    return of_language_model(LlamaForCausalLM(config), dtype, 67)


def gpt2(dtype):
    """Conv1D layers, learned positions, and dropout that is on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return of_language_model(GPT2LMHeadModel(config).train(), dtype, 61)


def lora(dtype):
    """Adapters on a frozen Llama. B is not zero, so that both factors matter."""
    from peft import LoraConfig, get_peft_model

    base = llama(dtype).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a name it is dropping
        adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return of_language_model(adapted, None, 67)


def of_language_model(model, dtype, vocabulary):
    model = model if dtype is None else model.to(dtype)
    ids = torch.randint(0, vocabulary, (3, 7))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def closure():
        logits = model(input_ids=ids).logits[:, :-1].float()
        return F.cross_entropy(logits.reshape(-1, vocabulary), ids[:, 1:].reshape(-1))

    return Case(named, closure, model)


CASES = {
    "mlp": mlp,
    "dropout_mlp": dropout_mlp,
    "weight_giver": weight_giver,
    "shared": shared,
    "attention": attention,
    "lstm": lstm,
    "weight_norm": weight_norm,
    "leaky": leaky,
    "penalty": penalty,
    "bare": bare,
    "llama": llama,
    "gpt2": gpt2,
    "lora": lora,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bits(tensor):
    """The tensor's bits as integers: tells -0.0 from 0.0, which torch.equal does not."""
    whole = tensor.detach().contiguous().clone()
    return whole.view(
        torch.int16 if whole.element_size() == 2 else torch.int32 if whole.element_size() == 4 else torch.int64
    )


def snapshot(case):
    return {name: bits(tensor) for name, tensor in case.named}


def assert_same_bits(before, after):
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert not moved, f"bits changed in {moved}"
