"""From rows to tokens with a mask among them.

The result is an `Encoded` as for causal models: the "prompt" is the whole text with its mask and special tokens, and each
option is one token, the word of a label. So batches, evaluation and training treat both kinds of model alike.
"""

from collections.abc import Sequence
from typing import Any

from zotune.errors import DataError, ModelError
from zotune.masked.templates import MaskedTemplate, fill, label_index
from zotune.tasks.encoding import Encoded
from zotune.tasks.task import Row


def encode_masked(template: MaskedTemplate, row: Row, tokenizer: Any, max_length: int = 512) -> Encoded:
    """Encode one row.

    The text before the mask and the text after it are encoded apart, so the mask has no token of a space beside it.
    Too long a text loses the tokens farthest from the mask, on the side that is longer, so both sentences of a pair
    keep a part; special tokens and the mask stay.

    Raises:
        DataError: a field is missing or empty, or holds the mask token; the label is not one of the template's; a word
            is not one token; or max_length has no room for text.
        ModelError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError("the tokenizer has no mask token; masked templates need a masked model (RoBERTa, BERT).")
    before, after = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else [] for part in fill(template, row)
    )
    first, last = _ends(tokenizer)
    room = max_length - 1 - len(first) - len(last)
    if room < 1:
        raise DataError(f"max_length {max_length} has no room for text beside the mask and special tokens.")
    if tokenizer.mask_token_id in (*before, *after):
        raise DataError(f"the row's text holds the mask token {tokenizer.mask_token!r} itself; take it out.")
    cut = max(0, len(before) + len(after) - room)
    for _ in range(cut):
        if len(before) >= len(after):
            before.pop(0)
        else:
            after.pop()
    ids = [*first, *before, tokenizer.mask_token_id, *after, *last]
    words = tuple([_word_token(tokenizer, word)] for word in template.words.values())
    return Encoded(ids, words, label_index(template, row), cut=cut)


def encode_all_masked(
    template: MaskedTemplate, rows: Sequence[Row], tokenizer: Any, max_length: int = 512
) -> list[Encoded]:
    """Encode rows one by one; see `encode_masked`. The error of a row names its number from 0."""
    encoded = []
    for index, row in enumerate(rows):
        try:
            encoded.append(encode_masked(template, row, tokenizer, max_length))
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
    return encoded


def _word_token(tokenizer: Any, word: str) -> int:
    ids = list(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
    if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
        raise DataError(
            f"the word {word!r} is {len(ids)} tokens of this tokenizer (or unknown to it); the mask is one token. "
            "Choose another word for its label."
        )
    return int(ids[0])


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: [CLS] and [SEP], or <s> and </s>."""
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first], [] if last is None else [last]
