"""From words to tokens: a prompt and its options, encoded as MeZO does (specs: option length by difference).

The number of option tokens is ``len(tok(prompt + option)) - len(tok(prompt without trailing spaces))``; that many
tokens at the end of the full text are the option, the rest is the prompt. Nothing is added by the tokenizer: no
BOS, no EOS. Too long a text loses tokens at its left end, where the option never is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zotune.core.errors import ConfigError, DataError
from zotune.tasks.task import Example


@dataclass(frozen=True)
class Encoded:
    """One question in tokens: what all options have before them, the tokens of each option, the right one's index."""

    prompt_ids: list[int]
    option_ids: tuple[list[int], ...]
    label: int

    @property
    def length(self) -> int:
        """Tokens of the longest text, prompt and option together."""
        return len(self.prompt_ids) + max(map(len, self.option_ids))


def encode(example: Example, tokenizer: Any, max_length: int, *, bos_id: int | None = None) -> Encoded:
    """Encode one example.

    Args:
        example: the question in words.
        tokenizer: of transformers, or any that takes ``(text, add_special_tokens=False)`` to ``{"input_ids": ids}``.
        max_length: most tokens of prompt and longest option together, ``bos_id`` included.
        bos_id: put before every prompt and kept when the prompt is cut, for models that cannot do without.

    Raises:
        DataError: an option has no tokens of its own, options change the prompt's tokens, the prompt is empty, or an
            option does not fit into ``max_length``.
        ConfigError: max_length is not positive.
    """
    if max_length < 1:
        raise ConfigError(f"max_length must be at least 1 token, got {max_length}.")
    prompt_length = len(_tokens(tokenizer, example.prompt.rstrip(" ")))
    prompts, options = [], []
    for option in example.options:
        ids = _tokens(tokenizer, example.prompt + option)
        length = len(ids) - prompt_length
        if length <= 0:
            raise DataError(
                f"the option {option!r} adds no token to the prompt {_tail(example.prompt)!r}: the tokenizer joins the "
                "two. Let the option start with a space, or end the prompt with a line break."
            )
        prompts.append(ids[:-length])
        options.append(ids[-length:])
    if any(prompt != prompts[0] for prompt in prompts):
        raise DataError(
            f"the tokens of the prompt {_tail(example.prompt)!r} depend on the option that follows it. "
            "Let the options start with a space, or end the prompt with a line break."
        )
    return Encoded(_cut(prompts[0], options, max_length, bos_id), tuple(options), example.label)


def encode_all(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, bos_id: int | None = None
) -> list[Encoded]:
    """Encode examples one by one; see ``encode``. The error of a row names its number from 0."""
    encoded = []
    for index, example in enumerate(examples):
        try:
            encoded.append(encode(example, tokenizer, max_length, bos_id=bos_id))
        except DataError as error:
            raise DataError(f"example {index}: {error}") from error
    return encoded


def _cut(prompt: list[int], options: list[list[int]], max_length: int, bos_id: int | None) -> list[int]:
    """Return the end of the prompt that leaves room for the longest option, with ``bos_id`` before it."""
    head = [] if bos_id is None else [bos_id]
    longest = max(map(len, options))
    room = max_length - longest - len(head)
    kept = head + (prompt[-room:] if room > 0 else [])
    if room < 0 or not kept:
        raise DataError(
            f"no prompt token is left before an option of {longest} token(s) with max_length {max_length} and a prompt "
            f"of {len(prompt)}: the first token of an option is predicted from the one before it. "
            "Raise max_length, shorten the options, or give a prompt."
        )
    return kept


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tail(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else "..." + prompt[-40:]
