"""`zotune train --fold-every`: moves that wait are in the weights wherever a run leaves or measures them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from zotune.core.ledger import read_ledger
from zotune.errors import ConfigError
from zotune.runs import job
from zotune.runs.config import load_config
from zotune.runs.job import Listener
from zotune.runs.run_folder import RunFolder
from zotune.runs.training import train

FOLDED = {"method": "lozo", "method_options": {"rank": 2, "interval": 8}, "fold_every": 3, "lr": 1e-3}


def config(tiny, out, **changes):
    model, data = tiny
    settings = {
        "model": str(model), "data": str(data), "task": "sst2", "steps": 10, "batch_size": 4, "eps": 1e-3, "train_rows": 24,
        "eval_rows": 12, "eval_every": 4, "snapshot_every": 4, "precision": "fp32", "device": "cpu", "out": str(out),
    }  # fmt: skip
    return load_config(None, {**settings, **FOLDED, **changes})


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


class Stops(Listener):
    """Kills a run after a step."""

    def __init__(self, step):
        self.last = step

    def step(self, step, loss, forwards):
        if step == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_and_replayed_to_the_same_bits(run, tiny, tmp_path, precision):
    """Killed with moves pending (after 5 steps, and after the last one, which is not a multiple of 3)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config(tiny, whole, precision=precision))
    for stop in (5, 10):
        with pytest.raises(KeyboardInterrupt):
            train(config(tiny, killed, precision=precision), Stops(stop))
    train(config(tiny, killed, precision=precision))
    assert same_bits(weights(whole), weights(killed))
    assert metrics(whole) == metrics(killed)
    ledgers = [read_ledger(folder / "ledger.jsonl") for folder in (whole, killed)]
    assert ledgers[0].entries == ledgers[1].entries
    assert ledgers[0].weights == ledgers[1].weights is not None, "resumed with no step left, it says its end too"
    assert ledgers[0].header["rule"] == {"name": "sgd", "fold_every": 3}
    printed = run("replay", "--base", tiny[0], "--ledger", whole / "ledger.jsonl", "--out", tmp_path / "again").output
    assert "equal to the trained model's" in " ".join(printed.split())


def test_held_out_numbers_are_those_of_the_folded_weights(tiny, tmp_path):
    """The run that folds at once has the same ones to rounding: slopes from fp32 losses at eps 1e-3 are good to 1e-4."""
    folders = [tmp_path / "at once", tmp_path / "rarely"]
    for folder, every in zip(folders, (0, 100), strict=True):
        train(config(tiny, folder, fold_every=every))
    ours, theirs = (metrics(folder) for folder in folders)
    assert [line["step"] for line in ours] == [0, 4, 8, 10]
    assert len({line["loss"] for line in ours}) == 4, "nothing moved, so nothing was compared"
    for one, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_moves_wait_for_the_next_query_and_nobody_can_tell(run, tiny, tmp_path, precision, monkeypatch):
    """Killed with moves that are late: weights, metrics, ledger and replay are those of a run that writes at once."""
    dense = {"method": "mezo", "method_options": {}, "fold_every": 0, "precision": precision}
    whole, killed, late = tmp_path / "whole", tmp_path / "killed", []
    monkeypatch.setattr(job, "LATE", 0)
    train(config(tiny, whole, **dense))
    monkeypatch.setattr(job, "LATE", 50)
    save = RunFolder.save_snapshot

    def watched(folder, opt):
        late.append(any(slot.late for slot in opt.weights))
        save(folder, opt)

    monkeypatch.setattr(RunFolder, "save_snapshot", watched)
    for stop in (5, 7):
        with pytest.raises(KeyboardInterrupt):
            train(config(tiny, killed, **dense, eval_every=5), Stops(stop))
    train(config(tiny, killed, **dense, eval_every=5))
    assert late[0], "nothing waited in the first snapshot, so nothing was tested"
    assert same_bits(weights(whole), weights(killed))
    assert metrics(whole)[-1]["loss"] == metrics(killed)[-1]["loss"]
    ledgers = [read_ledger(folder / "ledger.jsonl") for folder in (whole, killed)]
    assert ledgers[0].entries == ledgers[1].entries
    assert ledgers[0].header["rule"] == ledgers[1].header["rule"] == "sgd"
    printed = run("replay", "--base", tiny[0], "--ledger", killed / "ledger.jsonl", "--out", tmp_path / "again").output
    assert "equal to the trained model's" in " ".join(printed.split())


@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"rule": "adam"}, {"method": "forward_grad"}], ids=str)
def test_what_cannot_wait_does_not(tiny, tmp_path, changes):
    dense = {"method": "mezo", "method_options": {}, "fold_every": 0, "steps": 3}
    train(config(tiny, tmp_path / "run", **{**dense, **changes}))
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").entries) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "adam"}, "rule 'adam' are not multiples"),
        ({"weight_decay": 0.1}, "set weight_decay to 0"),
        ({"fold_every": -1}, "fold_every must be at least 0"),
    ],
)
def test_what_cannot_wait_is_refused_before_the_model_is_loaded(tiny, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tiny, tmp_path / "run", model="/there/is/no/model", **changes))


def test_the_option_is_on_the_command_line(run, arguments, tmp_path):
    words = ["--method", "subzero", "--method-option", "rank=2", "--fold-every", "5", "--steps", "3"]
    printed = run("train", *arguments, *words, "--out", tmp_path / "run").output
    assert "folded into the weights every 5 steps" in " ".join(printed.split())
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").header["rule"]["fold_every"] == 5


def test_the_plan_speaks_of_matrices_only_where_they_wait(run, arguments, tmp_path):
    printed = run("train", *arguments, "--method", "mezo", "--steps", "2", "--out", tmp_path / "run").output
    assert "folded into the weights" not in " ".join(printed.split())
