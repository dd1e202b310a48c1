"""`zotune train --method forward_grad`: the scorer's loss is differentiable, with one-token and longer options."""

import pytest

from zotune.core.ledger import read_ledger
from zotune.errors import ConfigError


def test_it_trains_and_replays_from_its_ledger(run, arguments, tiny, tmp_path):
    run("train", *arguments, "--method", "forward_grad", "--out", tmp_path / "run")
    ledger = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.header["method"]["name"] == "forward_grad"
    assert len(ledger.entries) == 12
    assert all(len(entry.losses) == 2 for entry in ledger.entries)
    assert len({entry.losses[1] for entry in ledger.entries}) == 12
    rebuilt = ["--base", tiny[0], "--ledger", tmp_path / "run" / "ledger.jsonl", "--out", tmp_path / "rebuilt"]
    assert "equal to the trained" in run("replay", *rebuilt).output


def test_micro_batches_give_the_slope_of_the_batch(run, arguments, tmp_path):
    """Sums in another order at the first step, before anything has moved: 1e-5 of fp32."""
    for micro_batch in (4, 1):
        run(
            "train",
            *arguments,
            "--method",
            "forward_grad",
            "--micro-batch",
            micro_batch,
            "--out",
            tmp_path / str(micro_batch),
        )
    first, second = (read_ledger(tmp_path / name / "ledger.jsonl").entries[0].losses for name in ("4", "1"))
    assert second == pytest.approx(first, rel=1e-5)


def test_unknown_options_are_refused(run, arguments, tmp_path):
    with pytest.raises(ConfigError, match="forward_grad"):
        run("train", *arguments, "--method", "forward_grad", "--method-option", "m=3", "--out", tmp_path / "run")
