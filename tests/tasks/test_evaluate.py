"""Evaluation in batches, and the prior-corrected baseline."""

import math

import pytest
import torch

from zotune.errors import ConfigError, DataError
from zotune.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_calibrated,
    fit_prior_correction,
    prior_corrected,
    wilson_interval,
)
from zotune.evaluation.evaluate_text import evaluate_generation
from zotune.tasks.catalogue import TASKS
from zotune.tasks.encoding import Encoded, encode_all
from zotune.tasks.generation import Generator
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.shared_prompt import SharedPrompt, worthwhile
from zotune.tasks.task import calibration_example, make_examples

# fp32 sums in another batch shape, as in test_scoring
FP32 = {"rtol": 0.0, "atol": 3e-5}


def test_order_batches_and_progress(make_gpt2, single_token_batch, ragged_batch):
    examples = [*ragged_batch, *single_token_batch]
    scorer = OptionScorer(make_gpt2())
    seen = []
    whole = evaluate(scorer, examples, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]
    for index, example in enumerate(examples):
        alone = evaluate(scorer, [example]).scores[0]
        # fp32 sums in another batch shape, as in test_scoring
        torch.testing.assert_close(whole.scores[index, : len(alone)], alone, rtol=0, atol=3e-5)
    assert whole.scores.shape == (8, 5)
    assert whole.labels.tolist() == [example.label for example in examples]
    by_hand = [int(row.argmax()) == example.label for row, example in zip(whole.scores, examples, strict=True)]
    assert whole.accuracy == sum(by_hand) / 8
    assert whole.standard_error == pytest.approx(math.sqrt(whole.accuracy * (1 - whole.accuracy) / 8), rel=1e-12)
    # the mean loss is the scorer's own loss, but for fp32 rounding
    assert whole.mean_loss == pytest.approx(float(scorer.loss(examples).detach()), abs=3e-5)


def test_modes_and_gradients_are_put_back(make_gpt2, single_token_batch):
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    scorer = OptionScorer(model)
    first, second = (evaluate(scorer, single_token_batch).scores for _ in range(2))
    assert torch.equal(first, second), "dropout was on"
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad


def test_evaluation_refuses_nothing_to_do(make_gpt2, single_token_batch):
    scorer = OptionScorer(make_gpt2())
    with pytest.raises(DataError, match="no examples"):
        evaluate(scorer, [])
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(scorer, single_token_batch, batch_size=0)


@pytest.mark.parametrize("options", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_prior_correction_is_the_optimum(options, spread):
    generator = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(400, options, generator=generator)
    scores[:, 0] += 2 * spread  # the model nearly always says option 0
    labels = torch.randint(options, (400,), generator=generator)
    bias = fit_prior_correction(scores, labels)
    assert bias[0] == 0
    # where the slope of a convex loss vanishes: predicted and actual shares agree (to where Newton stops, 1e-12)
    shares = (scores.double() + bias).softmax(1).mean(0)
    torch.testing.assert_close(shares, torch.bincount(labels).double() / 400, rtol=0, atol=1e-10)
    before = Evaluation.of(scores, labels)
    after = prior_corrected(before, bias)
    assert after.mean_loss < before.mean_loss


def test_prior_correction_recovers_a_shift():
    """Labels drawn from softmax(scores): a constant added to one option's scores is what the fit takes away."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, 2, generator=generator)
    labels = torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1)
    plain = fit_prior_correction(scores, labels)
    shifted = fit_prior_correction(scores + torch.tensor([0.0, 1.7]), labels)
    # the same optimum moved by the constant, which fp32 scores hold to 2e-7
    torch.testing.assert_close(shifted - plain, torch.tensor([0.0, -1.7], dtype=torch.float64), rtol=0, atol=1e-6)
    assert abs(plain[1]) < 0.2  # true value 0; standard error 1 / sqrt(2000 * mean p (1 - p)), about 0.05


def test_prior_correction_refusals():
    scores = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="option 2 is never right"):
        fit_prior_correction(scores, torch.tensor([0, 1] * 5))
    with pytest.raises(DataError, match="finite scores"):
        fit_prior_correction(scores.masked_fill(scores == scores.max(), -torch.inf), torch.tensor([0, 1, 2, 0, 1] * 2))
    with pytest.raises(DataError, match="2 options"):
        prior_corrected(Evaluation.of(scores, torch.zeros(10, dtype=torch.int64)), torch.zeros(2))


def many_options(seed=0, options=23):
    """A question with many options of several tokens, as ReCoRD has them, and several right ones."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(4, 384, (count,), generator=generator).tolist()

    return Encoded(ids(20), tuple(ids(3 + n % 4) for n in range(options)), 2, (2, 1))


def test_scores_do_not_depend_on_batches_on_any_architecture(architecture, single_token_batch, ragged_batch):
    examples = [*ragged_batch, *single_token_batch, many_options(), many_options(1, 9)]
    scorer = OptionScorer(architecture)
    whole = evaluate(scorer, examples, batch_size=10)
    for batch_size in (1, 3):
        again = evaluate(scorer, examples, batch_size=batch_size)
        torch.testing.assert_close(again.scores, whole.scores, **FP32)
        assert again.accuracy == whole.accuracy
    for example, row in zip(examples, whole.scores, strict=True):  # and each option by itself, in a row of its own
        alone = [scorer.scores([Encoded(example.prompt_ids, (option,), 0)]).item() for option in example.option_ids]
        torch.testing.assert_close(row[: len(alone)], torch.tensor(alone), **FP32)


def test_prompts_are_read_once_where_that_pays(architecture):
    """On every architecture: the kept keys and values are those of the prompt read again, sliding windows included."""
    scorer = OptionScorer(architecture)
    shared = SharedPrompt(scorer)
    assert shared.works, shared.reason
    for example in (many_options(), many_options(1, 4), many_options(2, 30)):
        alone = [scorer.scores([Encoded(example.prompt_ids, (option,), 0)]).item() for option in example.option_ids]
        for most_rows in (3, 100):
            torch.testing.assert_close(shared.scores(example, most_rows)[0].tolist(), alone, **FP32)
    single = Encoded([5, 6, 7], ([8], [9]), 1)  # nothing to go on with
    torch.testing.assert_close(shared.scores(single, 8), scorer.scores([single]), **FP32)


def test_tokens_saved_by_reading_prompts_once(make_llama):
    model = make_llama()
    fed = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    examples = [many_options(), many_options(1, 3)]  # 23 options after 20 tokens are worth it, 3 are not
    assert [worthwhile(example) for example in examples] == [True, False]
    evaluate(OptionScorer(model), examples, batch_size=16)
    # the prompt once, then 16 and 7 options without their last tokens, at most five; then one prompt and its three
    few = sum(len(option) - 1 for option in examples[1].option_ids)
    assert fed[-4:] == [20, 16 * 5, 7 * 5, 20 + few]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
@torch.no_grad()
def test_peft_adapters_share_prompts_or_say_why_not(adapter, make_llama):
    peft = pytest.importorskip("peft")
    make = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model = peft.get_peft_model(make_llama(), make[adapter]()).eval()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    scorer = OptionScorer(model)
    example = many_options()
    alone = [scorer.scores([Encoded(example.prompt_ids, (option,), 0)]).item() for option in example.option_ids]
    torch.testing.assert_close(evaluate(scorer, [example]).scores[0].tolist(), alone, **FP32)
    found = SharedPrompt(scorer)
    assert found.works == (adapter == "lora")  # a prefix takes the place where kept keys and values would go
    assert ("once for all options" if found.works else "read again for each option") in found.reason


def test_many_options_come_in_parts(make_llama, monkeypatch):
    monkeypatch.setattr("zotune.evaluation.evaluate.worthwhile", lambda example: False)
    scorer = OptionScorer(make_llama())
    sizes = []
    plain = scorer.scores
    scorer.scores = lambda batch: sizes.append(sum(len(e.option_ids) for e in batch)) or plain(batch)
    seen = []
    evaluate(scorer, [many_options(), many_options(1)], batch_size=2, progress=lambda *numbers: seen.append(numbers))
    assert max(sizes) <= 8, "four rows per example of the batch size"
    assert sum(sizes) == 46
    assert seen == [(1, 2), (2, 2)]


def test_any_right_option_counts(make_llama):
    scorer = OptionScorer(make_llama())
    examples = [many_options(seed) for seed in range(12)]
    chosen = evaluate(scorer, examples).scores.argmax(1).tolist()
    right = [(2, option) if number % 2 else (2,) for number, option in enumerate(chosen)]
    lenient = [Encoded(e.prompt_ids, e.option_ids, 2, r) for e, r in zip(examples, right, strict=True)]
    found = evaluate(scorer, lenient)
    assert found.accuracy == sum(option in r for option, r in zip(chosen, right, strict=True)) / 12
    assert found.accuracy >= 0.5
    assert prior_corrected(found, torch.zeros(23)).accuracy == found.accuracy
    strict = evaluate(scorer, [Encoded(e.prompt_ids, e.option_ids, 2) for e in examples])
    assert strict.right is None
    assert strict.accuracy < found.accuracy


@pytest.mark.parametrize(
    ("share", "count", "interval"),
    [
        # published examples: Newcombe (1998), table I, method 3
        (81 / 263, 263, (0.2553, 0.3662)),
        (15 / 148, 148, (0.0624, 0.1605)),
        (0 / 20, 20, (0.0, 0.1611)),
        (1 / 29, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval(share, count, interval):
    assert wilson_interval(share, count) == pytest.approx(interval, abs=5e-5)  # printed with four digits
    low, high = wilson_interval(1 - share, count)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)


def test_an_evaluation_has_its_interval():
    scores = torch.tensor([[1.0, 0.0]] * 15 + [[0.0, 1.0]] * 5)
    found = Evaluation.of(scores, torch.zeros(20, dtype=torch.int64))
    assert found.interval == wilson_interval(0.75, 20)
    assert found.interval[0] < 0.75 < found.interval[1]  # the share itself: no tolerance


def copa(tokenizer):
    task = TASKS["copa"]
    rows = [
        {"premise": "The film ended.", "question": "effect", "choice1": "I left the cast.", "choice2": "It hit.", "label": 1},
        {"premise": "It rained.", "question": "cause", "choice1": "Clouds.", "choice2": "the cast is great", "label": 1},
        {"premise": "A dull plot.", "question": "cause", "choice1": "The jokes were bad", "choice2": "a", "label": 0},
    ]  # fmt: skip
    examples = make_examples(task, rows)
    bare = [calibration_example(task, example) for example in examples]
    return encode_all(examples, tokenizer, 128), encode_all(bare, tokenizer, 128)


@torch.no_grad()
def test_surface_form_calibration_is_a_difference_of_sums(model, tokenizer):
    encoded, calibration = copa(tokenizer)

    def log_probability(prompt, option):
        logits = model(input_ids=torch.tensor([prompt + option]), use_cache=False).logits[0].float()
        predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return float(predicted[torch.arange(len(option)), torch.tensor(option)].sum())

    found = evaluate_calibrated(OptionScorer(model), encoded, calibration, batch_size=2)
    for example, bare, row in zip(encoded, calibration, found.scores.tolist(), strict=True):
        assert bare.option_ids == example.option_ids
        by_hand = [
            log_probability(example.prompt_ids, option) - log_probability(bare.prompt_ids, option)
            for option in example.option_ids
        ]
        assert row == pytest.approx(by_hand, abs=3e-4)  # sums of up to ten terms, each within 3e-5


def test_equal_calibrations_are_scored_once(make_llama, tokenizer):
    task = TASKS["sst2"]
    examples = make_examples(task, [{"sentence": f"film {n}", "label": n % 2} for n in range(6)])
    encoded = encode_all(examples, tokenizer, 128)
    calibration = encode_all([calibration_example(task, example) for example in examples], tokenizer, 128)
    scorer = OptionScorer(make_llama())
    asked = []
    plain = scorer.scores
    scorer.scores = lambda batch: asked.append(len(batch)) or plain(batch)
    found = evaluate_calibrated(scorer, encoded, calibration)
    assert asked == [6, 1]
    # the same is taken from every row, so differences between rows stay
    shift = evaluate(scorer, encoded).scores - found.scores
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), **FP32)
    with pytest.raises(DataError, match="as many options"):
        evaluate_calibrated(scorer, encoded, calibration[:-1])


def test_calibration_with_options_of_different_numbers(make_llama, ragged_batch):
    calibration = [Encoded([3], example.option_ids, example.label) for example in ragged_batch]
    found = evaluate_calibrated(OptionScorer(make_llama()), ragged_batch, calibration)
    assert not found.scores.isnan().any()
    for example, row in zip(ragged_batch, found.scores, strict=True):
        assert row.isfinite().tolist() == [number < len(example.option_ids) for number in range(5)]


SQUAD = [
    {"context": "the film is great", "question": "what is great", "answers": {"text": ["the film", "film"]}},
    {
        "context": "the jokes are good and the songs are terrible",
        "question": "what",
        "answers": {"text": ["the jokes"]},
    },
    {"context": "the cast", "question": "who", "answers": {"text": ["the cast is good"]}},
]


class Writing(Generator):
    """A generator whose answers a test chooses."""

    def __init__(self, model, tokenizer, texts):
        super().__init__(model, tokenizer)
        self.texts = texts

    def generate(self, prompts, *, batch_size, progress=None):
        from zotune.tasks.generation import Generated

        assert not self.model.training
        return [Generated(text, (), text != "cast") for text in self.texts]


def test_evaluating_texts(make_llama, tokenizer):
    encoded = encode_all(make_examples(TASKS["squad"], SQUAD), tokenizer, 128)
    model = make_llama().train()
    found = evaluate_generation(Writing(model, tokenizer, ["A film", "", "cast"]), encoded)
    assert model.training
    assert found.values["f1"].tolist() == pytest.approx([1, 0, 0.5], abs=1e-12)  # "cast" of "cast is good"
    assert found.values["exact"].tolist() == [1, 0, 0]
    assert (found.metric, found.score, found.mean("exact")) == ("f1", 0.5, pytest.approx(1 / 3))
    assert found.standard_error == pytest.approx(
        0.5 / math.sqrt(3), rel=1e-12
    )  # deviations 1/2, -1/2, 0 over n - 1 = 2
    assert found.interval == pytest.approx((0.5 - 1.959964 * 0.5 / 3**0.5, 0.5 + 1.959964 * 0.5 / 3**0.5))
    assert (found.empty, found.unfinished) == (1, 1)
    rewarded = evaluate_generation(
        Writing(model, tokenizer, ["A film", "", "cast"]), encoded, reward=lambda text, row: len(row["context"] + text)
    )
    assert rewarded.metric == "reward"
    assert rewarded.values["reward"].tolist() == [len(r["context"]) + n for r, n in zip(SQUAD, (6, 0, 4), strict=True)]


def test_evaluated_texts_do_not_depend_on_batches(make_gpt2, tokenizer):
    encoded = encode_all(make_examples(TASKS["squad"], SQUAD), tokenizer, 128)
    generator = Generator(make_gpt2(), tokenizer, max_new_tokens=8)
    whole = evaluate_generation(generator, encoded, batch_size=3)
    assert evaluate_generation(generator, encoded, batch_size=1).answers == whole.answers


def test_each_kind_has_its_evaluation(make_llama, tokenizer, single_token_batch):
    model = make_llama()
    encoded = encode_all(make_examples(TASKS["squad"], SQUAD), tokenizer, 128)
    with pytest.raises(DataError, match="use evaluate_generation"):
        evaluate(OptionScorer(model), encoded)
    with pytest.raises(DataError, match="no right answers"):
        evaluate_generation(Generator(model, tokenizer), single_token_batch)
    with pytest.raises(DataError, match="no examples"):
        evaluate_generation(Generator(model, tokenizer), [])
