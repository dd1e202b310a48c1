"""Rows from folders, packages and the hub; choosing among them."""

import dataclasses
import json
import random
import sys
import types

import numpy as np
import pytest

from zotune.errors import ConfigError, DataError, MissingExtraError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.rows import choose_rows, load_rows, protocol_split, read_jsonl

SST2 = TASKS["sst2"]
ROWS = [{"sentence": f"film {number} é", "label": number % 2} for number in range(5)]


def write(folder, train, validation):
    (folder / "train.jsonl").write_text(train, encoding="utf-8")
    (folder / "validation.jsonl").write_text(validation, encoding="utf-8")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_folder(tmp_path):
    write(tmp_path, lines(ROWS) + "\n", lines(ROWS[:2]).strip())  # a blank line and a missing line end are fine
    assert load_rows(SST2, data_folder=tmp_path) == {"train": ROWS, "validation": ROWS[:2]}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", "train.jsonl is empty"),
        ("\n \n", "train.jsonl is empty"),
        (lines(ROWS[:2]) + "{'sentence'\n", r"train.jsonl, line 3, is not JSON"),
        ("\n" + lines(ROWS[:1]) + "[1]\n", "line 3, holds a list"),
        (lines([*ROWS, {"sentence": "x", "label": 7}]), r"row 5 of .*train.jsonl .*label 7; allowed are 0, 1"),
        (lines([{"text": "x", "label": 1}]), "no field 'sentence'"),
    ],
)
def test_bad_folder(tmp_path, train, message):
    write(tmp_path, train, lines(ROWS))
    with pytest.raises(DataError, match=message):
        load_rows(SST2, data_folder=tmp_path)


def test_missing_file_and_bad_bytes(tmp_path):
    with pytest.raises(DataError, match=r"no file .*train.jsonl; needed are train.jsonl and validation.jsonl"):
        load_rows(SST2, data_folder=tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b'{"sentence": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 1, is not JSON in UTF-8"):
        read_jsonl(tmp_path / "x.jsonl")


def test_packaged_rows_come_before_the_hub():
    said = []

    def packaged(say):
        say("here")
        return {"train": ROWS, "validation": ROWS[:1]}

    task = dataclasses.replace(SST2, packaged=packaged)
    assert load_rows(task, say=said.append)["validation"] == ROWS[:1]
    assert said == ["here"]
    with pytest.raises(DataError, match="brings no rows"):
        load_rows(dataclasses.replace(SST2, hub=None))


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return ROWS if split == "train" else ROWS[:2]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_rows(SST2) == {"train": ROWS, "validation": ROWS[:2]}
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]


def test_sets_distributed_as_a_script_are_taken_from_the_hubs_own_conversion(monkeypatch):
    asked = []

    def load_dataset(path, config, split, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        return [{"premise": "a", "hypothesis": "b", "label": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_rows(TASKS["rte"])["train"] == [{"premise": "a", "hypothesis": "b", "label": 1}]
    assert asked == [None, "refs/convert/parquet"] * 2


def test_rows_in_no_known_form_are_named(tmp_path):
    good = {"passage": {"text": "a", "questions": [{"question": "q", "answers": [{"text": "b", "label": 1}]}]}}
    write(tmp_path, lines([good, {"passage": {"text": "a"}}]), lines([good]))
    with pytest.raises(DataError, match=r"row 1 of train .*none of the forms.*'questions'"):
        load_rows(TASKS["multirc"], data_folder=tmp_path)
    write(tmp_path, lines([good]), lines([good]))
    assert load_rows(TASKS["multirc"], data_folder=tmp_path)["train"] == [
        {"paragraph": "a", "question": "q", "answer": "b", "label": 1}
    ]


def test_hub_out_of_reach_or_datasets_absent(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"nyu-mll/glue, split 'train'\): no route(.|\n)*vader_movie"):
        load_rows(SST2)
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(MissingExtraError, match=r"zotune\[hf\]"):
        load_rows(SST2)


def test_choice_is_the_head_of_a_permutation():
    numbers = list(range(100))
    chosen = choose_rows(numbers, 30, seed=0)
    assert len(set(chosen)) == 30
    assert chosen == choose_rows(numbers, None, seed=0)[:30]
    assert sorted(choose_rows(numbers, 500, seed=0)) == numbers
    # a permutation that left 30 rows in order, or that the seed did not move, has probability 1 / 30!
    assert chosen != sorted(chosen)
    assert chosen != choose_rows(numbers, 30, seed=1)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        choose_rows(numbers, 0, seed=0)
    with pytest.raises(DataError, match="no rows"):
        choose_rows([], 3, seed=0)


def test_choice_leaves_global_random_state_alone():
    before = (random.getstate(), np.random.get_state()[1].tolist())
    choose_rows(list(range(100)), 30, seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize(
    ("name", "rows", "counts", "shrunk"),
    [
        ("sst2", (5000, 872), (1000, 500, 872), False),
        ("boolq", (1500, 2000), (1000, 500, 1000), False),
        ("copa", (400, 100), (300, 100, 100), True),
        ("cb", (250, 56), (150, 100, 56), True),
        ("wsc", (554, 104), (54, 500, 104), True),
        ("winogrande", (2558, 1267), (1000, 100, 1000), False),
    ],
)
def test_protocol_counts(name, rows, counts, shrunk):
    made = {"train": [{"n": n} for n in range(rows[0])], "validation": [{"n": n} for n in range(rows[1])]}
    split = protocol_split(TASKS[name], made, seed=0)
    assert (len(split.train), len(split.dev), len(split.eval)) == counts
    assert split.shrunk is shrunk
    assert split.counts.startswith(f"{counts[0]} train, {counts[1]} dev, {counts[2]} eval rows")
    assert ("small" in split.counts) is shrunk
    train, dev = ({row["n"] for row in part} for part in (split.train, split.dev))
    assert not train & dev


def test_protocol_draws_numpys_permutation_and_dev_is_its_end():
    rows = {"train": [{"n": n} for n in range(40)], "validation": [{"n": n} for n in range(30)]}
    before = np.random.get_state()[1].tolist()
    split = protocol_split(SST2, rows, seed=7, num_train=6, num_dev=3, num_eval=4)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(7)  # as MeZO's code draws
    train = np.random.permutation(40).tolist()[:9]
    np.random.seed(7)
    evaluation = np.random.permutation(30).tolist()[:4]
    assert [row["n"] for row in split.train] == train[:6]
    assert [row["n"] for row in split.dev] == train[6:]
    assert [row["n"] for row in split.eval] == evaluation


def test_protocol_refusals():
    rows = {"train": ROWS, "validation": ROWS}
    with pytest.raises(DataError, match="5 training rows, and 500"):
        protocol_split(SST2, rows, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        protocol_split(SST2, rows, seed=0, num_train=0)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", [rb'{"a": "\ud800"}', b"[" * 100_000])
def test_what_is_no_text_and_brackets_without_end_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2, is not JSON"):
        read_jsonl(tmp_path / "a.jsonl")


def test_a_pair_of_surrogates_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"a": "\ud83d\ude00"}' + b"\n")
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": "\N{GRINNING FACE}"}]
