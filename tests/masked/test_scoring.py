"""Masked scores against the naive way; evaluation, training and adapters through the same interface as causal models."""

import pytest
import torch

import zotune
from zotune.core.site import canonical_name
from zotune.errors import ConfigError, DataError, ModelError
from zotune.evaluation.evaluate import evaluate
from zotune.masked import MaskedScorer, encode_all_masked, find_masked_template, load_masked
from zotune.tasks.encoding import Encoded
from zotune.tuning import make_mode

# fp32: the same sums in another order and batch shape; logits reach about 10, a unit in the last place of which is 1e-6
FP32 = {"rtol": 0.0, "atol": 3e-5}
ROWS = [
    {"sentence": "a gripping film", "label": 1},
    {"sentence": "a dull film and a very long one that does not end", "label": 0},
    {"sentence": "okay", "label": 0},
]


@pytest.fixture
def batch(tokenizer):
    return encode_all_masked(find_masked_template("sst2"), ROWS, tokenizer)


def scorer_of(model, tokenizer, **settings):
    return MaskedScorer(model, mask_id=tokenizer.mask_token_id, pad_id=tokenizer.pad_token_id, **settings)


def naive_scores(model, tokenizer, batch):
    """One text at a time, the whole model, no padding: log-probability of each word at the mask."""
    table = []
    for example in batch:
        logits = model(input_ids=torch.tensor([example.prompt_ids])).logits[0]
        predicted = logits[example.prompt_ids.index(tokenizer.mask_token_id)].log_softmax(-1)
        table.append(predicted[[option[0] for option in example.option_ids]])
    return torch.stack(table)


@torch.no_grad()
def test_scores_and_loss_equal_the_naive_ones(model, tokenizer, batch):
    scorer = scorer_of(model, tokenizer)
    assert scorer.source_reason.startswith("body and head apart")
    expected = naive_scores(model, tokenizer, batch)
    torch.testing.assert_close(scorer.scores(batch), expected, **FP32)
    labels = torch.tensor([example.label for example in batch])
    torch.testing.assert_close(scorer.loss(batch), torch.nn.functional.cross_entropy(expected, labels), **FP32)
    for index, example in enumerate(batch):  # neither padding nor neighbours matter
        torch.testing.assert_close(scorer.scores([example])[0], expected[index], **FP32)
    assert expected.std() > 0.1, "the words must differ for this test to mean much"


@torch.no_grad()
def test_the_whole_model_where_body_and_head_are_not_known(model, tokenizer, batch):
    expected = scorer_of(model, tokenizer).scores(batch)
    inner = model.forward

    def doubled(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    scorer = scorer_of(model, tokenizer)
    assert "other logits" in scorer.source_reason
    assert not torch.allclose(scorer.scores(batch), expected)
    # logits twice as large as those of FP32
    torch.testing.assert_close(scorer.scores(batch), naive_scores(model, tokenizer, batch), rtol=0, atol=6e-5)
    with pytest.raises(ModelError, match="gives no hidden states"):
        scorer.hidden(batch)


@torch.no_grad()
def test_fewer_words_in_some_examples(model, tokenizer, batch):
    more = Encoded(batch[0].prompt_ids, ([9], [8], [7]), 2)
    scores = scorer_of(model, tokenizer).scores([more, batch[1]])
    assert scores.shape == (2, 3)
    assert scores.isfinite().tolist() == [[True] * 3, [True, True, False]]


@torch.no_grad()
def test_evaluate_takes_masked_examples(model, tokenizer, batch):
    scorer = scorer_of(model, tokenizer)
    whole = evaluate(scorer, batch, batch_size=2)
    torch.testing.assert_close(whole.scores, naive_scores(model, tokenizer, batch), **FP32)
    assert whole.mean_loss == pytest.approx(float(scorer.loss(batch)), abs=3e-5)  # as FP32


@pytest.mark.parametrize("mode", ["full", "lora", "head", "norm_bias"])
def test_zo_training_with_modes_and_both_engines(model, tokenizer, batch, mode):
    """Engines agree in fp64, losses move, and LoRA's folder loads with plain PEFT."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = []
    for engine in ("layerwise", "in_place"):
        copy = type(model)(model.config).eval()
        copy.load_state_dict(start)
        adapted = make_mode(mode).attach(copy, 0).double()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zero at the start: A would not matter
                    parameter.fill_(0.05)
        named = [(canonical_name(name), p) for name, p in adapted.named_parameters() if p.requires_grad]
        scorer = scorer_of(adapted, tokenizer)
        opt = zotune.ZO(named, lr=1e-3, eps=1e-3, engine=engine)
        losses = []
        for _ in range(2):
            opt.step(lambda scorer=scorer: scorer.loss(batch))
            losses += opt.last.losses
        answers.append(torch.tensor(losses, dtype=torch.float64))
    # fp64 sums in the same order, but for large modules done in pieces
    torch.testing.assert_close(*answers, rtol=0, atol=1e-11)
    assert len(set(answers[0].tolist())) == 4


@torch.no_grad()
def test_autocast_and_low_precision_keep_scores_in_fp32(model, tokenizer, batch):
    exact = scorer_of(model, tokenizer).scores(batch)
    lowered = scorer_of(model, tokenizer, autocast=torch.bfloat16).scores(batch)
    assert lowered.dtype == torch.float32
    # bf16 products keep 8 bits: errors of some percent of logits near 10 pass; none would mean autocast was not on
    assert 0 < float((lowered - exact).abs().max()) < 1.0
    low = scorer_of(model.to(torch.bfloat16), tokenizer).scores(batch)
    assert low.dtype == torch.float32
    assert float((low - exact).abs().max()) < 2.0


def test_trying_the_model_moves_no_generator_and_no_mode(model, tokenizer):
    model.train()
    torch.rand(3)
    state = torch.get_rng_state()
    scorer = scorer_of(model, tokenizer)
    assert scorer.source_reason.startswith("body and head apart")  # dropout does not confuse the trial
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_refusals(model, tokenizer, batch):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ModelError, match="causal"):
        scorer_of(LlamaForCausalLM(LlamaConfig(vocab_size=50, **small)).eval(), tokenizer)
    with pytest.raises(ConfigError, match="autocast"):
        scorer_of(model, tokenizer, autocast=torch.float32)
    scorer = scorer_of(model, tokenizer)
    mask = tokenizer.mask_token_id
    for call in (scorer.scores, scorer.loss):
        with pytest.raises(DataError, match="empty"):
            call([])
        for bad in (
            Encoded([0, 5, 2], ([5], [6]), 0),
            Encoded([0, mask, mask, 2], ([5], [6]), 0),
            Encoded([0, mask, 2], ([5, 7], [6]), 0),
            Encoded([0, mask, 2], ([5], [6]), 2),
        ):
            with pytest.raises(DataError, match="needed are one mask"):
                call([*batch, bad])
        call([Encoded([0, mask, *[5] * 61, 2], ([5], [6]), 0)])  # 64 tokens can be read, not 65, by both
        with pytest.raises(DataError, match="65 tokens long and the model reads 64"):
            call([Encoded([0, mask, *[5] * 62, 2], ([5], [6]), 0)])


@torch.no_grad()
def test_loading(model, tokenizer, batch, tmp_path):
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, its = load_masked(str(tmp_path / "m"))
    assert its.mask_token_id == tokenizer.mask_token_id
    assert torch.equal(scorer_of(loaded, its).scores(batch), scorer_of(model, tokenizer).scores(batch))
    assert next(load_masked(str(tmp_path / "m"), dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_masked(str(tmp_path / "nothing"))
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    bare.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no mask token"):
        load_masked(str(tmp_path / "m"))
