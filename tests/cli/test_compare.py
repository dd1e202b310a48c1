"""`zotune compare`: every contestant on the same ground, resumed after a kill, refused before work."""

import json
import shutil

import pytest
import torch

from zotune.core.ledger import read_ledger
from zotune.errors import ConfigError, DataError, ParameterError
from zotune.tasks.rows import SPLITS

EVERY = "zero-shot,prior-corrected,in-context,probe,mezo,es,adamw,adamw-lora,mezo:lora@1e-2"
COPA = {
    "premise": "The man fell.", "choice1": "He slipped on ice.", "choice2": "He slept well.", "question": "cause", "label": 0,
}  # fmt: skip
SQUAD = {
    "title": "t", "context": "Anna lives in Rome.", "question": "Where does Anna live?", "answers": {"text": ["Rome"]},
}  # fmt: skip


@pytest.fixture
def compare(run, tiny, tmp_path):
    """Run a comparison into a folder; options are given as in Python."""

    def invoke(out="compared", **changed):
        options = {
            "model": tiny[0], "data": tiny[1], "task": "sst2", "batch_size": 4, "lr": 1e-3, "train_rows": 20,
            "eval_rows": 12, "precision": "fp32", "device": "cpu", "with": EVERY, "forwards": 20, "demonstrations": 2,
            "out": tmp_path / out, **changed,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        return run("compare", *words).output

    return invoke


def entries_of(folder):
    return {entry["what"]: entry for entry in json.loads((folder / "comparison.json").read_text())["contestants"]}


def without_costs(entries):
    """What does not depend on how busy the machine is."""
    return {
        what: {key: value for key, value in entry.items() if key not in ("seconds", "memory")}
        for what, entry in entries.items()
    }


def folder_of(tmp_path, row, count=8):
    data = tmp_path / "data"
    data.mkdir()
    for split in SPLITS:
        (data / f"{split}.jsonl").write_text("".join(json.dumps({**row, "idx": i}) + "\n" for i in range(count)))
    return data


def test_every_contestant_runs_on_one_ground(compare, tmp_path):
    printed = compare()
    out = tmp_path / "compared"
    entries = entries_of(out)
    trained = ["mezo (lr 0.001)", "es (lr 0.001)", "adamw (lr 1e-05)", "adamw-lora (lr 0.0002)", "mezo:lora (lr 0.01)"]
    assert list(entries) == ["zero-shot", "prior-corrected", "in-context", "probe", *trained]
    assert not any("failed" in entry for entry in entries.values())
    assert entries["in-context"]["demonstrations"] == 2
    # 20 forwards: 10 steps of two queries, 4 of five; AdamW's step is worth 4 with all weights, 3 and a bit with few
    steps = {what: entries[what]["steps"] for what in trained}
    assert list(steps.values()) == [10, 4, 5, 6, 10]
    for what in ("mezo (lr 0.001)", "es (lr 0.001)", "adamw (lr 1e-05)", "mezo:lora (lr 0.01)"):
        assert entries[what]["forwards"] == pytest.approx(20, abs=1e-9)  # 5 * 4.0 in fp64
    assert 17 < entries["adamw-lora (lr 0.0002)"]["forwards"] <= 20
    assert entries["probe"]["forwards"] == entries["prior-corrected"]["forwards"] == 5  # 20 rows in batches of 4
    for what in trained:
        assert entries[what]["seconds"] > 0
        assert entries[what]["memory"] is not None
        assert len(entries[what]["correct"]) == 12
    text = " ".join(printed.split())
    assert "Use " in text
    assert " here: " in text
    assert "Use " in (out / "comparison.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    ledger = read_ledger(out / "mezo-full-0.001" / "ledger.jsonl")
    assert len(ledger.entries) == 10


def test_each_starts_from_the_same_bits(compare, tmp_path):
    """Whoever ran before: the numbers of a contestant are those that it has alone."""
    compare("all", **{"with": "adamw,mezo:lora@1e-2,mezo,zero-shot"})
    together = entries_of(tmp_path / "all")
    for number, name in enumerate(("mezo", "zero-shot", "adamw")):
        compare(f"alone{number}", **{"with": name})
        alone = entries_of(tmp_path / f"alone{number}")
        assert without_costs(alone).items() <= without_costs(together).items()


def test_mezo_is_the_run_that_train_makes(compare, run, tiny, tmp_path):
    compare(**{"with": "mezo"})
    words = {
        "model": tiny[0], "data": tiny[1], "task": "sst2", "batch-size": 4, "lr": 1e-3, "train-rows": 20, "eval-rows": 12,
        "precision": "fp32", "device": "cpu", "steps": 10, "out": tmp_path / "run",
    }  # fmt: skip
    run("train", *[word for key, value in words.items() for word in (f"--{key}", value)])
    after = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    entry = entries_of(tmp_path / "compared")["mezo (lr 0.001)"]
    assert {key: entry[key] for key in after} == after
    one, other = (read_ledger(tmp_path / where / "ledger.jsonl") for where in ("run", "compared/mezo-full-0.001"))
    assert [entry.losses for entry in one.entries] == [entry.losses for entry in other.entries]
    assert one.header["base"] == other.header["base"]


def test_a_killed_comparison_goes_on_with_the_next_contestant(compare, tmp_path):
    compare(**{"with": "zero-shot,mezo,es"})
    path = tmp_path / "compared" / "comparison.json"
    whole = json.loads(path.read_text())
    whole["contestants"][0]["loss"] = 7.0  # a mark that a second run would wipe out
    killed = {**whole, "contestants": whole["contestants"][:1]}  # in the midst of mezo, which has left a ledger
    path.write_text(json.dumps(killed))
    printed = compare(**{"with": "zero-shot,mezo,es"})
    again = {entry["what"]: entry for entry in whole["contestants"]}
    assert without_costs(entries_of(path.parent)) == without_costs(again)
    assert "zero-shot: held-out" not in printed
    before = path.read_bytes()
    assert "loading" not in compare(**{"with": "zero-shot,mezo,es"})  # all there: nothing is loaded
    assert path.read_bytes() == before
    compare(**{"with": "probe,zero-shot"})  # others may be added
    assert list(entries_of(path.parent)) == [*again, "probe"]


def test_the_usual_contestants_fit_the_task(run, tiny, tmp_path):
    words = {"model": tiny[0], "data": folder_of(tmp_path, COPA), "task": "copa", "batch-size": 4, "forwards": 8}
    words |= {"precision": "fp32", "device": "cpu", "out": tmp_path / "out"}
    run("compare", *[word for key, value in words.items() for word in (f"--{key}", value)])
    names = [entry["name"] for entry in entries_of(tmp_path / "out").values()]
    assert names == ["zero-shot", "in-context", "mezo", "es", "adamw", "adamw-lora"]


def test_generation_tasks_report_f1(compare, tmp_path):
    data = folder_of(tmp_path, SQUAD, 4)
    compare(task="squad", data=data, **{"with": "zero-shot,mezo,adamw"}, forwards=4)
    assert "f1 (1 standard error)" in (tmp_path / "compared" / "comparison.md").read_text()
    assert all("f1" in entry for entry in entries_of(tmp_path / "compared").values())


def test_a_contestant_that_breaks_off_does_not_end_the_others(compare, tmp_path):
    printed = compare(**{"with": "mezo@1e60,zero-shot"}, forwards=60)
    entries = entries_of(tmp_path / "compared")
    assert "lower" in entries["mezo (lr 1e+60)"]["failed"].lower()
    assert "Nothing was run to compare it with" in " ".join(printed.split())
    assert "broke off" in (tmp_path / "compared" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"with": "mezzo"}, ConfigError, "Did you mean 'mezo'"),
        ({"with": "zero-shot@1e-3"}, ConfigError, "trains nothing"),
        ({"with": "mezo@fast"}, ConfigError, "after @ stands the learning rate"),
        ({"with": "mezo@-1"}, ConfigError, "after @ stands the learning rate"),
        ({"with": "mezo:lorra"}, ConfigError, "Did you mean 'lora'"),
        ({"with": "adamw-lora:head"}, ConfigError, "write adamw:head"),
        ({"with": "mezo,mezo@1e-3"}, ConfigError, "named twice"),
        ({"with": ","}, ConfigError, "no contestants"),
        ({"forwards": -5}, ConfigError, "forwards must be at least 1"),
        ({"forwards": "nan"}, ConfigError, "forwards must be at least 1"),
        ({"forwards": "inf"}, ConfigError, "forwards must be at least 1"),
        ({"forwards": 3, "with": "zero-shot,adamw"}, ConfigError, "spends 4 forwards a step, and the budget is 3"),
        ({"forwards": 4, "with": "zero-shot,es"}, ConfigError, "spends 5 forwards a step"),
        ({"demonstrations": 0}, ConfigError, "demonstrations must be at least 1"),
        ({"demonstrations": 21}, DataError, "20 training rows to show and 21"),
        ({"objective": "accuracy", "with": "mezo,adamw"}, ConfigError, "has none"),
        ({"precision": "bf16", "with": "zero-shot,adamw"}, ParameterError, "16 bits"),
        ({"task": "squad", "with": "zero-shot,probe"}, ConfigError, "needs options"),
        ({"task": "squad", "with": "prior-corrected"}, ConfigError, "needs options"),
        ({"task": "copa", "with": "probe"}, ConfigError, "one of choice"),
        ({"with": "conservative", "rule": "adam"}, ConfigError, "cannot be tried"),
    ],
)
def test_bad_input_is_refused_before_any_work(compare, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        compare(**options)
    assert not (tmp_path / "compared").exists()


def test_other_settings_and_other_folders_are_refused(compare, tmp_path):
    compare(**{"with": "zero-shot"})
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        compare(seed=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("all my work")
    with pytest.raises(ConfigError, match="not empty"):
        compare("thesis")


def test_no_global_generator_moves(compare):
    before = torch.get_rng_state()
    compare(**{"with": "mezo,adamw,probe"}, forwards=8)
    assert torch.equal(before, torch.get_rng_state())


def test_what_another_process_finished_meanwhile_is_kept(compare, tmp_path, monkeypatch):
    """It began after this one had read the folder, and ended before this one took hold of it."""
    from zotune.comparison import comparing

    plain, out = comparing.load, tmp_path / "compared"

    def slow(*args):
        loaded = plain(*args)
        if not (out / "comparison.json").exists():
            monkeypatch.setattr(comparing, "load", plain)
            compare(**{"with": "zero-shot,mezo"})
        return loaded

    monkeypatch.setattr(comparing, "load", slow)
    compare(**{"with": "zero-shot,prior-corrected"})
    assert set(entries_of(out)) == {"zero-shot", "mezo (lr 0.001)", "prior-corrected"}


def test_other_rows_in_the_same_folder_are_refused(compare, tiny, tmp_path):
    data = shutil.copytree(tiny[1], tmp_path / "rows")
    compare(**{"with": "zero-shot", "data": data})
    text = (data / "validation.jsonl").read_text()
    (data / "validation.jsonl").write_text(text.replace('"label": 1', '"label": 0'))
    with pytest.raises(DataError, match="on other rows"):
        compare(**{"with": "zero-shot,mezo", "data": data})


def test_options_that_no_contestant_has_are_refused(compare):
    with pytest.raises(ConfigError, match="--method-option goes to the contestant that --method names, 'mezo'"):
        compare(**{"with": "es", "method_option": "n=8"})
    with pytest.raises(ConfigError, match="--mode-option goes to contestants"):
        compare(**{"with": "mezo:lora", "mode_option": "r=2"})


def test_options_of_another_method_are_other_settings(compare):
    compare(**{"with": "es", "method": "es", "method_option": "n=2"})
    with pytest.raises(ConfigError, match="method was 'es', now 'mezo'"):
        compare(**{"with": "es,mezo", "method": "mezo", "method_option": "n=2"})


def test_settings_of_single_runs_are_said_to_change_nothing(compare):
    assert "compare takes no notice of --steps" in compare(**{"with": "zero-shot", "steps": 3})


@pytest.mark.parametrize(("name", "message"), [("grzo", "loss for each example"), ("zo_finetuner", "trained networks")])
def test_methods_that_cannot_run_are_refused_before_any_work(compare, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        compare(**{"with": f"{name},zero-shot"})
    assert not (tmp_path / "compared").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "x"])
def test_a_damaged_comparison(compare, tmp_path, text):
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "comparison.json").write_text(text)
    if text == "{}":  # nothing in it
        compare(**{"with": "zero-shot"})
    else:
        with pytest.raises(DataError, match=r"comparison\.json is damaged"):
            compare(**{"with": "zero-shot"})
