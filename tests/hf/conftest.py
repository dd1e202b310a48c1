"""Tiny random models, rows and a chat tokenizer; nothing is asked of a network."""

import pytest
import torch

VOCABULARY = 300
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No hub, no telemetry."""
    monkeypatch.setenv("CI", "1")  # TRL sends none from there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model():
    """A Llama with the same random weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, **settings):
        config = LlamaConfig(**{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0,
            "pad_token_id": None,  # else the row of the padding token, which also ends texts, is zero: norms amplify it
            **settings,
        })  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture(scope="session")
def rows():
    """32 texts of 4 to 9 tokens, padded on the right to 9."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(5)
    examples = []
    for number in range(32):
        length = 4 + number % 6
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        padding = [0] * (9 - length)
        examples.append({
            "input_ids": ids + padding, "attention_mask": [1] * length + padding, "labels": ids + [-100] * (9 - length),
        })  # fmt: skip
    return Dataset.from_list(examples)


@pytest.fixture
def settings(tmp_path):
    """ZOArguments of a short, silent run on the CPU."""
    from zotune.hf import ZOArguments

    def make(folder="out", cls=ZOArguments, **given):
        return cls(**{
            "output_dir": str(tmp_path / folder), "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, **given,
        })  # fmt: skip

    return make


@pytest.fixture
def run(make_model, rows, settings):
    """Train a fresh tiny model; returns its trainer."""
    from zotune.hf import ZOTrainer

    def train(folder="out", *, model=None, resume=None, cls=ZOTrainer, trainer=None, **given):
        made = cls(
            make_model() if model is None else model,
            settings(folder, **given),
            train_dataset=rows,
            **{"eval_dataset": rows.select(range(8)), **(trainer or {})},
        )
        made.train(resume_from_checkpoint=resume)
        return made

    return train


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<end>", "<user>", "<assistant>"]
    bare.train_from_iterator(
        ["a gripping film, it was great", "a dull film, it was terrible"] * 4,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<end>")
    made.chat_template = CHAT
    return made


def weights(model):
    """The trained tensors, by name, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.fixture
def same_weights():
    """Asserts that two models have equal bits."""

    def check(one, other):
        first, second = weights(one), weights(other)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []

    return check
