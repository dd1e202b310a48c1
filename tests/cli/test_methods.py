"""`zotune train --method X` for every method: full weights and LoRA, bf16, replay from the ledger, resume."""

import json

import pytest
from safetensors.torch import load_file

from zotune.cli.display import EXAMPLES, method_rows
from zotune.methods import METHODS
from zotune.rules import RULES

# ranks and periods that fit a tiny model, so that four steps refresh
SMALL = {
    "lozo": {"interval": 2},
    "subzero": {"rank": 2, "interval": 2},
    "pgap": {"rank": 2, "k": 2, "h": 2},
    "zo_finetuner": EXAMPLES["zo_finetuner"],
}


def words(name):
    return [part for key, value in SMALL.get(name, {}).items() for part in ("--method-option", f"{key}={value}")]


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "grzo"])  # needs a closure of its own
def test_every_method_trains_and_replays(run, arguments, tiny, tmp_path, name, mode):
    """bf16 weights in full tuning; the rebuilt weights are compared by hash inside `zotune replay`."""
    short = ["--method", name, *words(name), "--mode", mode, "--precision", "bf16", "--steps", 3, "--eval-rows", 4]
    printed = run("train", *arguments, *short, "--eps", 1e-2, "--out", tmp_path / "run").output
    assert METHODS[name].paper.split(",")[0] in " ".join(printed.split())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 3
    assert results["refused_steps"] == 0
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )
    file = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    trained, rebuilt = (load_file(folder / file) for folder in (tmp_path / "run" / "model", tmp_path / "r"))
    assert all(bool((trained[key] == rebuilt[key]).all()) for key in trained)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "sgd"])
def test_every_rule_trains_and_replays(run, arguments, tiny, tmp_path, rule):
    short = ["--rule", rule, "--precision", "bf16", "--steps", 3, "--eval-rows", 4, "--eps", 1e-2]
    run("train", *arguments, *short, "--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )


def test_methods_are_listed_with_what_they_cost(run):
    printed = run("methods").output
    assert [row[0] for row in method_rows()] == list(METHODS)
    assert all(name in printed for name in [*METHODS, *RULES])
