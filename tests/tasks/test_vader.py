"""The demo data: parsing, the split, and refusals; the real file only under the mark ``real``."""

import itertools
import re

import pytest

from zotune.errors import DataError
from zotune.tasks import vader
from zotune.tasks.rows import load_rows
from zotune.tasks.task import make_examples

FILE = "1\t2.5\tLovely &amp; sad    tale.\r\n2\t-1.0\tMünch fails.\r\n3\t0.9\tFine.\r\n4\t-0.3\tSo so.\r\n"


def rows_of(sentences):
    return [{"sentence": sentence, "label": 0} for sentence in sentences]


def jaccard(left, right):
    left, right = (set(re.findall(r"\w+", text.lower())) for text in (left, right))
    return len(left & right) / len(left | right)


def test_parsing_keeps_what_is_clear_cut():
    assert vader.parse_ratings(FILE) == [
        {"sentence": "Lovely & sad tale.", "label": 1, "id": 1, "rating": 2.5},
        {"sentence": "Münch fails.", "label": 0, "id": 2, "rating": -1.0},
    ]
    with pytest.raises(DataError, match=r"line 5 .* 2 tab-separated parts"):
        vader.parse_ratings(FILE + "5\t1.0\r\n")


# words drawn so that all overlaps occur: none, below half, exactly half, above, equal sets
SENTENCES = [" ".join(words) for size in (1, 2, 3, 4) for words in itertools.combinations("ABCDEFG", size)]


def test_near_duplicates_are_the_connected_ones_of_all_pairs():
    """The index that avoids comparing all pairs must find what comparing all pairs finds."""
    sentences = [*SENTENCES[::3], "H I J K L", "L K J H", "m n o p q r s", "m n o t u v"]
    group = list(range(len(sentences)))
    for left, right in itertools.combinations(range(len(sentences)), 2):
        if jaccard(sentences[left], sentences[right]) >= vader.SAME and group[left] != group[right]:
            low, high = sorted((group[left], group[right]))
            group = [low if member == high else member for member in group]
    assert vader.near_duplicates(sentences) == group
    assert 2 < len(set(group)) < len(group)


def test_split_keeps_near_duplicates_together_and_ignores_row_order():
    sentences = [f"word{number} other{number} third{number}" for number in range(40)]
    sentences += [f"extra word{number} third{number} other{number}" for number in range(20)]
    split = vader.split_rows(rows_of(sentences), 15)
    texts = {name: {row["sentence"] for row in part} for name, part in split.items()}
    assert texts["train"] | texts["validation"] == set(sentences)
    assert len(split["validation"]) == 15
    assert max(jaccard(left, right) for left in texts["train"] for right in texts["validation"]) < vader.SAME
    again = vader.split_rows(rows_of(reversed(sentences)), 15)
    assert {row["sentence"] for row in again["validation"]} == texts["validation"]


def test_altered_package_is_refused(tmp_path, monkeypatch):
    def altered(requirement, folder, *, options, error):
        path = folder / "vaderSentiment-3.3.2.tar.gz"
        path.write_bytes(b"something else")
        return path

    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(vader, "pip_download", altered)
    with pytest.raises(DataError, match=f"SHA-256 [0-9a-f]{{64}}, but {vader.SHA256} is pinned"):
        vader.load(lambda _: None)
    assert not list((tmp_path / "data").iterdir()), "nothing may stay of a refused file"


@pytest.mark.real
def test_real_data():
    task = vader_task()
    rows = load_rows(task)
    assert {split: len(part) for split, part in rows.items()} == {"train": 8173, "validation": 1000}
    together = [row["sentence"] for part in rows.values() for row in part]
    leaders = vader.near_duplicates(together)
    assert not set(leaders[:8173]) & set(leaders[8173:])
    assert sum(row["label"] for part in rows.values() for row in part) == 4598
    assert len(make_examples(task, rows["train"])) == 8173


def vader_task():
    from zotune.tasks.catalogue import TASKS

    return TASKS["vader_movie"]
