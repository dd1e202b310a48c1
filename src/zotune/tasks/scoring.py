"""How likely a model finds each option of a question: scores for evaluation, and the loss that trains on them.

The score of an option is the mean log-probability of its tokens after the prompt; the loss is the cross entropy of
the right option under the softmax of the scores (MeZO's ``train_as_classification``). Nothing is computed that the
answer does not depend on: see ``layout`` for the rows and ``logits`` for the positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import ConfigError, DataError
from zotune.tasks.encoding import Encoded
from zotune.tasks.head import wide
from zotune.tasks.layout import Layout, lay_out
from zotune.tasks.logits import BodyAndHead, find_logit_source, head_in_pieces, shared_rows
from zotune.tasks.packed import LEAST_SAVING, dropout_is_on, pack, packed_size
from zotune.tasks.packing_trial import longest_packed


class OptionScorer:
    """Scores options with a causal language model, under whatever gradient and train/eval mode the caller has set.

    Results do not depend on padding or on what else is in the batch, but for rounding. They are fp32 (fp64 for an
    fp64 model) from the logits on, whatever the forward's dtype.

    Attributes:
        source: answers with logits.
        source_reason: how the model is asked for logits, and why.
        loss_reason: whether ``loss`` skips the full logits for options of one token, and why.
        layout_reason: whether prompts are fed once for all options, and why.
        option_rows: the module through which `loss` looks up rows of the head, whose Parameter it shares; or None.
        token_scores: the module through which log-probabilities are computed without the matrix of logits; or None.
            Neither is a submodule of the model: an engine that changes weights at module calls must know them.
    """

    def __init__(self, model: nn.Module, *, pad_id: int | None = None, autocast: torch.dtype | None = None) -> None:
        """Look at the model once, with a few forward passes over four tokens.

        Args:
            model: a causal language model of transformers, with or without PEFT adapters.
            pad_id: fills up rows; no result depends on it. None takes 0.
            autocast: dtype of the matrix products of the model's body (``torch.bfloat16``, ``torch.float16``), or None
                for that of the weights.

        Raises:
            ModelError: not a causal language model.
            ConfigError: autocast is not a lower-precision floating dtype.
        """
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast}.")
        self.model = model
        self.pad_id = pad_id if pad_id is not None else 0
        self.autocast = autocast
        self.source, self.source_reason = find_logit_source(model, self.device, autocast)
        self.option_rows, self.loss_reason = shared_rows(self.source, self.device)
        self.token_scores = head_in_pieces(self.source, self.device)
        self._longest_packed, self.layout_reason = longest_packed(self.source, self.device)
        self._longest = context_of(model)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the model's first parameter."""
        return next(self.model.parameters()).device

    def scores(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the mean log-probability of each option's tokens: (B, K), K the most options, -inf where fewer.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        layout = self.arrange(batch)
        return mean_per_option(self._log_probabilities(layout), layout)

    def sums(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the log-probability of each option as a whole: (B, K), -inf where there are fewer than K options.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        layout = self.arrange(batch)
        return _per_option(self._log_probabilities(layout), layout)

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the mean over examples of the cross entropy of the right option under softmax(scores): a scalar.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        if self.option_rows is not None and all(len(option) == 1 for example in batch for option in example.option_ids):
            layout = self.arrange(batch)
            scores = self._relative_scores(layout, self.option_rows)
            labels = layout.labels
        else:
            scores = self.scores(batch)
            labels = torch.tensor([example.label for example in batch])
        return nn.functional.cross_entropy(scores, labels.to(scores.device))

    def _relative_scores(self, layout: Layout, option_rows: nn.Embedding) -> Tensor:
        """Scores (B, K) of one-token options, short of a number for each example that no difference depends on."""
        assert isinstance(self.source, BodyAndHead)
        hidden = self.source.hidden(layout, self.device)  # (B, d)
        ids, column = torch.unique(layout.token_id, return_inverse=True)
        few = wide(option_rows(ids.to(hidden.device)))  # (U, d)
        logits = wide(hidden) @ few.T  # (B, U)
        example = layout.token_option // layout.present.shape[1]
        picked = logits[example.to(logits.device), column.to(logits.device)]  # (T,), in the order of ``present``
        scores = picked.new_full(layout.present.shape, -torch.inf)
        return scores.masked_scatter(layout.present.to(logits.device), picked)

    def _log_probabilities(self, layout: Layout) -> Tensor:
        """Log-probability (T,) of each option token after what is before it."""
        if self.token_scores is None:
            return _of_logits(self.source.logits(layout, self.device), layout)
        assert isinstance(self.source, BodyAndHead)
        hidden = self.source.hidden(layout, self.device).to(self.token_scores.weight.dtype)  # (Q, d)
        found: Tensor = self.token_scores(
            (hidden, layout.token_query.to(hidden.device), layout.token_id.to(hidden.device))
        )
        return found

    def arrange(self, batch: Sequence[Encoded]) -> Layout:
        """Lay out a batch in whichever way feeds fewer tokens: a count decides, so a batch always lies the same way.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        layout = self.lay_out(batch)
        if len(layout.input_ids) == 1 or self._longest_packed == 0:
            return layout
        rows, length = packed_size(batch, self._longest_packed)
        if length > self._longest_packed or rows * length > (1 - LEAST_SAVING) * layout.input_ids.numel():
            return layout
        # a row for each option draws other dropout masks than a prompt that is fed once
        return layout if dropout_is_on(self.model) else pack(batch, self.pad_id, self._longest_packed)

    def lay_out(self, batch: Sequence[Encoded]) -> Layout:
        """Lay out a batch that the model can read, in rows."""
        layout = lay_out(batch, self.pad_id)
        if self._longest is not None and layout.input_ids.shape[1] > self._longest:
            raise DataError(
                f"an example is {layout.input_ids.shape[1]} tokens long and the model reads {self._longest}. "
                f"Encode with max_length {self._longest} or less."
            )
        return layout


def mean_per_option(log_probability: Tensor, layout: Layout) -> Tensor:
    """Scores (B, K) from the log-probabilities (T,) of a layout's option tokens."""
    return _per_option(log_probability * layout.token_weight.to(log_probability), layout)


def _of_logits(logits: Tensor, layout: Layout) -> Tensor:
    """Log-probability (T,) of each option token after what is before it."""
    logits = wide(logits)  # (Q, V)
    query = layout.token_query.to(logits.device)
    return logits[query, layout.token_id.to(logits.device)] - logits.logsumexp(-1)[query]


def _per_option(terms: Tensor, layout: Layout) -> Tensor:
    """Add up terms (T,) of option tokens by option: (B, K), -inf where an example has fewer options."""
    flat = terms.new_zeros(layout.present.numel()).index_add(0, layout.token_option.to(terms.device), terms)
    return flat.view(layout.present.shape).masked_fill(~layout.present.to(terms.device), -torch.inf)


def context_of(model: nn.Module) -> int | None:
    """Tokens that the model reads at most, those of a learned prefix or prompt taken off; None if it does not say."""
    longest: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    adapter: Any = getattr(model, "active_peft_config", None)
    virtual = adapter.num_virtual_tokens if getattr(adapter, "is_prompt_learning", False) else 0
    return None if longest is None else longest - int(virtual)
