"""Prompted classification with masked language models (RoBERTa, BERT), as MeZO does it: the word at the mask decides.

A template turns a row into text with one mask; each label has a word of one token. `MaskedScorer` answers as
`OptionScorer` does for causal models: `scores` for evaluation, `loss` for training, results that depend neither on
padding nor on the rest of the batch but for rounding.
"""

from zotune.masked.encoding import encode_all_masked, encode_masked
from zotune.masked.loading import load_masked
from zotune.masked.scoring import MaskedScorer
from zotune.masked.templates import MASKED_TEMPLATES, MaskedTemplate, find_masked_template

__all__ = [
    "MASKED_TEMPLATES",
    "MaskedScorer",
    "MaskedTemplate",
    "encode_all_masked",
    "encode_masked",
    "find_masked_template",
    "load_masked",
]
