"""Scores and losses against the naive way: one full row per option, logits everywhere, one sequence at a time."""

import pytest
import torch

from zotune.errors import ConfigError, DataError, ModelError
from zotune.tasks.encoding import Encoded
from zotune.tasks.layout import lay_out
from zotune.tasks.scoring import OptionScorer

# fp32: the same sums in another order and batch shape. Logits reach about 10 here, a unit in the last place of which
# is 1e-6; through two layers a few dozen of them.
FP32 = {"rtol": 0.0, "atol": 3e-5}


def naive_scores(model, batch, virtual=0):
    """Mean log-probability of each option's tokens, padded with -inf: nothing shared, nothing skipped."""
    width = max(len(example.option_ids) for example in batch)
    table = []
    for example in batch:
        row = []
        for option in example.option_ids:
            ids = torch.tensor([example.prompt_ids + option])
            logits = model(input_ids=ids, use_cache=False).logits[0, virtual:].float()
            first = len(example.prompt_ids)
            predicted = logits.log_softmax(-1)[first - 1 : -1]
            row.append(predicted[torch.arange(len(option)), torch.tensor(option)].mean())
        row += [torch.tensor(-torch.inf)] * (width - len(row))
        table.append(torch.stack(row))
    return torch.stack(table)


def naive_loss(model, batch):
    labels = torch.tensor([example.label for example in batch])
    return torch.nn.functional.cross_entropy(naive_scores(model, batch), labels)


@pytest.mark.parametrize("kind", ["single_token_batch", "ragged_batch"])
@torch.no_grad()
def test_scores_and_loss_equal_the_naive_ones(model, kind, request):
    batch = request.getfixturevalue(kind)
    scorer = OptionScorer(model, pad_id=0)
    torch.testing.assert_close(scorer.scores(batch), naive_scores(model, batch), **FP32)
    torch.testing.assert_close(scorer.loss(batch), naive_loss(model, batch), **FP32)
    assert scorer.loss(batch).shape == ()


@torch.no_grad()
def test_shortcut_is_taken_and_equals_the_full_path(model, single_token_batch):
    scorer = OptionScorer(model)
    asked, calls = [], []
    model.get_output_embeddings().register_forward_hook(lambda *call: calls.append(call[1]))
    scorer.token_scores.register_forward_hook(lambda *call: asked.append(call[1]))
    short = scorer.loss(single_token_batch)
    assert not asked, "the shortcut went through the whole output matrix"
    scorer.option_rows = None
    full = scorer.loss(single_token_batch)
    assert [inputs[0][0].shape for inputs in asked] == [(4, 32)], "one contiguous row per example"
    assert not calls, "a matrix of logits was made"
    torch.testing.assert_close(short, full, **FP32)


@torch.no_grad()
def test_two_options_of_equal_length_are_a_logistic_of_the_difference(make_llama):
    batch = [Encoded([5, 6, 7, 8], ([10, 11], [12, 13]), 1), Encoded([9, 5], ([20, 21], [22, 23]), 0)]
    scorer = OptionScorer(make_llama())
    scores = scorer.scores(batch)
    margin = torch.stack([scores[0, 1] - scores[0, 0], scores[1, 0] - scores[1, 1]])
    # an identity of the same fp32 numbers: log(1 + exp) and log-softmax round apart by a few units
    torch.testing.assert_close(scorer.loss(batch), torch.log1p((-margin).exp()).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["single_token_batch", "ragged_batch"])
@torch.no_grad()
def test_batch_composition_and_padding_do_not_matter(model, kind, request):
    batch = request.getfixturevalue(kind)
    scorer = OptionScorer(model, pad_id=0)
    together = scorer.scores(batch)
    for index, example in enumerate(batch):
        alone = scorer.scores([example])
        torch.testing.assert_close(alone[0], together[index, : alone.shape[1]], **FP32)
    # padding is never looked at, so another pad token changes not one bit
    assert torch.equal(together, OptionScorer(model, pad_id=77).scores(batch))
    reverse = scorer.scores(batch[::-1]).flip(0)
    torch.testing.assert_close(reverse, together, **FP32)


def test_gradients_equal_the_naive_ones(model, single_token_batch):
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(OptionScorer(model).loss(single_token_batch), list(model.parameters()))
    naive = torch.autograd.grad(naive_loss(model, single_token_batch), list(model.parameters()))
    for name, left, right in zip(names, ours, naive, strict=True):
        # fp32 sums in another order, relative to the largest entry of that tensor's gradient
        assert (left - right).abs().max() <= 1e-4 * right.abs().max() + 1e-6, name


@pytest.mark.parametrize("kind", ["single_token_batch", "ragged_batch"])
@torch.no_grad()
def test_weights_swapped_at_module_calls_take_effect(model, kind, request):
    """As a layerwise engine does: while a module runs, and only then, its weights are others."""
    batch = request.getfixturevalue(kind)
    scorer = OptionScorer(model)
    moved = {}
    for number, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        moved[parameter] = torch.nn.Parameter(parameter + 0.05 * noise)

    def swap(module, _):
        module.kept = dict(module._parameters)
        for name, parameter in module.kept.items():
            if parameter is not None:
                module._parameters[name] = moved[parameter]

    def restore(module, *_):
        module._parameters.update(module.__dict__.pop("kept"))

    before = scorer.loss(batch)
    asked = (*model.modules(), scorer.option_rows, scorer.token_scores)
    modules = [module for module in asked if module._parameters]
    handles = [module.register_forward_pre_hook(swap) for module in modules]
    handles += [module.register_forward_hook(restore) for module in modules]
    swapped = scorer.loss(batch)
    for handle in handles:
        handle.remove()
    for parameter, other in moved.items():
        parameter.copy_(other)
    torch.testing.assert_close(swapped, naive_loss(model, batch), **FP32)
    assert (swapped - before).abs() > 100 * FP32["atol"], "the perturbation must be visible for this test to mean much"
    torch.testing.assert_close(scorer.loss(batch), swapped, **FP32)  # the rows share the weights, copies would be stale


def test_option_rows_share_the_parameter_and_leave_the_model_alone(make_llama):
    model = make_llama(tie_word_embeddings=True).train()
    torch.rand(3)  # so that the state is not that of a generator just seeded
    names = [name for name, _ in model.named_modules()]
    state = torch.get_rng_state()
    scorer = OptionScorer(model)
    assert scorer.option_rows.weight is model.lm_head.weight
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_dropout_does_not_confuse_the_trial(make_gpt2):
    scorer = OptionScorer(make_gpt2().train())
    assert scorer.source_reason.startswith("body and head apart")
    assert scorer.option_rows is not None


@torch.no_grad()
def test_shared_rows_and_queries_save_work():
    example = Encoded([5, 6, 7], ([9], [9, 8], [9, 8, 7, 6], [40, 41]), 3)
    layout = lay_out([example], pad_id=0)
    # rows: prompt + 9 8 7 (which the first two options begin) and prompt + 40; no option's last token is fed
    assert layout.input_ids.tolist() == [[5, 6, 7, 9, 8, 7], [5, 6, 7, 40, 0, 0]]
    # looked up: prompt's end once, after 9, after 9 8, after 9 8 7, after 40
    queries = list(zip(layout.query_row.tolist(), layout.query_position.tolist(), strict=True))
    assert queries == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 3)]


# peft asks transformers for an attribute by its old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["lora", "lora_head", "prefix", "prompt"])
@torch.no_grad()
def test_peft_adapters(adapter, make_llama, single_token_batch, ragged_batch):
    peft = pytest.importorskip("peft")
    make = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "lora_head": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model = peft.get_peft_model(make_llama(), make[adapter]()).eval()
    scorer = OptionScorer(model)  # before the adapter does anything: LoRA starts as the identity and then moves
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    for batch in (single_token_batch, ragged_batch):
        expected = naive_scores(model, batch, virtual=3 if adapter == "prompt" else 0)
        torch.testing.assert_close(scorer.scores(batch), expected, **FP32)
    assert ("learned in front of the input" in scorer.source_reason) == (adapter in ("prefix", "prompt"))
    assert (scorer.option_rows is not None) == (adapter == "lora")


@torch.no_grad()
def test_changed_logits_are_asked_of_the_whole_model(single_token_batch):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    config.num_key_value_heads, config.final_logit_softcapping, config.initializer_range = 2, 5.0, 0.3
    model = transformers.Gemma2ForCausalLM(config).eval()
    scorer = OptionScorer(model)
    assert "final_logit_softcapping" in scorer.source_reason
    assert scorer.option_rows is None
    torch.testing.assert_close(scorer.scores(single_token_batch), naive_scores(model, single_token_batch), **FP32)


@torch.no_grad()
def test_logits_changed_in_code_are_found_out_by_the_trial(make_llama, single_token_batch):
    model = make_llama()
    plain = model.forward

    def doubled(input_ids, use_cache=False):
        output = plain(input_ids=input_ids, use_cache=use_cache)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    scorer = OptionScorer(model)
    assert "other logits" in scorer.source_reason
    torch.testing.assert_close(scorer.scores(single_token_batch), naive_scores(model, single_token_batch), **FP32)


def test_a_head_with_bias_is_called_whole(make_llama):
    model = make_llama()
    biased = torch.nn.Linear(32, 384)
    torch.nn.init.zeros_(biased.bias)  # no trial can see it yet; training would move it
    model.lm_head = biased
    assert OptionScorer(model).option_rows is None


@torch.no_grad()
def test_autocast_keeps_scores_in_fp32(make_llama, single_token_batch):
    model = make_llama()
    plain, lowered = OptionScorer(model), OptionScorer(model, autocast=torch.bfloat16)
    exact, rounded = plain.scores(single_token_batch), lowered.scores(single_token_batch)
    assert rounded.dtype == torch.float32
    assert lowered.loss(single_token_batch).dtype == torch.float32
    present = exact.isfinite()
    error = (rounded - exact)[present].abs().max()
    # bf16 products keep 8 bits: errors of 1 % of logits near 10 pass; none at all would mean autocast was not on
    assert 0 < error < 0.3
    values = rounded[present]
    assert not torch.equal(values, values.bfloat16().float()), "logits were rounded to bf16"
    # the loss without the normaliser and the one with it see the same body: they agree as closely as in fp32
    labels = torch.tensor([example.label for example in single_token_batch])
    torch.testing.assert_close(
        lowered.loss(single_token_batch), torch.nn.functional.cross_entropy(rounded, labels), **FP32
    )


@torch.no_grad()
def test_bf16_weights(make_llama, single_token_batch):
    model = make_llama().to(torch.bfloat16)
    scorer = OptionScorer(model)
    assert scorer.option_rows is not None
    scores = scorer.scores(single_token_batch)
    assert scores.dtype == torch.float32
    # the naive way runs other matrix shapes in bf16 (8 bits): logits near 10 may differ by some of their units of 1/16
    torch.testing.assert_close(scores, naive_scores(model, single_token_batch), rtol=0, atol=0.3)


def test_refusals(make_llama):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, initializer_range=0.5, **small)).eval()
    with pytest.raises(ModelError, match="not causal"):
        OptionScorer(bert)
    with pytest.raises(ConfigError, match="autocast"):
        OptionScorer(make_llama(), autocast=torch.float32)
    scorer = OptionScorer(make_llama())
    for call in (scorer.scores, scorer.loss):
        with pytest.raises(DataError, match="empty"):
            call([])
        with pytest.raises(DataError, match="at least one"):
            call([Encoded([], ([1], [2]), 0)])
        with pytest.raises(DataError, match="at least one"):
            call([Encoded([1], ([1], []), 0)])
        with pytest.raises(DataError, match="label 2"):
            call([Encoded([1], ([1], [2]), 2)])
        with pytest.raises(DataError, match="129 tokens long"):
            call([Encoded([1] * 129, ([1], [2]), 0)])
