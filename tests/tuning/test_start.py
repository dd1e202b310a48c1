"""Prefix and prompt start as the tokens that they are made of; every mode is a function of model, options and seed."""

import warnings

import pytest
import torch

from zotune.core.ledger import weights_hash
from zotune.errors import ConfigError, ModelError
from zotune.tuning import MODES, make_mode
from zotune.tuning.virtual import random_tokens

from .conftest import CAUSAL, VOCABULARY, refused_by_oldest

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 1, 4]])


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["prefix", "prompt"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_fresh_prefix_or_prompt_is_the_model_that_has_read_its_tokens(make_model, name, mode):
    made = make_mode(mode)
    tokens = random_tokens(make_model(name), made.tokens, 3, mode)
    read = torch.cat([tokens.expand(2, -1), IDS], dim=1)
    expected = make_model(name)(input_ids=read, use_cache=False).logits[:, made.tokens :]
    if refused_by_oldest(name, mode):
        with pytest.raises(ModelError, match="PEFT does not know this architecture well enough"):
            made.attach(make_model(name), 3)
        return
    adapted = made.attach(make_model(name), 3)
    found = adapted(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1] :]
    # fp32: the same sums in other batch shapes. Logits reach about 10, a unit in the last place of which is 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    without = make_model(name)(input_ids=IDS, use_cache=False).logits
    assert (without - expected).abs().max() > 0.1, "the tokens must matter for this test to mean much"


@pytest.mark.parametrize("mode", list(MODES))
def test_attaching_is_a_function_of_the_seed_alone(make_model, mode):
    def attach(seed, before, threads=1):
        torch.manual_seed(before)
        torch.set_num_threads(threads)
        state = torch.get_rng_state()
        model = make_mode(mode).attach(make_model("llama_tied"), seed)
        assert torch.equal(torch.get_rng_state(), state), "a global generator moved"
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        return weights_hash(model.named_parameters())

    assert attach(0, before=1) == attach(0, before=2, threads=2)
    if mode in ("lora", "prefix", "prompt"):
        assert attach(0, before=1) != attach(1, before=1)


def test_the_random_tokens_are_spread_over_the_vocabulary(make_model):
    tokens = random_tokens(make_model("llama"), 2000, 0, "prefix")
    assert tokens.shape == (1, 2000)
    assert 0 <= int(tokens.min()) < 3  # 2,000 draws of 97: none of the first three is missing but with chance e-60
    assert VOCABULARY - 3 <= int(tokens.max()) < VOCABULARY


@pytest.mark.parametrize(
    ("mode", "parts", "numel"),
    [
        ("lora", {"lora_A", "lora_B"}, 2 * (8 * 32 + 8 * 32) + 2 * (8 * 32 + 8 * 16)),
        ("prefix", {"prompt_encoder"}, 5 * 2 * 2 * 16),  # tokens, layers, keys and values, 2 key heads of 8
        ("prompt", {"prompt_encoder"}, 10 * 32),
        ("head", {"lm_head"}, VOCABULARY * 32),
        ("norm_bias", {"norm", "layernorm"}, 5 * 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained(make_model, mode, parts, numel, dtype):
    found = trained(make_mode(mode).attach(make_model("llama", dtype), 0))
    assert sum(p.numel() for p in found.values()) == numel
    assert all(any(part in name for part in parts) for name in found)
    # adapters are fp32 on any base; the model's own tensors keep its dtype, their low-order bits are carried
    own = mode in ("head", "norm_bias")
    assert {p.dtype for p in found.values()} == {dtype if own else torch.float32}


def test_norm_bias_takes_biases_and_norms_of_all_kinds(make_model):
    for name, count in (("gpt2", 2 * 8 + 2), ("opt", 2 * 10 + 2), ("qwen3", 2 * 4 + 1), ("roberta", 2 * 10 + 6)):
        found = trained(make_mode("norm_bias").attach(make_model(name), 0))
        # gpt2: 2 norms and 4 biases a layer; opt: 2 norms of 2, 6 biases; qwen3: query and key norms too; roberta: 6
        # biases and 2 norms a layer, the embedding's norm, and in the head a norm, its matrix's bias and its own
        assert len(found) == count, (name, list(found))
        assert all(p.dim() == 1 for p in found.values())


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "gemma2", "roberta"])
def test_a_tied_head_is_untied_and_the_embedding_stays(make_model, name):
    model = make_model(name)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        made = make_mode("head").attach(model, 0)
        assert torch.equal(made(input_ids=IDS).logits, before)
        made.get_output_embeddings().weight.add_(1.0)
    made.tie_weights()  # as some libraries do whenever they touch a model
    head = made.get_output_embeddings().weight
    assert not made.config.tie_word_embeddings
    assert head.requires_grad
    assert not embedding.requires_grad
    assert head.data_ptr() != embedding.data_ptr()
    assert float((head - embedding).detach().mean()) == pytest.approx(1.0, abs=1e-6)  # fp32 rounding of x + 1 - x


def test_all_linear_and_chosen_targets(make_model):
    every = trained(make_mode("lora", {"targets": "all-linear"}).attach(make_model("llama"), 0))
    assert len(every) == 2 * 7 * 2  # layers, matrices, A and B
    chosen = trained(make_mode("lora", {"targets": "o_proj, layers.1.mlp.up_proj"}).attach(make_model("llama"), 0))
    assert len(chosen) == 2 * 3


@pytest.mark.parametrize(
    ("name", "mode", "options", "message"),
    [
        ("llama", "lora", {"targets": "q_proj,v_porj"}, "no module 'v_porj'.*This model has .*v_proj"),
        ("mamba", "lora", {}, "LoRA cannot be attached.*This model has .*in_proj"),
        ("mamba", "prefix", {}, "no keys and values"),
        ("mamba", "prompt", {}, "prompt cannot be put before MambaForCausalLM"),
        ("roberta", "prefix", {}, "fills in masks"),
        ("roberta", "prompt", {}, "fills in masks"),
        ("llama", "prefix", {"tokens": 62}, "do not fit into the 64 positions"),
    ],
)
def test_what_a_model_cannot_have_is_refused(make_model, name, mode, options, message):
    with pytest.raises(ModelError, match=message):
        make_mode(mode, options).attach(make_model(name), 0)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("prefix", {"tokens": 0}, "tokens must be a whole number"),
        ("prompt", {"tokens": 2.5}, "tokens must be a whole number"),
        ("prompt", {"token": 3}, "Did you mean 'tokens'"),
        ("head", {"rank": 3}, "no option 'rank'"),
        ("lora", {"alpha": -1.0}, "alpha must be positive"),
        ("full", {"eps_by_scale": 0.1}, "true or false"),
        ("prefx", {}, "Did you mean 'prefix'"),
    ],
)
def test_options_out_of_range_are_refused(mode, options, message):
    with pytest.raises(ConfigError, match=message):
        make_mode(mode, options)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "full"])
def test_adapters_on_adapters_are_refused(make_model, mode):
    once = make_mode("lora").attach(make_model("llama"), 0)
    with pytest.raises(ModelError, match="carries an adapter already"):
        make_mode(mode).attach(once, 0)


def test_a_prefix_that_does_not_act_as_its_tokens_is_refused(make_model, monkeypatch):
    """What the check is for: an architecture in which PEFT puts the prefix somewhere else."""
    import peft

    whole = peft.PeftModelForCausalLM.get_prompt

    def misplaced(self, *args, **kwargs):
        cache = whole(self, *args, **kwargs)
        for layer in cache.layers:
            layer.keys = layer.keys.flip(-1)
        return cache

    monkeypatch.setattr(peft.PeftModelForCausalLM, "get_prompt", misplaced)
    with pytest.raises(ModelError, match="does not act as the tokens"):
        make_mode("prefix").attach(make_model("llama"), 0)


@pytest.mark.parametrize("mode", list(MODES))
def test_no_warning_reaches_the_user(make_model, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_mode(mode).attach(make_model("llama"), 0)
