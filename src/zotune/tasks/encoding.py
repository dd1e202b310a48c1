"""From words to tokens: a prompt and its options, encoded as MeZO does (option length by difference).

The number of option tokens is ``len(tok(prompt + option)) - len(tok(prompt without trailing spaces))``; that many
tokens at the end of the full text are the option, the rest is the prompt. Nothing is added by the tokenizer; a BOS is
put before prompts by ``bos_id``, for models whose tokenizers do so by themselves (OPT, Llama 2 and 3, Gemma). Too long a
text loses tokens at its left end, where the option never is, and the tokens lost are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zotune.errors import ConfigError, DataError
from zotune.tasks.task import NEW_TOKENS, Example


@dataclass(frozen=True)
class Encoded:
    """One question in tokens: what all options have before them, the tokens of each option, the right one's index."""

    prompt_ids: list[int]
    option_ids: tuple[list[int], ...]
    label: int
    right: tuple[int, ...] = ()
    """All right options, where there are more than ``label``."""
    cut: int = 0
    """Tokens of the prompt that were left out to fit."""
    example: Example | None = field(default=None, compare=False, repr=False)
    """The same in words; generated answers are compared with its."""

    @property
    def length(self) -> int:
        """Tokens of the longest text, prompt and option together."""
        return len(self.prompt_ids) + max(map(len, self.option_ids))

    @property
    def all_right(self) -> tuple[int, ...]:
        """The indices of all right options."""
        return self.right or (self.label,)


@dataclass(frozen=True)
class Truncation:
    """How many prompts were cut to fit, and by how much."""

    examples: int
    of: int
    tokens: int

    def __str__(self) -> str:
        if not self.examples:
            return f"none of {self.of} prompts was cut"
        return f"{self.examples} of {self.of} prompts lost tokens at their left end, {self.tokens} in all"


def truncation(encoded: Sequence[Encoded]) -> Truncation:
    """Count the prompts that were cut."""
    cut = [example.cut for example in encoded if example.cut]
    return Truncation(len(cut), len(encoded), sum(cut))


def special_tokens(tokenizer: Any) -> dict[str, int | None]:
    """What ``encode`` should put before prompts for this tokenizer: ``{"bos_id": ..., "start_id": ...}``.

    A BOS exactly if the tokenizer puts one before a text by itself: its model was trained so. The start token stands
    before an option where there is no prompt at all: BOS, or what parts documents (GPT-2's ``<|endoftext|>``).
    """
    bos, plain = getattr(tokenizer, "bos_token_id", None), _tokens(tokenizer, "a")
    by_itself = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    adds = bos is not None and by_itself[: 1 + len(plain)] == [bos, *plain]
    start = bos if bos is not None else getattr(tokenizer, "eos_token_id", None)
    return {"bos_id": bos if adds else None, "start_id": start}


def encode(
    example: Example, tokenizer: Any, max_length: int, *, bos_id: int | None = None, start_id: int | None = None
) -> Encoded:
    """Encode one example.

    Args:
        example: the question in words.
        tokenizer: of transformers, or any that takes ``(text, add_special_tokens=False)`` to ``{"input_ids": ids}``.
        max_length: most tokens of prompt and longest option together, ``bos_id`` included; where an answer is to be
            generated, room is left for 50 new tokens.
        bos_id: put before every prompt and kept when the prompt is cut, for models that cannot do without.
        start_id: stands for a prompt that has no tokens, where there is no ``bos_id`` either.

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
    head = [] if bos_id is None else [bos_id]
    if not prompts[0] and not head and start_id is not None:
        head = [start_id]
    kept = _cut(prompts[0], options, max_length, head, NEW_TOKENS if example.answers else 0)
    cut = len(head) + len(prompts[0]) - len(kept)
    return Encoded(kept, tuple(options), example.label, example.right, cut, example)


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    bos_id: int | None = None,
    start_id: int | None = None,
) -> list[Encoded]:
    """Encode examples one by one; see ``encode``. The error of a row names its number from 0."""
    encoded = []
    for index, example in enumerate(examples):
        try:
            encoded.append(encode(example, tokenizer, max_length, bos_id=bos_id, start_id=start_id))
        except DataError as error:
            raise DataError(f"example {index}: {error}") from error
    return encoded


def _cut(prompt: list[int], options: list[list[int]], max_length: int, head: list[int], new_tokens: int) -> list[int]:
    """Return the end of the prompt that leaves room for the longest option or the new tokens, with ``head`` before it."""
    longest = max(map(len, options))
    room = max_length - max(longest, new_tokens) - len(head)
    kept = head + (prompt[-room:] if room > 0 else [])
    if room < 0 or not kept:
        what = f"an option of {longest} token(s)" + (f" or {new_tokens} new ones" if new_tokens else "")
        raise DataError(
            f"no prompt token is left before {what} with max_length {max_length} and a prompt "
            f"of {len(prompt)}: the first token of an option is predicted from the one before it. "
            "Raise max_length, shorten the options, or give a prompt."
        )
    return kept


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tail(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else "..." + prompt[-40:]
