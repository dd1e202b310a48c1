"""benchmarks/learned.py on a tiny model: all contestants, a table, and nothing is run twice."""

import importlib
import json
from pathlib import Path

import pytest

from zotune.methods import METHODS
from zotune.methods.adaptive_scales import AdaptiveScales

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(METHODS, "adaptive_scales", AdaptiveScales)
    return importlib.import_module("learned")


def test_learned_runs_and_resumes(benchmark, folders, tmp_path, monkeypatch, capsys):
    model, root = folders
    words = [
        "--model", model, "--data-root", root, "--learn-on", "sst2_empty", "--tasks", "sst2", "--seeds", 0, 1,
        "--lrs", 1e-3, 1e-2, "--forwards", 9, "--batch-size", 4, "--train-rows", 8, "--rows", 6, "--epochs", 1,
        "--epochs-per-restart", 1, "--learn-rows", 8, "--precision", "fp32", "--runs", tmp_path / "runs",
        "--json", tmp_path / "out" / "learned.json",
    ]  # fmt: skip
    words = [str(word) for word in words]
    benchmark.main(words)
    held = json.loads((tmp_path / "out" / "learned.json").read_text())
    final = [e for e in held["entries"] if e["stage"] == "final"]
    names = {e["contestant"] for e in final}
    assert names == set(benchmark.contestants(tmp_path, 4))
    assert len(names) == 8
    assert len(final) == 16
    # 4 steps of 2; of adaptive_scales 3 of 2.5: the second explores
    assert {e["contestant"]: e["forwards"] for e in final} == {**dict.fromkeys(names, 8), "adaptive": 7}
    for name in names:  # each at the better of its two rates, tuned on other rows
        tuned = {e["lr"]: e["loss"] for e in held["entries"] if e["stage"] == "tuning" and e["contestant"] == name}
        assert {e["lr"] for e in final if e["contestant"] == name} == {min(tuned, key=tuned.get)}
    losses = {e["contestant"]: e["loss"] for e in final if e["seed"] == 0}
    assert len(set(losses.values())) == 8, "two contestants did the same"
    table = (tmp_path / "out" / "learned.md").read_text()
    for text in ("prior-corrected", "| published - published-shuffled", "2 runs", "How far the networks moved"):
        assert text in table
    assert (tmp_path / "out" / "learned.png").read_bytes().startswith(b"\x89PNG")

    def again(*arguments):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(benchmark.Arena, "run", again)
    benchmark.main(words)
    assert json.loads((tmp_path / "out" / "learned.json").read_text())["entries"] == held["entries"]
    capsys.readouterr()
    benchmark.main([*words, "--estimate"])
    assert "8 contestants" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings \\(forwards\\)"):
        benchmark.main([*words, "--forwards", "11"])
