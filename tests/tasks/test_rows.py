"""Rows from folders, packages and the hub; choosing among them."""

import dataclasses
import json
import random
import sys
import types

import numpy as np
import pytest

from zotune.core.errors import ConfigError, DataError, MissingExtraError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.rows import choose_rows, load_rows, read_jsonl

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
