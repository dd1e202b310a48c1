"""Wrong input, changed data, half-written folders: a sentence before any work, and nothing lost or mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from zotune.errors import ConfigError, DataError, LedgerError
from zotune.runs.run_folder import RunFolder, read_json, trained_on, write_json


def swapped(words, **changed):
    made = [str(word) for word in words]
    for key, value in changed.items():
        made[made.index(f"--{key}") + 1] = str(value)
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        (b"\xff\xfe\x00a", [], "is not valid YAML"),
        (b"method_options: 3", ["--method-option", "n=2"], "method_options.*must be of type dict"),
        (b"steps: .inf", [], "steps.*must be of type int"),
        (b"steps: 3", ["--method-option", "n=["], "--method-option takes name=value"),
        (b"steps: 3", ["--data-seed", "-1"], "data_seed must be from 0"),
        (b"steps: 3", ["--data-seed", str(2**32)], "data_seed must be from 0"),
        (b"steps: 3", ["--device", "meta"], "holds no numbers"),
        (b"steps: 3", ["--model", "no/such", "--noise", "pink"], "noise must be one of"),
        (b"steps: 3", ["--model", "no/such", "--engine", "steam"], "Unknown engine 'steam'"),
        (b"steps: 3", ["--model", "no/such", "--low-precision", "round"], "Unknown low_precision 'round'"),
        (b"method: lozo", ["--model", "no/such", "--rule", "momentum_replayed"], "Use rule 'momentum'"),
    ],
)
def test_what_cannot_be_read_or_used_is_said(run, tiny, tmp_path, recipe, words, message):
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    with pytest.raises(ConfigError, match=message):
        run("train", tmp_path / "recipe.yaml", "--model", tiny[0], "--data", tiny[1], "--task", "sst2", *words)


def test_contestants_share_settings_that_are_read_before_a_model(run, tiny, tmp_path):
    with pytest.raises(ConfigError, match="noise must be one of"):
        run("compare", "--model", "no/such", "--noise", "pink", "--out", tmp_path / "out")


def test_calibration_is_not_for_the_harness(run):
    with pytest.raises(ConfigError, match="--calibrate does not go with --harness"):
        run("evaluate", "--harness", "sst2", "--calibrate")


def test_options_left_empty_in_a_recipe_are_none(run, arguments, tmp_path):
    (tmp_path / "recipe.yaml").write_text("method_options:\nsteps: 2\n")
    run(
        "train",
        tmp_path / "recipe.yaml",
        *swapped(arguments, steps=2),
        "--method-option",
        "n=2",
        "--out",
        tmp_path / "run",
    )
    assert read_json(tmp_path / "run" / "run.json")["method_options"] == {"n": 2}


def test_learn_reads_options_in_the_same_way(run):
    with pytest.raises(ConfigError, match="--mode-option takes name=value"):
        run("learn", "--mode-option", "r=[")
    with pytest.raises(ConfigError, match="positive, or none"):
        run("learn", "--clip", "inf")


# ----------------------------------------------------------------------------------------------------------------------
# evaluate


def test_evaluate_says_which_settings_change_nothing(run, arguments, tiny, tmp_path):
    told = run("evaluate", *arguments, "--out", tmp_path / "out")
    assert "evaluate takes no notice of --out, --steps, --lr, --eps" in " ".join(told.output.split())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--limit goes with --harness"):
        run("evaluate", *arguments, "--limit", 3)


def test_evaluate_takes_a_run_folder(run, arguments, tmp_path):
    run("train", *swapped(arguments, steps=2), "--out", tmp_path / "run")
    inside = run("evaluate", *swapped(arguments, model=tmp_path / "run" / "model")).output
    whole = run("evaluate", *swapped(arguments, model=tmp_path / "run")).output
    assert "as it is" in whole
    assert whole.split("as it is")[1] == inside.split("as it is")[1]


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", '{"task": 3}', '{"task": "gone"}', "xx", '{"task": "evil.py"}'])
def test_somebody_elses_run_json_beside_a_model_is_no_matter(run, arguments, tiny, tmp_path, text):
    shutil.copytree(tiny[0], tmp_path / "here" / "model")
    (tmp_path / "here" / "run.json").write_text(text)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    assert "as it is" in run("evaluate", *swapped(arguments, model=tmp_path / "here" / "model")).output


def test_a_run_folder_names_its_task(run, arguments, tmp_path):
    run("train", *swapped(arguments, steps=2), "--out", tmp_path / "run")
    assert trained_on(str(tmp_path / "run" / "model")) == "sst2"


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(("command", "name"), [("train", ".run.json.tmp"), ("compare", ".comparison.json.tmp")])
def test_a_folder_of_a_first_write_that_was_cut_short_is_free(run, arguments, tmp_path, command, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{")
    more = ["--with", "zero-shot"] if command == "compare" else []
    run(command, *swapped(arguments, steps=2), "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out" / name).exists()


def begun(run, words, out, monkeypatch, after=6):
    """A run that was killed after so many steps."""

    class Killed(Exception):
        pass

    def killed(self, step, loss, forwards):
        if step == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("zotune.cli.display.Display.step", killed)
        with pytest.raises(Killed):
            run("train", *words, "--out", out)


def test_rows_that_changed_under_a_run_are_refused(run, arguments, tiny, tmp_path, monkeypatch):
    """Else its first evaluation and its last are of different data, and the difference is no gain."""
    data = shutil.copytree(tiny[1], tmp_path / "rows")
    words = swapped(arguments, data=data)
    begun(run, words, tmp_path / "run", monkeypatch)
    path = data / "validation.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    path.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    with pytest.raises(DataError, match="on other rows"):
        run("train", *words, "--out", tmp_path / "run")
    path.write_text(before)
    run("train", *words, "--out", tmp_path / "run")
    assert read_json(tmp_path / "run" / "results.json")["steps"] == 12


def test_a_folder_from_before_rows_were_noted_goes_on(run, arguments, tmp_path, monkeypatch):
    begun(run, arguments, tmp_path / "run", monkeypatch)
    settings = read_json(tmp_path / "run" / "run.json")
    assert settings.pop("rows")
    write_json(tmp_path / "run" / "run.json", settings)
    run("train", *arguments, "--out", tmp_path / "run")


@pytest.mark.parametrize("line", ["garbage", "{}", "[]"])
def test_damaged_metrics_are_named(run, arguments, tmp_path, monkeypatch, line):
    begun(run, arguments, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged"):
        run("train", *arguments, "--out", tmp_path / "run")


def test_a_ledger_that_lost_steps_says_what_to_do(run, arguments, tmp_path, monkeypatch):
    begun(run, arguments, tmp_path / "run", monkeypatch)
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(DataError, match="Remove the snapshot"):
        run("train", *arguments, "--out", tmp_path / "run")
    (tmp_path / "run" / "snapshot.safetensors").unlink()
    run("train", *arguments, "--out", tmp_path / "run")


def test_networks_that_are_missing_leave_the_folder_free(run, arguments, tmp_path):
    words = [*swapped(arguments, steps=2), "--method", "zo_finetuner", "--out", tmp_path / "run"]
    with pytest.raises(ConfigError, match="needs trained networks"):
        run("train", *words)
    run("train", *words, "--method-option", "networks=untrained")


def test_numbers_that_are_not_finite_are_written_as_json(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "all": [1.5, float("inf")], "name": "x"})

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    again = read_json(tmp_path / "a.json")
    assert again["loss"] != again["loss"]
    assert again["all"] == [1.5, float("inf")]
    folder = RunFolder(tmp_path)
    folder.write_metrics([{"step": 0, "loss": float("nan")}])
    json.loads(folder.metrics.read_text(), parse_constant=refuse)
    assert folder.read_metrics()[0]["loss"] != 0


def test_a_broken_model_is_not_shown_as_a_success(run, arguments, tmp_path):
    words = swapped(arguments, lr="1e300", steps=4)
    with pytest.warns(UserWarning, match="was refused"):
        printed = " ".join(run("train", *words, "--out", tmp_path / "run").output.split())
    assert "of 4 steps were refused" in printed
    assert "its accuracy means nothing" in printed


# ----------------------------------------------------------------------------------------------------------------------
# The process


def test_ctrl_c_says_that_the_run_goes_on_and_a_missing_disk_is_a_sentence():
    script = (
        "import sys, zotune.cli, zotune.cli.app as app\n"
        "def fail(*args, **kwargs): raise {}\n"
        "app.app = app.typer.Typer()\n"
        "app.app.command(name='train')(lambda: fail())\n"
        "app.app.command(name='other')(lambda: None)\n"
        "sys.argv = ['zotune', 'train']\n"
        "zotune.cli.main()"
    )
    for error, code, told in (
        ("KeyboardInterrupt", 130, "interrupted. The same command goes on where this one stopped."),
        ("OSError(28, 'No space left on device', 'x')", 1, "No space left on device: 'x'. The same command goes on"),
    ):
        done = subprocess.run([sys.executable, "-c", script.format(error)], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="the system has no such signal")
def test_a_termination_unwinds_so_that_the_terminal_is_given_back():
    script = (
        "import os, signal, sys, zotune.cli, zotune.cli.app as app\n"
        "app.app = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "try: zotune.cli.main()\n"
        "finally: print('unwound')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "unwound\n")


def test_a_terminal_without_a_character_still_gets_the_rest():
    script = (
        "import zotune.cli, zotune.cli.app as app\n"
        "from zotune.cli.console import console\n"
        "app.app = lambda: console.print('0.800 ± 0.010')\n"
        "zotune.cli.main()"
    )
    asked = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=asked)
    assert (done.returncode, done.stdout) == (0, "0.800 ? 0.010\n")


@pytest.mark.parametrize("base", ["5", '{"dtype": "float99"}', '{"mode": 3}'])
def test_a_ledger_of_another_shape_is_named_by_replay(run, arguments, tiny, tmp_path, base):
    run("train", *swapped(arguments, steps=2), "--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    header, *lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([json.dumps({**json.loads(header), "base": json.loads(base)}), *lines]) + "\n")
    with pytest.raises(LedgerError, match="header"):
        run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "rebuilt")


def test_a_replay_says_at_once_that_it_cannot_write(run, arguments, tiny, tmp_path):
    run("train", *swapped(arguments, steps=2), "--out", tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        run(
            "replay", "--base", tiny[0], "--ledger", tmp_path / "run" / "ledger.jsonl", "--out", tmp_path / "file" / "x"
        )


def test_adapters_name_their_base_model_by_its_whole_path(run, arguments, tiny, tmp_path, monkeypatch):
    """Else they would be asked of the hub when they are read from another folder."""
    monkeypatch.chdir(tiny[0].parent)
    run("train", *swapped(arguments, steps=2, model=tiny[0].name), "--mode", "lora", "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "as it is" in run("evaluate", *swapped(arguments, model=tmp_path / "run" / "model")).output
