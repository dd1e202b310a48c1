"""Greedy answers of a model: at most 50 new tokens, up to the first line break or end of text, without outer spaces.

transformers' own ``generate`` does the work: prompts are padded on the left, with an attention mask, from which it counts
positions. What an example gets does not depend on its neighbours in the batch, but for rounding.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import ConfigError, DataError
from zotune.extras import require
from zotune.tasks.logits import lowered
from zotune.tasks.scoring import context_of
from zotune.tasks.task import NEW_TOKENS

LINE_BREAKS = ("\n", "Ċ", "<0x0A>")
"""How tokenizers write a line break inside a token: plainly, as byte-level BPE does, as a byte token."""


@dataclass(frozen=True)
class Generated:
    """One answer."""

    text: str
    """Up to the first line break, without outer spaces; may be empty."""
    token_ids: tuple[int, ...]
    """The new tokens, the one that ended it included."""
    finished: bool
    """Whether it ended by itself, and not because of its length."""


class Generator:
    """Writes answers with a causal language model, in whatever train/eval mode the caller has set."""

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int = NEW_TOKENS, autocast: torch.dtype | None = None
    ) -> None:
        """Find the tokens that end an answer.

        Args:
            model: a causal language model of transformers, with or without PEFT adapters.
            tokenizer: its tokenizer.
            max_new_tokens: most tokens of an answer.
            autocast: dtype of the matrix products (``torch.bfloat16``, ``torch.float16``), or None for that of the
                weights.

        Raises:
            ConfigError: max_new_tokens is not positive, or the model cannot generate.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not hasattr(model, "generate"):
            raise ConfigError(f"{type(model).__name__} has no generate(); a causal language model is needed.")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.autocast = max_new_tokens, autocast
        self.ends = _end_tokens(model, tokenizer)
        self.stops = frozenset({*self.ends, *_line_break_tokens(tokenizer)})
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int = pad if pad is not None else min(self.ends, default=0)
        # PEFT drops the position ids where a prompt or prefix is learned: padding would move what follows it
        self._never_pads = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self._longest = context_of(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Answer prompts of token ids, in their order; batches are of similar length.

        Raises:
            DataError: a prompt is empty, or leaves no room for the new tokens.
            ConfigError: batch_size is not positive.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        for number, prompt in enumerate(prompts):
            self._check(number, len(prompt))
        found: dict[int, Generated] = {}
        for chosen in self._batches([len(prompt) for prompt in prompts], batch_size):
            for index, new in zip(chosen, self._new_tokens([prompts[index] for index in chosen]), strict=True):
                found[index] = self._read(new)
            if progress is not None:
                progress(len(found), len(prompts))
        return [found[index] for index in range(len(prompts))]

    def _batches(self, lengths: list[int], batch_size: int) -> Iterator[list[int]]:
        """Indices of prompts of similar length, or of the same one where padding would do harm."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, group in groupby(order, key=lambda index: lengths[index] if self._never_pads else 0):
            same = list(group)
            for start in range(0, len(same), batch_size):
                yield same[start : start + batch_size]

    def _new_tokens(self, prompts: list[Sequence[int]]) -> list[list[int]]:
        transformers = require("transformers", extra="hf", purpose="generate text")
        # every setting is given: what is left open would be taken from the model's own generation config
        settings = transformers.GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=self.pad_id,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            return_dict_in_generate=False,
        )
        device = next(self.model.parameters()).device
        ids, mask = pad_left(prompts, self.pad_id)
        with torch.no_grad(), lowered(device, self.autocast), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        new: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return new

    def _read(self, new: list[int]) -> Generated:
        end = next((place for place, token in enumerate(new) if token in self.stops), None)
        tokens = new if end is None else new[: end + 1]
        written = tokens[:-1] if end is not None and tokens[-1] in self.ends else tokens
        text = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generated(text.partition("\n")[0].strip(), tuple(tokens), end is not None)

    def _check(self, number: int, length: int) -> None:
        if length == 0:
            raise DataError(f"prompt {number} has no tokens; at least one is needed to write on from.")
        if self._longest is not None and length + self.max_new_tokens > self._longest:
            raise DataError(
                f"prompt {number} has {length} tokens, and with {self.max_new_tokens} new ones that is more than the "
                f"{self._longest} that the model reads. Encode with max_length {self._longest - self.max_new_tokens} or less."
            )


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (B, S) int64 each, with the prompts at the right end of the rows."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end of text, and those that the model's generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {named} if isinstance(named, int) else set(named or ())
    ends.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(ends - {None})


def _line_break_tokens(tokenizer: Any) -> list[int]:
    """All tokens with a line break in their text: alone, doubled, or behind a full stop."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    likely = [number for number, name in enumerate(names) if name and any(mark in name for mark in LINE_BREAKS)]
    return [number for number in likely if "\n" in tokenizer.decode([number])]
