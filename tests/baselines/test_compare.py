"""The table and the sentence below it, on numbers made up to force each answer; and the meter."""

import io

import pytest
import torch
from rich.console import Console

from zotune.baselines import Row, comparison_markdown, comparison_table, measure, meter, verdict
from zotune.errors import DataError
from zotune.evaluation.evaluate import Evaluation

MIB = 2**20
ZERO = Row("zero-shot", 0.51, 0.029, 1.12)
PRIOR = Row("prior-corrected", 0.74, 0.025, 0.55)
MEZO = Row("MeZO", 0.70, 0.026, 0.58, 800, 480.0, 40 * MIB)
LORA = Row("LoRA with backprop", 0.87, 0.019, 0.33, 452, 300.0, 700 * MIB)
ADAM = Row("AdamW", 0.88, 0.019, 0.31, 600, 400.0, 2500 * MIB)


def test_use_lora_with_backprop_can_come_out():
    said = verdict([ZERO, PRIOR, MEZO, LORA, ADAM])
    assert said == (
        "Use LoRA with backprop here: accuracy 0.870 ± 0.019 after 452 forward-equivalents, within two standard errors of "
        "the best (AdamW, 0.880 ± 0.019, 600 forward-equivalents); if its 700 MiB do not fit beside the model, MeZO reaches "
        "(0.700 ± 0.026) in 40 MiB after 800 forward-equivalents."
    )


def test_use_nothing_can_come_out():
    said = verdict([ZERO, PRIOR, MEZO])
    assert said.startswith("Use prior-corrected here: accuracy 0.740 ± 0.025 after no training, the best")


def test_use_zeroth_order_can_come_out():
    better = Row("MeZO", 0.88, 0.019, 0.3, 400, 100.0, 40 * MIB)
    said = verdict([ZERO, PRIOR, better, LORA])
    assert said.startswith("Use MeZO here: accuracy 0.880 ± 0.019 after 400 forward-equivalents, the best")
    assert "if its" not in said
    alone = verdict([ZERO, Row("MeZO", 0.88, 0.019, 0.3, 400)])
    assert alone.endswith("clearly the best.")


def test_as_good_in_less_memory_is_named():
    slow = Row("MeZO", 0.86, 0.02, 0.35, 8000, 4000.0, 40 * MIB)
    said = verdict([ZERO, slow, LORA])
    assert said.startswith("Use LoRA with backprop here")
    assert "700 MiB do not fit beside the model, MeZO is as good (0.860 ± 0.020) in 40 MiB after 8,000" in said


def test_pairs_see_differences_that_separate_errors_hide():
    """300 examples, the same but for 12 that one row gets right: 4 points, 1.0 standard errors apart, 3.5 paired."""
    labels = torch.zeros(300, dtype=torch.int64)
    scores = torch.tensor([[1.0, 0.0]]).repeat(300, 1)
    scores[200:] = torch.tensor([0.0, 1.0])
    worse = Evaluation.of(scores.clone(), labels)
    scores[200:212] = torch.tensor([1.0, 0.0])
    better = Evaluation.of(scores, labels)
    rows = [Row.of("cheap", worse, forwards=10), Row.of("dear", better, forwards=100)]
    assert verdict(rows).startswith("Use dear here")
    unpaired = [Row(r.what, r.accuracy, r.standard_error, r.loss, r.forwards) for r in rows]
    assert verdict(unpaired).startswith("Use cheap here")


def test_table_and_markdown_hold_every_number():
    rows = [ZERO, MEZO, LORA, Row("large", 0.9, 0.01, 0.2, 12345.6, 9.87, 3 * 2**30)]
    text = comparison_markdown(rows)
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 7
    assert lines[2] == "| zero-shot | 0.510 ± 0.029 | 1.120 | 0 | - | - |"
    assert lines[5] == "| large | 0.900 ± 0.010 | 0.200 | 12,346 | 9.9 | 3.0 GiB |"
    assert lines[-1] == verdict(rows)
    out = io.StringIO()
    Console(file=out, width=200).print(comparison_table(rows))
    assert all(part in out.getvalue() for part in ("zero-shot", "700 MiB", "12,346", "Use "))


def test_refusals():
    with pytest.raises(DataError, match="no rows"):
        verdict([])
    some = Evaluation.of(torch.eye(2), torch.tensor([0, 1]))
    more = Evaluation.of(torch.eye(3), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="different numbers"):
        verdict([Row.of("a", some), Row.of("b", more)])


@pytest.mark.skipif(not meter.STATUS.is_file(), reason="resident memory is read from /proc")
def test_the_meter_sees_a_short_peak_each_time():
    for _ in range(2):  # the second peak is no higher than the first, and is seen all the same
        with measure() as usage:
            torch.ones(64 * MIB // 4)
        # pages are counted in full, Python and torch may take or return a few MiB meanwhile
        assert 60 * MIB < usage.memory < 90 * MIB
        assert usage.seconds > 0
    with measure() as usage:
        pass
    assert usage.memory < 10 * MIB
    assert "high-water mark" in usage.how


def test_the_meter_where_the_mark_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(meter, "RESET", tmp_path / "none" / "clear_refs")
    marks = iter([100, 350, 500, 500])
    monkeypatch.setattr(meter, "_high_water", lambda: next(marks))
    with measure() as usage:
        pass
    assert (usage.memory, usage.how) == (250, "resident, above the highest mark before the block")
    with measure() as usage:
        pass
    assert usage.memory is None
    assert "not known" in usage.how


def test_the_meter_passes_errors_on():
    with pytest.raises(KeyError), measure() as usage:
        raise KeyError
    assert usage.how
