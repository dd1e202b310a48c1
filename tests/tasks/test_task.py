"""Templates as golden strings, and rows that do not fit them."""

import pytest

from zotune.errors import ConfigError, DataError
from zotune.tasks.catalogue import TASKS, find_task
from zotune.tasks.task import Task, make_example, make_examples, refuse_overlap


@pytest.mark.parametrize("name", ["sst2", "vader_movie"])
def test_sentiment_prompt_is_golden(name):
    # the strings of MeZO's SST-2 template; the space after the sentence in GLUE's rows goes, the one in front of an
    # option stays
    example = make_example(TASKS[name], {"sentence": " it 's a charming film . ", "label": 1, "idx": 3})
    assert example.prompt == "it 's a charming film . It was"
    assert example.options == (" terrible", " great")
    assert example.label == 1
    assert make_example(TASKS[name], {"sentence": "dull", "label": 0}).label == 0


def test_braces_in_a_row_are_text():
    assert make_example(TASKS["sst2"], {"sentence": "{label} {x", "label": 0}).prompt == "{label} {x It was"


def test_prompt_may_be_a_function():
    task = Task("n", lambda row: row["a"] + "?\n", {"x": "Yes", "y": "No"}, "s", "l", fields=("a",), label_field="gold")
    example = make_example(task, {"a": "Is it", "gold": "y"})
    assert (example.prompt, example.label) == ("Is it?\n", 1)
    with pytest.raises(DataError, match="no field 'a'"):
        make_example(task, {"gold": "y"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 1}, r"row 1 of train .* no field 'sentence'; it has text, label"),
        ({"sentence": "x"}, "row 1 of train .* no field 'label'"),
        ({"sentence": "x", "label": 2}, r"row 1 of train .* label 2; allowed are 0, 1"),
        ({"sentence": "x", "label": "1"}, "label '1'; allowed are 0, 1"),
        ({"sentence": "x", "label": None}, "label None; allowed are 0, 1"),
        ({"sentence": "x", "label": [1]}, r"label \[1\]; allowed are 0, 1"),
        ({"sentence": "x", "label": -1}, "withheld"),
        ({"sentence": " ", "label": 1}, "text that is not empty"),
        ({"sentence": 3, "label": 1}, "text that is not empty"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(DataError, match=message):
        make_examples(TASKS["sst2"], [{"sentence": "fine", "label": 1}, row], where="train")


def test_no_rows_and_bad_tasks():
    with pytest.raises(DataError, match="no rows"):
        make_examples(TASKS["sst2"], [])
    with pytest.raises(ConfigError, match="at least 2"):
        Task("n", "{a}", {0: " x"}, "s", "l")
    with pytest.raises(ConfigError, match="label 1"):
        Task("n", "{a}", {0: " x", 1: " "}, "s", "l")
    with pytest.raises(ConfigError, match=r"no task 'sst'; there are agnews, boolq, .*Did you mean 'sst2'"):
        find_task("sst")


def test_overlapping_tasks_are_refused_both_ways():
    sst2, vader, empty = TASKS["sst2"], TASKS["vader_movie"], TASKS["sst2_empty"]
    for trained, evaluated in ((sst2, vader), (vader, sst2), (empty, vader), (vader, empty)):
        with pytest.raises(DataError, match="same corpus"):
            refuse_overlap(trained, evaluated)
    refuse_overlap(sst2, sst2)
    refuse_overlap(sst2, empty)  # one set, the same split of it
    refuse_overlap(vader, vader)


def test_catalogue_is_consistent():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.hub or task.packaged
        for other in task.overlaps:
            assert name in TASKS[other].overlaps


def test_two_options_of_the_same_words_are_refused():
    with pytest.raises(ConfigError, match="same words for two of its options"):
        Task(name="twice", prompt="{text} It was", options={0: " good", 1: " good"}, source="here", licence="none")
