"""Tasks, objectives, modes and kinds of model through the command line, on tiny models."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from zotune.errors import ConfigError, DataError
from zotune.runs.config import TrainConfig
from zotune.runs.job import Listener, draw_rows
from zotune.tasks.catalogue import TASKS

COPA = {
    "premise": "The man fell.", "choice1": "He slipped on ice.", "choice2": "He slept well.", "question": "cause", "label": 0,
}  # fmt: skip
SQUAD = {
    "title": "t",
    "context": "Anna lives in Rome.",
    "question": "Where does Anna live?",
    "answers": {"text": ["Rome"]},
}


def folder_of(tmp_path, row, count=8):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps({**row, "idx": i}) + "\n" for i in range(count)))
    return data


def swapped(arguments, **changed):
    """The arguments with some options replaced."""
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    pairs |= {f"--{key.replace('_', '-')}": str(value) for key, value in changed.items()}
    return [part for pair in pairs.items() for part in pair]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_task_is_listed(run):
    printed = run("tasks").output
    assert all(name in printed for name in TASKS)


def test_a_choice_task_trains_on_the_language_model_loss(run, arguments, tmp_path):
    words = swapped(arguments, task="copa", data=folder_of(tmp_path, COPA), train_rows=8, eval_rows=8, steps=3)
    printed = run("train", *words, "--out", tmp_path / "run").output
    assert "lm; " in " ".join(printed.split())
    results = results_of(tmp_path / "run")
    assert results["prior_corrected"] is None  # its options differ from row to row
    assert results["after"]["metric"] == "accuracy"


@pytest.mark.parametrize("objective", ["lm", "f1"])
def test_a_generation_task_trains_and_reports_f1(run, arguments, tiny, tmp_path, objective):
    words = swapped(arguments, task="squad", data=folder_of(tmp_path, SQUAD, 4), objective=objective, steps=2, eps=1e-2)
    printed = run("train", *words, "--out", tmp_path / "run").output
    results = results_of(tmp_path / "run")
    assert set(results["after"]) >= {"metric", "f1", "exact", "loss", "empty", "interval"}
    assert ("engine in_place" in printed) == (objective == "f1")
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )
    evaluated = run("evaluate", *swapped(words, model=tmp_path / "run" / "model")).output
    assert "f1" in evaluated
    assert "empty answers" in evaluated


def test_a_reward_without_a_gradient_is_a_users_function(run, arguments, tmp_path):
    (tmp_path / "mine.py").write_text("def short(text, row):\n    return -len(text) - row['label']\n")
    words = swapped(arguments, objective="reward", reward=f"{tmp_path / 'mine.py'}:short", steps=2, eval_rows=4)
    run("train", *words, "--out", tmp_path / "run")
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(ledger[1])["losses"][0] >= 0  # minus the mean reward, which is negative


def test_a_score_that_does_not_change_is_reported_with_advice(run, arguments, tmp_path):
    words = swapped(arguments, objective="accuracy", eps=1e-6, steps=12)
    assert "no signal" in run("train", *words, "--out", tmp_path / "run").output


@pytest.mark.parametrize("mode", ["prefix", "prompt", "head", "norm_bias"])
def test_modes_train_and_replay(run, arguments, tiny, tmp_path, mode):
    words = swapped(arguments, mode=mode, steps=2, eval_rows=4)
    run("train", *words, "--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )


def test_groups_with_their_own_eps_replay(run, arguments, tiny, tmp_path):
    words = [*swapped(arguments, steps=3, eval_rows=4), "--mode-option", "eps_by_scale=true"]
    run("train", *words, "--out", tmp_path / "run")
    header = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[0])
    assert len({group["eps"] for group in header["groups"]}) > 1
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )


def test_other_ways_of_asking(run, arguments):
    printed = run("evaluate", *arguments, "--demonstrations", 4, "--calibrate").output
    for row in ("as it is", "prior-corrected", "calibrated", "4 demonstrations", "95 % interval"):
        assert row in printed


def test_rows_drawn_as_by_mezos_code(run, arguments, tmp_path):
    with pytest.raises(DataError, match="none is left to train on"):  # 24 rows, and 500 of them would be for dev
        run("train", *arguments, "--protocol", "mezo", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (1000, 300)),
        ({"train_rows": 0, "eval_rows": 0}, (1600, 1100)),  # all
        ({"eval_rows": 7}, (1000, 7)),
        ({"protocol": "mezo"}, (1000, 1000)),
        ({"protocol": "mezo", "train_rows": 20, "eval_rows": 300}, (20, 300)),
    ],
)
def test_how_many_rows(tmp_path, settings, counts):
    for split, count in (("train", 1600), ("validation", 1100)):
        rows = (json.dumps({"sentence": f"film {i}", "label": i % 2}) + "\n" for i in range(count))
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    config = TrainConfig(out="unused", task="sst2", data=str(tmp_path), **settings)
    assert tuple(map(len, draw_rows(config, TASKS["sst2"], Listener()))) == counts


@pytest.mark.parametrize("name", ["train_rows", "eval_rows"])
def test_mezos_code_draws_a_number_of_rows(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1 with protocol mezo"):
        TrainConfig(out="unused", protocol="mezo", **{name: 0})
    with pytest.raises(ConfigError, match=f"{name} must be at least 0"):
        TrainConfig(out="unused", **{name: -1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "sst3"], "sst2"),
        (["--objective", "f1"], "not defined for task"),
        (["--objective", "reward"], "name a function"),
        (["--objective", "lmm"], "Did you mean 'lm'"),
        (["--protocol", "mezzo"], "Did you mean 'mezo'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(run, arguments, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        run("train", *arguments, *options, "--out", tmp_path / "run")


@pytest.fixture
def roberta(tmp_path):
    """A tiny masked model in a folder."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    bare.train_from_iterator(["a gripping film It was great.", "a dull film It was terrible."] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=80, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_masked_models_train_and_replay(run, arguments, roberta, tmp_path, mode):
    words = swapped(arguments, model=roberta, steps=2, eval_rows=4, mode=mode)
    run("train", *words, "--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    printed = run("replay", "--base", roberta, "--ledger", ledger, "--out", tmp_path / "r").output
    assert "equal to the trained" in printed
    with pytest.raises(ConfigError, match="fills in masks"):
        run("evaluate", *words, "--demonstrations", 2)
