"""How likely a model finds each option of a question: scores for evaluation, and the loss that trains on them.

The score of an option is the mean log-probability of its tokens after the prompt; the loss is the cross entropy of
the right option under the softmax of the scores (MeZO's ``train_as_classification``). Nothing is computed that the
answer does not depend on: see ``layout`` for the rows and ``logits`` for the positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zotune.core.errors import ConfigError, DataError
from zotune.tasks.encoding import Encoded
from zotune.tasks.layout import Layout, lay_out
from zotune.tasks.logits import BodyAndHead, find_logit_source, shared_rows


class OptionScorer:
    """Scores options with a causal language model, under whatever gradient and train/eval mode the caller has set.

    Results do not depend on padding or on what else is in the batch, but for rounding. They are fp32 (fp64 for an
    fp64 model) from the logits on, whatever the forward's dtype.

    Attributes:
        source_reason: how the model is asked for logits, and why.
        loss_reason: whether ``loss`` skips the full logits for options of one token, and why.
        option_rows: the module through which it does, which shares the Parameter of the head; or None. It is not a
            submodule of the model: an engine that changes weights at module calls must know it.
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
        self._source, self.source_reason = find_logit_source(model, self.device, autocast)
        self.option_rows, self.loss_reason = shared_rows(self._source, self.device)
        self._longest: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the model's first parameter."""
        return next(self.model.parameters()).device

    def scores(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the mean log-probability of each option's tokens: (B, K), K the most options, -inf where fewer.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        layout = self._lay_out(batch)
        logits = _wide(self._source.logits(layout, self.device))  # (Q, V)
        device = logits.device
        query = layout.token_query.to(device)
        log_probability = logits[query, layout.token_id.to(device)] - logits.logsumexp(-1)[query]  # (T,)
        weighted = log_probability * layout.token_weight.to(log_probability)
        flat = weighted.new_zeros(layout.present.numel()).index_add(0, layout.token_option.to(device), weighted)
        return flat.view(layout.present.shape).masked_fill(~layout.present.to(device), -torch.inf)

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the mean over examples of the cross entropy of the right option under softmax(scores): a scalar.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        if self.option_rows is not None and all(len(option) == 1 for example in batch for option in example.option_ids):
            layout = self._lay_out(batch)
            scores = self._relative_scores(layout, self.option_rows)
            labels = layout.labels
        else:
            scores = self.scores(batch)
            labels = torch.tensor([example.label for example in batch])
        return nn.functional.cross_entropy(scores, labels.to(scores.device))

    def _relative_scores(self, layout: Layout, option_rows: nn.Embedding) -> Tensor:
        """Scores (B, K) of one-token options, short of a number for each example that no difference depends on."""
        assert isinstance(self._source, BodyAndHead)
        hidden = self._source.hidden(layout, self.device)  # (B, d)
        ids, column = torch.unique(layout.token_id, return_inverse=True)
        few = _wide(option_rows(ids.to(hidden.device)))  # (U, d)
        logits = _wide(hidden) @ few.T  # (B, U)
        example = layout.token_option // layout.present.shape[1]
        picked = logits[example.to(logits.device), column.to(logits.device)]  # (T,), in the order of ``present``
        scores = picked.new_full(layout.present.shape, -torch.inf)
        return scores.masked_scatter(layout.present.to(logits.device), picked)

    def _lay_out(self, batch: Sequence[Encoded]) -> Layout:
        layout = lay_out(batch, self.pad_id)
        if self._longest is not None and layout.input_ids.shape[1] > self._longest:
            raise DataError(
                f"an example is {layout.input_ids.shape[1]} tokens long and the model reads {self._longest}. "
                f"Encode with max_length {self._longest} or less."
            )
        return layout


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: what follows takes differences of large numbers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
