"""lm-evaluation-harness evaluates what zotune leaves behind; without it, an error names the extra.

What it makes of a model is checked against likelihoods computed here, row by row.
"""

import importlib
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from zotune.cli.harness import evaluate_with_harness
from zotune.errors import ConfigError, DataError, MissingExtraError, ModelError
from zotune.models import load_model
from zotune.runs.run_folder import trained_folder

needs_harness = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("lm_eval"), reason="lm-eval is not installed"
)


def answers(model, tokenizer, rows):
    """Accuracy by hand: which continuation is likelier, summed over its tokens."""
    right = 0
    for row in rows:
        scores = []
        for word in (" terrible", " great"):
            prompt = tokenizer(f"{row['sentence']} It was", add_special_tokens=False).input_ids
            whole = tokenizer(f"{row['sentence']} It was{word}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = F.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        right += int(scores[1] > scores[0]) == row["label"]
    return right / len(rows)


def rows_of(films):
    return [json.loads(line) for line in (films.parent / "rows.jsonl").read_text().splitlines()]


@needs_harness
@pytest.mark.parametrize("which", ["folder", "adapter"])
def test_a_trained_folder_is_evaluated_as_it_is(request, films, tmp_path, capsys, which):
    """A whole model and an adapter, through the command: the accuracy is the one counted by hand, and the JSON has it."""
    path = request.getfixturevalue(which)
    out = tmp_path / "results"
    given = {"model": str(path), "out": str(out), "precision": "fp32", "device": "cpu", "batch_size": 5}
    evaluate_with_harness(None, given, str(films), None, None)
    found = json.loads((out / "harness.json").read_text())
    assert found["results"]["films"]["acc,none"] == pytest.approx(answers(*load_model(str(path)), rows_of(films)))
    assert found["n-samples"]["films"] == {"original": 12, "effective": 12}
    assert found["zotune_model"] == str(path)
    assert "pretty_env_info" not in found
    printed = capsys.readouterr().out
    assert "|films" in printed.replace(" ", "")
    assert "acc" in printed


@needs_harness
def test_the_command(folder, films, tmp_path):
    """`zotune evaluate --harness FILE --limit 3 --demonstrations 1` of a run folder; without --out nothing is written."""
    from typer.testing import CliRunner

    from zotune.cli.app import app

    (tmp_path / "run.json").write_text('{"task": "copa"}')
    (tmp_path / "model").symlink_to(folder)
    words = ["--harness", films, "--limit", 3, "--demonstrations", 1, "--model", tmp_path, "--device", "cpu"]
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "|films" in result.output.replace(" ", "")
    assert "1" in [cell.strip() for cell in result.output.split("|")]  # n-shot
    assert "Only the first 3 rows of each task were asked: not numbers to report." in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "model"}


@needs_harness
def test_the_adapter_counts(folder, adapter, films):
    """The adapted model answers otherwise than its base on these rows: the adapter was not lost on the way."""
    rows = rows_of(films)
    assert answers(*load_model(str(folder)), rows) != answers(*load_model(str(adapter)), rows)


@needs_harness
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft 0.21 asks transformers 5.23 for a name it is dropping
@pytest.mark.parametrize("which", ["folder", "adapter"])
def test_the_harness_alone_reads_the_folders(request, folder, films, which):
    """As `lm_eval --model hf --model_args pretrained=...,peft=...` does, with no line of zotune between."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    path = request.getfixturevalue(which)
    arguments = {"pretrained": str(folder)} | ({"peft": str(path)} if which == "adapter" else {})
    found = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=[str(films)], device="cpu", log_samples=False, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert found["results"]["films"]["acc,none"] == pytest.approx(answers(*load_model(str(path)), rows_of(films)))


@needs_harness
def test_a_model_in_hand_is_left_as_it_was(folder, films):
    """Modes, global generators; limit and shots reach the harness."""
    from zotune.evaluation.harness import evaluate_harness

    model, tokenizer = load_model(str(folder))
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = evaluate_harness(model, tokenizer, [str(films)], limit=4, shots=1)
    assert found["n-samples"]["films"]["effective"] == 4
    assert found["n-shot"]["films"] == 1
    assert [module.training for module in model.modules()] == modes
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    json.dumps(found)


@needs_harness
def test_wrong_requests_are_refused_before_any_work(folder, films, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    from zotune.evaluation.harness import evaluate_harness

    def small(include_defaults):  # the library's own thousands of tasks take seconds to list
        return TaskManager(include_path=str(films.parent), include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    model, tokenizer = load_model(str(folder))
    for arguments, message in [
        ({"tasks": []}, "No task was named"),
        ({"tasks": [str(films)], "limit": 0}, "limit must be at least 1 row, got 0"),
        ({"tasks": [str(films)], "shots": -1}, "shots must be at least 0, got -1"),
        ({"tasks": ["film"]}, r"no task 'film', and there is no such file\. Near: films\."),
    ]:
        with pytest.raises(ConfigError, match=message):
            evaluate_harness(model, tokenizer, **arguments)
    lost = json.loads(films.read_text())
    lost["dataset_kwargs"]["data_files"]["validation"] = str(tmp_path / "lost.jsonl")
    with pytest.raises(DataError, match=r"rows of films cannot be had \(FileNotFoundError"):
        evaluate_harness(model, tokenizer, [lost])


@needs_harness
def test_rows_that_the_model_was_trained_on_are_refused(folder, films):
    """The demo's corpus holds SST-2's sentences; the harness's task of that name is known by its leaf."""
    from zotune.evaluation.harness import evaluate_harness

    model, tokenizer = load_model(str(folder))
    sst2 = {**json.loads(films.read_text()), "task": "sst2"}
    with pytest.raises(DataError, match="trained on 'vader_movie' cannot be evaluated on 'sst2'"):
        evaluate_harness(model, tokenizer, [sst2], trained_on="vader_movie")
    assert evaluate_harness(model, tokenizer, [sst2], limit=2, trained_on="copa")["results"]["sst2"]


@needs_harness
def test_masked_models_are_refused():
    from transformers import RobertaConfig, RobertaForMaskedLM

    from zotune.evaluation.harness import evaluate_harness

    small = RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = RobertaForMaskedLM(small)
    model.config.architectures = ["RobertaForMaskedLM"]  # as `from_pretrained` leaves it
    with pytest.raises(ModelError, match=r"masked language model.*without --harness"):
        evaluate_harness(model, None, ["sst2"])


def test_without_the_library_the_extra_is_named_before_a_model_is_loaded(monkeypatch):
    real = importlib.import_module

    def without(name, package=None):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingExtraError, match=r'lm_eval is needed to evaluate .*pip install "zotune\[eval\]"'):
        evaluate_with_harness(None, {"model": "no/such/model"}, "sst2", None, None)


def test_settings_that_the_harness_would_not_look_at_are_refused():
    with pytest.raises(ConfigError, match=r"--train-rows does not go with --harness.*model, precision, device"):
        evaluate_with_harness(None, {"train_rows": 5}, "sst2", None, None)


def test_a_run_folder_stands_for_the_model_in_it(tmp_path):
    (tmp_path / "model").mkdir()
    assert trained_folder(str(tmp_path)) == str(tmp_path)  # no run: some folder with a folder in it
    (tmp_path / "run.json").write_text("{}")
    assert trained_folder(str(tmp_path)) == str(tmp_path / "model")
    assert trained_folder("owner/model") == "owner/model"
