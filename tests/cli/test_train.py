"""`zotune train`: what it leaves behind, and that no kill loses anything."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from zotune.core.ledger import read_ledger
from zotune.errors import ConfigError, DataError, LedgerError, ModelError

LEFT_BEHIND = {"run.json", "ledger.jsonl", "metrics.jsonl", "results.json", "curves.png", "model"}


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_leaves_weights_ledger_metrics_and_picture(run, arguments, tiny, tmp_path):
    out = tmp_path / "run"
    printed = run("train", *arguments, "--out", out).output
    assert {path.name for path in out.iterdir()} == LEFT_BEHIND  # the snapshot is gone, no temporary file is left
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["forwards"] == 2 * 12
    assert set(results["prior_corrected"]) == {"metric", "accuracy", "standard_error", "interval", "loss"}
    # the honest baseline stands beside before and after wherever people look
    assert all(word in printed for word in ("before", "prior-corrected", "after"))
    assert not same_bits(weights(out), load_file(tiny[0] / "model.safetensors"))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 5, 10, 12]


def test_the_plan_stands_before_the_work(run, arguments, tmp_path):
    printed = " ".join(run("train", *arguments, "--out", tmp_path / "run").output.split())
    assert "2 a step, 24 in all" in printed
    assert printed.index("extra memory") < printed.index("held-out accuracy")


def test_a_finished_run_is_not_run_again(run, arguments, tmp_path):
    out = tmp_path / "run"
    run("train", *arguments, "--out", out)
    before = (out / "ledger.jsonl").read_bytes()
    assert "nothing to do" in run("train", *arguments, "--out", out).output
    assert (out / "ledger.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(run, arguments, tmp_path):
    run("train", *arguments, "--out", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed was 0, now 1"):
        run("train", *arguments, "--seed", 1, "--out", tmp_path / "run")


@pytest.mark.parametrize(("precision", "kills"), [("fp32", (3, 30)), ("bf16", (11,))])
def test_killed_anywhere_the_same_command_ends_with_the_same_bits(run, arguments, tmp_path, precision, kills):
    """Killed with so many lines in the ledger: the bits of weights and ledger equal the uninterrupted run's."""
    words = ["train", *arguments, "--precision", precision, "--steps", "40"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*words, "--out", whole)
    command = [sys.executable, "-m", "zotune", *words, "--out", killed]
    met = []
    for lines in kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger = killed / "ledger.jsonl"
        while process.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        met.append(len(read_ledger(ledger).entries))
    assert met[0] < 40  # at least the first kill met an unfinished run
    run(*words, "--out", killed)
    assert same_bits(weights(whole), weights(killed))
    assert (whole / "ledger.jsonl").read_bytes() == (killed / "ledger.jsonl").read_bytes()


def test_a_torn_ledger_line_costs_one_step_of_work_and_nothing_else(run, arguments, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run("train", *arguments, "--out", whole)
    run("train", *arguments, "--out", torn)
    for name in ("results.json", "model"):  # as if the run had been killed in step 7
        path = torn / name
        path.rename(tmp_path / name)
    lines = (torn / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (torn / "ledger.jsonl").write_bytes(b"".join(lines[:8]) + lines[8][:20])
    run("train", *arguments, "--out", torn)
    assert same_bits(weights(whole), weights(torn))
    assert (whole / "ledger.jsonl").read_bytes() == (torn / "ledger.jsonl").read_bytes()


def test_a_full_disk_at_the_snapshot_is_reported_and_training_goes_on(run, arguments, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zotune.runs.run_folder.write_state", full)
    printed = run("train", *arguments, "--out", tmp_path / "run").output
    assert "no snapshot of step 4" in printed
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").entries) == 12


def test_micro_batches_change_nothing_but_rounding(run, arguments, tmp_path):
    """One forward of 4 against two of 2: losses agree to fp32 rounding of a sum of 4 (1e-5 is 80 ulp of 1)."""
    run("train", *arguments, "--out", tmp_path / "one")
    run("train", *arguments, "--micro-batch", 2, "--out", tmp_path / "two")
    one, two = (read_ledger(tmp_path / name / "ledger.jsonl").entries[0].losses for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)


def test_schedules_reach_the_ledger(run, arguments, tmp_path):
    run("train", *arguments, "--schedule", "linear", "--out", tmp_path / "run")
    entries = read_ledger(tmp_path / "run" / "ledger.jsonl").entries
    assert entries[0].groups[0]["lr"] == 1e-3
    assert entries[6].groups[0]["lr"] == pytest.approx(1e-3 / 2, rel=1e-12)  # half-way; one fp64 rounding


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--model", "/no/such/folder"], ModelError, "no folder"),
        (["--data", "/no/such/data"], ConfigError, "no folder"),
        (["--task", "sst3"], ConfigError, "no task 'sst3'"),
        (["--method", "mezzo"], ConfigError, "Did you mean 'mezo'"),
        (["--method-option", "m=3"], ConfigError, "no option 'm'"),
        (["--method-option", "n=0"], ConfigError, "n must be at least 1"),
        (["--precision", "fp8"], ConfigError, "precision must be one of"),
        (["--lr", "-1"], ConfigError, "lr must be at least 0"),
        (["--eps", "0"], ConfigError, "eps must be positive"),
        (["--device", "cuda:99"], ConfigError, "cannot be used here"),
        (["--batch-size", "0", "--steps", "0"], ConfigError, "steps must be at least 1, got 0; batch_size must be"),
    ],
)
def test_bad_settings_are_refused_before_any_step(run, arguments, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run("train", *arguments, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_a_label_that_the_task_does_not_know_is_refused(run, arguments, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"sentence": "fine", "label": 7}\n')
    with pytest.raises(DataError, match="label 7; allowed are 0, 1"):
        run("train", *arguments, "--data", folder, "--out", tmp_path / "run")


def test_a_run_that_was_refused_keeps_no_folder_from_the_next(run, arguments, tmp_path):
    """What was found wrong is put right in the same folder: nothing was done there yet."""
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="n must be a whole number"):
        run("train", *arguments, "--method-option", "n=1.5", "--out", out)
    assert not out.exists()
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"seed": 5}))  # killed before the first evaluation was written
    run("train", *arguments, "--out", out)
    assert {path.name for path in out.iterdir()} == LEFT_BEHIND
    assert json.loads((out / "run.json").read_text())["seed"] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind there")
def test_two_processes_do_not_share_a_folder(run, arguments, tmp_path):
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="Another process is at work in"):
        run("train", *arguments, "--out", out)
    assert list(out.iterdir()) == []
    os.close(held)
    run("train", *arguments, "--out", out)


def test_a_file_is_no_folder(run, arguments, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        run("train", *arguments, "--out", tmp_path / "run")


@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_damaged_files_are_named(run, arguments, tmp_path, name):
    out = tmp_path / "run"
    run("train", *arguments, "--out", out)
    (out / name).write_text("{")
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        run("train", *arguments, "--out", out)


def test_a_folder_that_cannot_be_made(run, arguments, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        run("train", *arguments, "--out", tmp_path / "file" / "run")


def test_an_option_that_no_training_row_has_costs_the_baseline_and_not_the_run(run, arguments, tiny, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = (tiny[1] / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(row for row in rows if json.loads(row)["label"] == 0))
    (data / "validation.jsonl").write_text((tiny[1] / "validation.jsonl").read_text())
    words = [str(data) if word == str(tiny[1]) else word for word in arguments]
    printed = " ".join(run("train", *words, "--out", tmp_path / "run").output.split())
    assert "no prior-corrected baseline: no training row has option 1" in printed
    assert json.loads((tmp_path / "run" / "results.json").read_text())["prior_corrected"] is None


def test_a_folder_is_no_recipe(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"is a folder, and a recipe is a YAML file.*--model; that of a run is .*model"
    ):
        run("evaluate", tmp_path)


def test_a_folder_that_is_no_run_is_left_alone(run, arguments, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(ConfigError, match="not empty"):
        run("train", *arguments, "--out", tmp_path)


def test_another_base_model_in_the_run_folder_is_noticed(run, arguments, tiny, tmp_path):
    """The settings name the same folder, but its weights have changed since: the ledger knows."""
    from shutil import copytree

    model = tmp_path / "model"
    copytree(tiny[0], model)
    words = [str(model) if word == str(tiny[0]) else word for word in arguments]
    run("train", *words, "--out", tmp_path / "run")
    for name in ("results.json", "model"):
        (tmp_path / "run" / name).rename(tmp_path / f"old {name}")
    from safetensors.torch import save_file

    changed = {key: value + 1e-3 for key, value in load_file(model / "model.safetensors").items()}
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LedgerError, match="its base is"):
        run("train", *words, "--out", tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


def lora(arguments, **changed):
    options = {"mode": "lora", "lr": 1e-2, "eps": 1e-2, **changed}
    return [*arguments, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def adapter(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


def test_lora_trains_adapters_alone_and_saves_the_standard_folder(run, arguments, tmp_path):
    printed = run("train", *lora(arguments), "--out", tmp_path / "run").output
    assert "lora: " in printed
    saved = adapter(tmp_path / "run")
    assert all("lora_" in name for name in saved)
    assert any(float(t.abs().max()) > 0 for name, t in saved.items() if "lora_B" in name)  # B starts at zero
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    evaluated = run("evaluate", "--model", tmp_path / "run" / "model", *arguments[2:6], "--precision", "fp32").output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{results['after']['accuracy']:.3f}" in evaluated
    assert f"{results['after']['loss']:.3f}" in evaluated


def test_lora_replays_and_starts_from_its_seed(run, arguments, tiny, tmp_path):
    for name in ("run", "again"):
        torch.manual_seed(len(name))  # the adapters' start must not come from here
        run("train", *lora(arguments), "--precision", "bf16", "--out", tmp_path / name)
    assert same_bits(adapter(tmp_path / "run"), adapter(tmp_path / "again"))
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )
    assert same_bits(load_file(tmp_path / "r" / "adapter_model.safetensors"), adapter(tmp_path / "run"))


def test_lora_refuses_another_base_model(run, arguments, tmp_path):
    run("train", *lora(arguments), "--out", tmp_path / "run")
    run("train", *arguments, "--out", tmp_path / "full")  # other frozen weights, the same shapes
    with pytest.raises(LedgerError, match="not the base model"):
        run("replay", "--base", tmp_path / "full" / "model", "--ledger", tmp_path / "run" / "ledger.jsonl", "--out",
            tmp_path / "r")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "lorra"], "Did you mean 'lora'"),
        (["--mode", "lora", "--mode-option", "rank=0"], "rank must be at least 1"),
        (["--mode", "lora", "--mode-option", "rnk=4"], "Did you mean 'rank'"),
        (["--mode", "lora", "--mode-option", "targets=nothing"], "LoRA cannot be attached"),
    ],
)
def test_bad_modes_are_refused(run, arguments, tmp_path, options, said):
    with pytest.raises((ConfigError, ModelError), match=said):
        run("train", *arguments, *options, "--out", tmp_path / "run")
