"""How a generated answer compares with the right ones: SQuAD's exact match and token F1 (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, without the articles a, an, the, and with single spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(text: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the words of a text, for the answer where it is largest.

    Words are counted with their multiplicity, after ``normalise``. Without a word in common, or a word at all, it is 0.
    """
    return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in answers)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text equals one of the answers after ``normalise``, else 0."""
    return float(normalise(text) in {normalise(answer) for answer in answers})


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


METRICS: dict[str, Metric] = {"f1": f1, "exact": exact_match}
"""Scores of a generated text against its answers, by name."""
