"""SQuAD's normalisation, exact match and F1; Countdown's reward and rows."""

from fractions import Fraction

import pytest

from zotune.tasks import countdown
from zotune.tasks.metrics import exact_match, f1, normalise


def test_normalisation():
    assert normalise("  The cat, a dog -- and AN  owl!\n") == "cat dog and owl"
    assert normalise("theatre another") == "theatre another", "articles are words of their own"


@pytest.mark.parametrize(
    ("text", "answers", "value"),
    [
        ("the red fox", ["red fox"], 1),
        ("red fox runs", ["red fox"], Fraction(4, 5)),  # precision 2/3, recall 1
        ("fox", ["red fox", "a fox"], 1),  # the best answer counts
        ("fox fox", ["fox"], Fraction(2, 3)),  # a word counts as often as it is in both
        ("fox fox", ["fox fox fox"], Fraction(4, 5)),
        ("dog", ["red fox"], 0),
        ("", ["red fox"], 0),
        ("the", ["a"], 0),  # nothing is left of either
    ],
)
def test_f1(text, answers, value):
    assert f1(text, answers) == pytest.approx(float(value), abs=1e-12)  # a quotient of fp64


def test_exact_match():
    assert exact_match("The Fox.", ["cat", "fox"]) == 1
    assert exact_match("foxes", ["fox"]) == 0
    assert exact_match("", ["fox"]) == 0


ROW = {"nums": [3, 5, 2], "target": 16}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(3 + 5) * 2", 1.0),
        (" (3+5)*2 = 16", 1.0),
        ("2 * (5 + 3)\nor so", 1.0),
        ("3 + 5 + 2", 0.1),  # the right numbers, another value
        ("3 + 5 * 2 / 1", 0.0),  # a number that is not there
        ("3 + 5", 0.0),  # one is missing
        ("(3 + 5) * 2 * 2 / 2", 0.0),  # one used too often
        ("16", 0.0),
        ("", 0.0),
        ("\n", 0.0),
        ("the answer is 16", 0.0),
        ("(3 + 5) * 2)", 0.0),
        ("3 / (5 - 5) * 2", 0.0),
        ("3 ** 5 ** 2", 0.0),
        ("__import__('os').getcwd()", 0.0),
        ("(lambda: 3)() + 5 + 2", 0.0),
        ("True + 3 + 5 + 2", 0.0),
        ("3.0 + 5 + 2", 0.0),
        ("(" * 5000 + "3" + ")" * 5000, 0.0),
        ("3" + "+3" * 5000, 0.0),
        ("3 + \x00 5", 0.0),
    ],
)
def test_countdown_reward(text, value):
    assert countdown.reward(text, ROW) == value
    assert countdown.solved(text, ROW) == (value == 1)


def test_countdown_is_exact():
    # 8 / (3 - 8 / 3) = 24 holds for fractions, and not for floats everywhere
    assert countdown.reward("8 / (3 - 8 / 3)", {"nums": [8, 3, 8, 3], "target": 24}) == 1


def test_countdown_rows_are_solved_and_different():
    rows = countdown.load(lambda _: None)
    assert [len(rows[split]) for split in ("train", "validation")] == [2000, 1000]
    every = [*rows["train"], *rows["validation"]]
    assert all(countdown.reward(row["solution"], row) == 1 for row in every)
    assert len({(tuple(sorted(row["nums"])), row["target"]) for row in every}) == 3000
    assert rows == countdown.load(lambda _: None)
