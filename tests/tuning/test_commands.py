"""Every mode through the command line: train, evaluate what was saved, and replay from the base weights and the ledger."""

import json

import pytest
from tests.cli.conftest import arguments, run, tiny  # noqa: F401 - fixtures

from zotune.tuning import MODES


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "full"])
def test_a_run_is_saved_evaluated_and_replayed(run, arguments, tiny, tmp_path, mode, precision):  # noqa: F811
    words = ("--mode", mode, "--precision", precision, "--lr", 1e-2, "--eps", 1e-2)
    assert f"{mode}: " in run("train", *arguments, *words, "--out", tmp_path / "run").output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] != results["before"]["loss"]
    folder = tmp_path / "run" / "model"
    evaluated = run("evaluate", "--model", folder, *arguments[2:6], "--precision", precision).output
    assert f"{results['after']['loss']:.3f}" in evaluated
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert (
        "equal to the trained" in run("replay", "--base", tiny[0], "--ledger", ledger, "--out", tmp_path / "r").output
    )
