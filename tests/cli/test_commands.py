"""The other commands, recipes, and what the command line does not import."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from zotune.errors import ConfigError, DataError, LedgerError
from zotune.kernels.dispatch import choice_for
from zotune.kernels.native import NativeBackend
from zotune.runs.config import TrainConfig, load_config


def imported(code, *modules):
    """Which of the modules a fresh interpreter has loaded after running the code."""
    check = f"{code}\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split("\n")[
        -2
    ]


def test_help_loads_neither_torch_nor_transformers():
    """What makes `zotune --help` answer at once; time itself is not tested."""
    code = "from typer.testing import CliRunner\nfrom zotune.cli.app import app\nCliRunner().invoke(app, ['train', '--help'])"
    assert imported(code, "torch", "transformers", "numpy", "matplotlib") == "[]"


def test_the_core_runs_on_torch_and_numpy_alone():
    code = "import torch, zotune\nw = torch.nn.Parameter(torch.ones(3))\nzotune.ZO([w]).step(lambda: (w ** 2).sum())"
    assert imported(code, "transformers", "datasets", "peft", "matplotlib", "typer", "rich", "yaml") == "[]"


def test_replay_rebuilds_the_weights_bit_for_bit_without_data(run, arguments, tiny, tmp_path):
    run("train", *arguments, "--out", tmp_path / "run")
    printed = run(
        "replay", "--base", tiny[0], "--ledger", tmp_path / "run" / "ledger.jsonl", "--out", tmp_path / "again"
    ).output
    assert "12 steps replayed without data" in printed
    assert "equal to the trained model's" in " ".join(printed.split())
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    rebuilt = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(trained[key], rebuilt[key]) for key in trained)


def test_replay_of_a_changed_ledger_is_refused(run, arguments, tiny, tmp_path):
    run("train", *arguments, "--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"losses": [', '"losses": [1')  # one digit more
    ledger.write_text("".join(lines))
    with pytest.raises(LedgerError, match="rebuilt weights hash"):
        run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_replay_on_another_model_is_refused(run, arguments, tmp_path):
    run("train", *arguments, "--out", tmp_path / "run")
    with pytest.raises(LedgerError, match="not the base model of this ledger"):
        run(
            "replay", "--base", tmp_path / "run" / "model", "--ledger", tmp_path / "run" / "ledger.jsonl",
            "--out", tmp_path / "again",
        )  # fmt: skip


def test_evaluate_shows_the_prior_corrected_baseline(run, tiny):
    printed = run(
        "evaluate", "--model", tiny[0], "--data", tiny[1], "--task", "sst2", "--train-rows", 24, "--eval-rows", 12,
        "--precision", "fp32", "--device", "cpu",
    ).output  # fmt: skip
    assert "as it is" in printed
    assert "prior-corrected" in printed


def test_training_on_a_corpus_and_reporting_on_its_other_half_is_refused(run, arguments, tiny, tmp_path):
    """SST-2 was cut from the demo's corpus: held-out sentences of one are training sentences of the other."""
    run("train", *arguments, "--out", tmp_path / "run")
    with pytest.raises(DataError, match="cannot be evaluated on 'vader_movie'"):
        run("evaluate", "--model", tmp_path / "run" / "model", "--data", tiny[1], "--task", "vader_movie")


def test_methods_lists_paper_forwards_and_memory(run):
    printed = run("methods").output
    assert "mezo" in printed
    assert "2305.17333" in printed


def test_doctor_says_what_is_off_and_why(run, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    printed = " ".join(run("doctor").output.split())
    assert torch.__version__ in printed
    assert 'off: LoRA, prefix and prompt tuning. Install it with pip install "zotune[hf]"' in printed


@pytest.mark.parametrize(
    ("apart", "expected"), [(True, "the matrix of a pair that it will read"), (False, "half of both")]
)
def test_doctor_says_what_two_threads_share(run, monkeypatch, apart, expected):
    backend = choice_for("cpu").backend
    if not isinstance(backend, NativeBackend):
        pytest.skip("the kernels are not compiled here")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr(NativeBackend, "team", lambda self, threads: threads)
    monkeypatch.setattr(NativeBackend, "apart", lambda self: apart)
    monkeypatch.setattr(NativeBackend, "crossing", lambda self: 123.4)
    printed = " ".join(run("doctor").output.split())
    assert expected in printed
    assert "123 ns to read what the other wrote" in printed
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert "two threads" not in run("doctor").output


def test_doctor_knows_whether_the_packaged_model_was_fetched(run, monkeypatch, tmp_path):
    place = tmp_path / "model"
    monkeypatch.setattr("zotune.cli.doctor.packaged_model_place", lambda: place)
    assert "not fetched yet" in " ".join(run("doctor").output.split())
    place.mkdir()
    (place / "config.json").write_text("{}")
    assert "smollm2-135m converted" in " ".join(run("doctor").output.split())


def test_zotune_errors_are_one_message_and_exit_code_2():
    code = "import sys; sys.argv = ['zotune', 'train', '--steps', '0']; from zotune.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("ConfigError: steps must be at least 1, got 0.")
    assert "Traceback" not in result.stderr


def test_a_recipe_is_read_and_overridden(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-5\nsteps: 7\nmethod_options: {n: 2}\n")  # YAML itself reads 1e-5 as text
    config = load_config(recipe, {"steps": 9, "method_options": {"sides": 1}})
    assert (config.lr, config.steps, config.method_options) == (1e-5, 9, {"n": 2, "sides": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "Unknown setting 'learning_rate'"),
        ("stepz: 3", "Did you mean 'steps'"),
        ("steps: many", "steps .* must be of type int, got 'many'"),
        ("steps: 1.5", "must be of type int"),
        ("lr: [1, 2]", "lr .* must be of type float"),
        ("- a list", "settings as `name: value`"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, {})


def test_the_demo_recipe_is_valid():
    from pathlib import Path

    config = load_config(Path(__file__).parents[2] / "recipes" / "demo.yaml", {})
    assert config.task == "vader_movie"
    assert isinstance(config, TrainConfig)
