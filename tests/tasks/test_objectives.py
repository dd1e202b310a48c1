"""What a run lowers: values by hand, micro-batches, gradients, and a step of ZO on each."""

import math

import numpy as np
import pytest
import torch

import zotune
from zotune.errors import ConfigError, DataError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.encoding import Encoded, encode_all
from zotune.tasks.generation import Generator
from zotune.tasks.metrics import f1
from zotune.tasks.objectives import (
    OBJECTIVES,
    SignalWatch,
    check_objective,
    closure_for,
    make_objective,
)
from zotune.tasks.rewards import find_reward, reward_of
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import make_examples

# as in test_scoring: fp32 sums in another order
FP32 = {"rtol": 0.0, "atol": 3e-5}
SQUAD = [
    {"context": "the film is great", "question": "what is great", "answers": {"text": ["the film", "film"]}},
    {
        "context": "the jokes are good and the songs are terrible",
        "question": "what",
        "answers": {"text": ["the jokes"]},
    },
    {"context": "the cast", "question": "who", "answers": {"text": ["the cast is good but the plot is thin"]}},
]


def parts(name, model, tokenizer, function=None):
    """An objective and a batch of a task that it is defined for."""
    if name in ("f1", "exact", "reward"):
        task = TASKS["squad"]
        batch = encode_all(make_examples(task, SQUAD), tokenizer, 128)
    elif name == "lm":
        task = TASKS["copa"]
        rows = [
            {"premise": "The film ended.", "question": "effect", "choice1": "I left.", "choice2": "It was late.", "label": 1},
            {"premise": "It rained.", "question": "cause", "choice1": "Clouds.", "choice2": "the cast sang well", "label": 1},
            {"premise": "A dull plot.", "question": "cause", "choice1": "The jokes were bad", "choice2": "a", "label": 0},
        ]  # fmt: skip
        batch = encode_all(make_examples(task, rows), tokenizer, 128)
    else:
        task = TASKS["sst2"]
        rows = [
            {"sentence": text, "label": label} for text, label in (("a dull film", 0), ("great", 1), ("the plot", 0))
        ]
        batch = encode_all(make_examples(task, rows), tokenizer, 128)
    objective = make_objective(
        name, task, OptionScorer(model), lambda: Generator(model, tokenizer, max_new_tokens=4), function
    )
    return objective, batch


def overlap(text, row):
    """A reward that differs from text to text: how many letters of it are in the context."""
    return sum(letter in row["context"] for letter in text) / 10


@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_micro_batches_give_the_number_of_the_batch(name, make_gpt2, tokenizer):
    objective, batch = parts(name, make_gpt2(), tokenizer, overlap if name == "reward" else None)
    whole = closure_for(objective, batch, None)()
    assert whole.shape == ()
    for size in (1, 2):
        torch.testing.assert_close(closure_for(objective, batch, size)().double(), whole.double(), **FP32)


@torch.no_grad()
def test_micro_batches_are_of_similar_length(make_gpt2):
    lengths = [9, 2, 7, 3, 8, 1]
    batch = [Encoded([5] * length, ([6], [7]), 0) for length in lengths]
    objective, seen = parts_seen(OptionScorer(make_gpt2()))
    closure_for(objective, batch, 2)()
    assert seen == [[1, 2], [3, 7], [8, 9]]
    seen.clear()
    closure_for(objective, batch, None)()
    assert seen == [lengths], "a batch that is not cut stays in its order"


def parts_seen(scorer):
    """The classification objective, and the prompts' lengths of each batch that it is asked for."""
    objective, seen = OBJECTIVES["classification"](scorer), []
    plain = objective.loss
    objective.loss = lambda part: seen.append([len(example.prompt_ids) for example in part]) or plain(part)
    return objective, seen


@torch.no_grad()
def test_language_model_loss_is_the_mean_over_tokens(model, tokenizer):
    objective, batch = parts("lm", model, tokenizer)
    nll = []
    for example in batch:
        option = example.option_ids[example.label]
        logits = model(input_ids=torch.tensor([example.prompt_ids + option]), use_cache=False).logits[0].float()
        predicted = logits.log_softmax(-1)[len(example.prompt_ids) - 1 : -1]
        nll += [-float(predicted[place, token]) for place, token in enumerate(option)]
    lengths = [len(example.option_ids[example.label]) for example in batch]
    assert len(set(lengths)) > 1, "with options of one length the mean over examples would be the same"
    assert float(objective.loss(batch)) == pytest.approx(sum(nll) / len(nll), abs=3e-5)  # as FP32
    assert objective.weight(batch) == len(nll)


@torch.no_grad()
def test_classification_is_the_scorers_loss_bit_for_bit(model, tokenizer):
    """Runs that began before there were objectives go on the same way: the same operations in the same order."""
    objective, batch = parts("classification", model, tokenizer)
    loss = OptionScorer(model).loss
    assert torch.equal(closure_for(objective, batch, None)(), loss(batch))
    batch = sorted(batch, key=lambda example: example.length)
    whole = (loss(batch[:2]).double() * 2 + loss(batch[2:]).double() * 1) / torch.tensor(3.0, dtype=torch.float64)
    assert torch.equal(closure_for(objective, batch, 2)(), whole)


@torch.no_grad()
def test_accuracy_counts_any_right_option(make_llama, ragged_batch):
    import dataclasses

    scorer = OptionScorer(make_llama())
    chosen = scorer.scores(ragged_batch).argmax(1).tolist()
    accuracy = OBJECTIVES["accuracy"](scorer)
    right = sum(option == example.label for option, example in zip(chosen, ragged_batch, strict=True))
    assert float(accuracy.loss(ragged_batch)) == -right / 4
    lenient = [
        dataclasses.replace(example, right=(example.label, option))
        for option, example in zip(chosen, ragged_batch, strict=True)
    ]
    assert float(accuracy.loss(lenient)) == -1


@torch.no_grad()
def test_scores_of_text(make_llama, tokenizer):
    model = make_llama()
    objective, batch = parts("f1", model, tokenizer)
    texts = [a.text for a in Generator(model, tokenizer, max_new_tokens=4).generate([e.prompt_ids for e in batch])]
    by_hand = [f1(text, row["answers"]["text"]) for text, row in zip(texts, SQUAD, strict=True)]
    assert float(objective.loss(batch)) == pytest.approx(-sum(by_hand) / 3, abs=1e-12)  # three additions of fp64
    reward, _ = parts("reward", model, tokenizer, overlap)
    by_hand = [overlap(text, row) for text, row in zip(texts, SQUAD, strict=True)]
    assert float(reward.loss(batch)) == pytest.approx(-sum(by_hand) / 3, abs=1e-12)
    assert any(by_hand)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_differentiable_means_that_a_gradient_can_be_asked_for(name, make_llama, tokenizer):
    model = make_llama()
    objective, batch = parts(name, model, tokenizer, overlap if name == "reward" else None)
    loss = objective.loss(batch)
    assert loss.requires_grad == objective.differentiable
    if objective.differentiable:
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_engines_see_the_same_losses(name, make_llama, tokenizer):
    """Perturbed module by module or as a whole; generation calls every module many times within one query."""
    losses = {}
    for engine in ("layerwise", "in_place"):
        model = make_llama()
        objective, batch = parts(name, model, tokenizer, overlap if name == "reward" else None)
        opt = zotune.ZO(model.named_parameters(), lr=0.0, eps=0.1, engine=engine)
        for _ in range(3):
            opt.step(closure_for(objective, batch, None))
            losses.setdefault(engine, []).extend(opt.last.losses)
    # fp32 sums in another order, as in test_scoring; scores that count agree unless that flips a prediction
    assert losses["layerwise"] == pytest.approx(losses["in_place"], abs=3e-5)
    if name in ("classification", "lm", "reward"):
        assert len(set(losses["layerwise"])) > 1, "the perturbation must be visible for this test to mean much"


def test_defaults_are_mezos():
    classification = {"sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc"}
    for name in (*classification, "copa", "record", "squad", "drop", "winogrande"):
        assert TASKS[name].default_objective == ("classification" if name in classification else "lm"), name


@pytest.mark.parametrize(
    ("name", "task", "function", "message"),
    [
        ("acuracy", "sst2", None, "Did you mean 'accuracy'"),
        ("classification", "squad", None, "nothing to choose from.*Fitting are lm, f1, exact, reward"),
        ("accuracy", "drop", None, "nothing to choose from"),
        ("f1", "sst2", None, "no answer is generated.*Fitting are classification, lm, accuracy, reward"),
        ("reward", "squad", None, "has no reward of its own"),
        ("reward", "squad", "nowhere", "named by module:name"),
        ("reward", "squad", "no_such_module_at_all:f", "cannot be imported"),
        ("reward", "squad", "math:no_such", "has no 'no_such'"),
        ("reward", "squad", "math:pi", "is a float; a function"),
        ("lm", "squad", "math:sqrt", "takes no function"),
    ],
)
def test_refusals_before_work(name, task, function, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(name, TASKS[task], function)


def test_rewards_by_name_and_file(tmp_path):
    (tmp_path / "mine.py").write_text("def length(text, row):\n    return -len(text)\n")
    found = find_reward(TASKS["squad"], f"{tmp_path / 'mine.py'}:length")
    assert found("abc", {}) == -3
    assert find_reward(TASKS["countdown"])("1 + 2", {"nums": [1, 2], "target": 3}) == 1
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        find_reward(TASKS["squad"], f"{tmp_path / 'broken.py'}:length")


@pytest.mark.parametrize("value", [None, "1", math.nan, math.inf])
def test_a_reward_must_be_a_finite_number(value, make_llama, tokenizer):
    objective, batch = parts("reward", make_llama(), tokenizer, lambda text, row: value)
    with pytest.raises(DataError, match="a finite number is needed"):
        objective.loss(batch)


def test_signal_watch_speaks_once_after_flat_steps_in_a_row():
    watch = SignalWatch(patience=3)
    steps = [(-0.5, -0.5), (-0.5, -0.5), (-0.5, -0.4), (-0.5, -0.5), (-0.25, -0.25), (-0.5, -0.5), (-0.5, -0.5)]
    said = [watch.step(losses) for losses in steps]
    assert [words is not None for words in said] == [False] * 5 + [True, False]
    assert "last 3 steps" in said[5]
    assert "larger eps" in said[5]
    assert watch.flat_steps == 6
    quiet = SignalWatch(patience=1)
    assert quiet.step([0.3]) is None, "one query has nothing to compare with"
    assert quiet.step([math.nan, math.nan]) is None
    with pytest.raises(ConfigError, match="patience"):
        SignalWatch(0)


def test_signal_watch_sees_the_trap(make_llama, tokenizer):
    """Accuracy at a tiny eps flips no prediction; the loss at the same eps moves."""
    told = {}
    for name in ("accuracy", "classification"):
        model, watch = make_llama(), SignalWatch(patience=4)
        objective, batch = parts(name, model, tokenizer)
        opt = zotune.ZO(model.named_parameters(), lr=0.0, eps=1e-5)
        for _ in range(5):
            opt.step(closure_for(objective, batch, None))
            told[name] = watch.step(opt.last.losses) or told.get(name)
    assert told["accuracy"] is not None
    assert told["classification"] is None


@pytest.mark.parametrize("value", [None, "x", float("nan"), float("inf"), torch.ones(2), np.ones(2), 1j])
def test_a_reward_is_one_finite_number(value):
    with pytest.raises(DataError, match="a finite number is needed"):
        reward_of(lambda text, row: value, "text", {})


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2]), np.ones(1) * 2]
)
def test_a_reward_may_be_any_number(value):
    assert reward_of(lambda text, row: value, "text", None) == 2.0


@pytest.mark.parametrize("function", [lambda text: 1.0, lambda a, b, c: 1.0])
def test_a_reward_of_other_arguments_is_refused_before_any_text_is_written(function):
    with pytest.raises(ConfigError, match="cannot be called with"):
        find_reward(TASKS["squad"], function)
