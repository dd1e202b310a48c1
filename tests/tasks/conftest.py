"""Tiny random models and a tokenizer made on the spot: nothing here is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zotune.tasks.encoding import Encoded

CORPUS = [
    "a gripping film It was great",
    "a dull film It was terrible",
    "the plot is thin and the cast is great",
    "the songs are terrible but the jokes are good",
]
VOCABULARY = 384


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE as in GPT-2: a word's leading space is part of its token; frequent words are one token."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")


def _seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


# weights of scale 0.3, not the usual 0.02: with the latter all tokens are equally likely and few faults would show
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture
def make_llama():
    return lambda **settings: _seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings})))


@pytest.fixture
def make_gpt2():
    """Learned absolute positions: a wrong position under padding shows at once. Dropout 0.1, off in eval mode."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=0
    )
    return lambda: _seeded(lambda: GPT2LMHeadModel(config))


@pytest.fixture(params=["llama", "llama_tied", "gpt2"])
def model(request, make_llama, make_gpt2):
    """Rotary positions with a head of its own, the same with tied weights (as SmolLM2), and learned positions."""
    made = {"llama": make_llama, "llama_tied": lambda: make_llama(tie_word_embeddings=True), "gpt2": make_gpt2}
    return made[request.param]()


def _question(generator, prompt, options, label):
    def ids(n):
        return torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()

    return Encoded(ids(prompt), tuple(ids(n) for n in options), label)


@pytest.fixture
def single_token_batch():
    """Options of one token: prompts of different lengths, and of two or three options."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, (1, 1), 0), (1, (1, 1), 1), (19, (1, 1, 1), 2), (12, (1, 1), 1)]
    return [_question(generator, *shape) for shape in shapes]


@pytest.fixture
def ragged_batch():
    """Options of different lengths and numbers, some of which begin alike and so share a row."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(7, (1, 3), 0), (3, (2, 2, 4), 2), (15, (1, 1), 1)]
    batch = [_question(generator, *shape) for shape in shapes]
    alike = [9, 8, 7, 6]
    batch.append(Encoded([5, 6, 7], (alike[:1], alike[:2], alike, [9, 8, 30], [40, 41]), 3))
    return batch


def _architectures():
    """Tiny random models of the architectures in use: a rotary, a grouped, a normed one, learned and offset positions."""
    import transformers as hf

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    rotary = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
    opt = {**sizes, "ffn_dim": 48, "init_std": 0.3, "word_embed_proj_dim": 16}
    window = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    gpt2 = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**rotary)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**rotary)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**rotary, head_dim=8)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**gpt2, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        ),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**rotary, head_dim=8)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**rotary, **window)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**rotary, **window)),
    }


@pytest.fixture(params=["llama", "qwen2", "qwen3", "opt", "gpt2", "gemma", "gemma2", "gemma3"])
def architecture(request):
    """One model of each architecture."""
    model = _seeded(_architectures()[request.param])
    model.config.use_cache = False
    return model
