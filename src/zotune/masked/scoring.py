"""How likely a masked model finds each label's word at the mask: scores for evaluation, and the loss that trains on them.

Only the mask's hidden state goes through the output head, where body and head can be called apart; whether that is the
same is tried once, as for causal models.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import ConfigError, DataError, ModelError
from zotune.tasks.encoding import Encoded
from zotune.tasks.logits import lowered

HEADS = ("lm_head", "cls")
"""What most masked models of transformers call the module from hidden states to logits."""


class MaskedScorer:
    """Scores the words at the mask, under whatever gradient and train/eval mode the caller has set.

    Results do not depend on padding or on what else is in the batch, but for rounding. They are fp32 (fp64 for an fp64
    model) from the logits on, whatever the forward's dtype.

    Attributes:
        source_reason: how the model is asked for logits, and why.
        loss_reason: how `loss` is computed.
    """

    def __init__(
        self, model: nn.Module, *, mask_id: int, pad_id: int | None = None, autocast: torch.dtype | None = None
    ) -> None:
        """Look at the model once, with a few forward passes over four tokens.

        Args:
            model: a masked language model of transformers, with or without LoRA adapters.
            mask_id: the mask token; each text holds it once.
            pad_id: the padding token; None takes the configuration's, else 0.
            autocast: dtype of the matrix products of the model's body, or None for that of the weights.

        Raises:
            ModelError: the model returns no logits, or is causal.
            ConfigError: autocast is not a lower-precision floating dtype.
        """
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast}.")
        config: Any = getattr(model, "config", None)
        known = getattr(config, "pad_token_id", None) if pad_id is None else pad_id
        self.model = model
        self.mask_id = mask_id
        self.pad_id = 0 if known is None else int(known)
        self.autocast = autocast
        self.longest = _longest(model)
        whole = self._trial(lambda ids: _logits(model, ids))
        self._refuse_causal(whole)
        self._body, self._head, self.source_reason = self._apart(whole)
        self.loss_reason = "the words' logits at the mask: the normaliser cancels between words of one token"

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the model's first parameter."""
        return next(self.model.parameters()).device

    def scores(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the log-probability of each word at the mask: (B, K), K the most words, -inf where fewer.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        logits = self._mask_logits(batch)
        return _pick(logits - logits.logsumexp(1, keepdim=True), batch)

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the mean over examples of the cross entropy of the right word among the words: a scalar.

        Raises:
            DataError: the batch is empty, malformed, or longer than the model can read.
        """
        few = _pick(self._mask_logits(batch), batch)
        labels = torch.tensor([example.label for example in batch], device=few.device)
        return nn.functional.cross_entropy(few, labels)

    def hidden(self, batch: Sequence[Encoded]) -> Tensor:
        """Return the body's last hidden states at the masks: (B, d).

        Raises:
            ModelError: the model does not let its body be called apart.
        """
        if self._body is None:
            raise ModelError(f"{type(self.model).__name__} gives no hidden states: {self.source_reason}.")
        ids, mask, position = self._lay_out(batch)
        with lowered(self.device, self.autocast):
            states: Tensor = self._body(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[torch.arange(len(batch), device=states.device), position]

    def _mask_logits(self, batch: Sequence[Encoded]) -> Tensor:
        """Logits (B, V) at the masks, fp32 or better."""
        if self._head is not None:
            hidden = self.hidden(batch)
            logits: Tensor = self._head(hidden.to(next(self._head.parameters()).dtype))
        else:
            ids, mask, position = self._lay_out(batch)
            with lowered(self.device, self.autocast):
                whole: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
            logits = whole[torch.arange(len(batch), device=whole.device), position]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _lay_out(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S) token ids padded on the right, (B, S) attention mask, (B,) positions of the masks."""
        _check(batch, self.mask_id, self.longest)
        width = max(len(example.prompt_ids) for example in batch)
        ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for number, example in enumerate(batch):
            ids[number, : len(example.prompt_ids)] = torch.tensor(example.prompt_ids)
            mask[number, : len(example.prompt_ids)] = 1
        positions = torch.tensor([example.prompt_ids.index(self.mask_id) for example in batch])
        return ids.to(self.device), mask.to(self.device), positions.to(self.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Looking at the model, once

    def _apart(self, whole: Tensor) -> tuple[nn.Module | None, nn.Module | None, str]:
        wrapped: Any = self.model
        inner = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped  # out of a PEFT wrapper
        body = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
        head = next((getattr(inner, name) for name in HEADS if isinstance(getattr(inner, name, None), nn.Module)), None)
        if not isinstance(body, nn.Module) or head is None:
            return None, None, "the model as a whole: it does not name its body and its head"
        made: Tensor = self._trial(lambda ids: head(_states(body, ids)))
        # the same computation but for the dispatch: a few units of the dtype
        if (
            made.shape != whole.shape
            or (made - whole).abs().max() > 4 * torch.finfo(made.dtype).eps * whole.abs().max()
        ):
            return None, None, "the model as a whole: body and head called apart give other logits"
        return body, head, "body and head apart, the head at the masks only: the same logits on a trial input"

    def _refuse_causal(self, whole: Tensor) -> None:
        other = self._trial(lambda ids: _logits(self.model, ids), last=0)
        if torch.equal(other[:, 0], whole[:, 0]):
            raise ModelError(
                f"{type(self.model).__name__} is causal: a later token changes nothing before it, so a mask sees only "
                "what is before it. Use OptionScorer."
            )

    def _trial(self, ask: Callable[[Tensor], Tensor], last: int = 7) -> Tensor:
        """Ask about four tokens. Dropout may be on: generators go back after each question, so all have the same draws."""
        ids = torch.tensor([[4, 5, 6, last]], device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            return ask(ids)


def _pick(values: Tensor, batch: Sequence[Encoded]) -> Tensor:
    """Of (B, V) those of each example's words: (B, K), -inf where there are fewer than K."""
    width = max(len(example.option_ids) for example in batch)
    ids = torch.tensor(
        [[*(o[0] for o in e.option_ids), *[0] * (width - len(e.option_ids))] for e in batch], device=values.device
    )
    present = torch.tensor([[k < len(e.option_ids) for k in range(width)] for e in batch], device=values.device)
    return values.gather(1, ids).masked_fill(~present, -torch.inf)


def _states(body: nn.Module, ids: Tensor) -> Tensor:
    states: Tensor = body(input_ids=ids).last_hidden_state
    return states


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = getattr(model(input_ids=ids), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{type(model).__name__} returns no logits; a masked language model is needed.")
    return logits


def _longest(model: nn.Module) -> int | None:
    """How many tokens the model can read. RoBERTa counts positions from behind its padding token's."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions


def _check(batch: Sequence[Encoded], mask_id: int, longest: int | None) -> None:
    if not batch:
        raise DataError("the batch is empty; at least one example is needed.")
    for number, example in enumerate(batch):
        tokens, words = len(example.prompt_ids), [len(option) for option in example.option_ids]
        if example.prompt_ids.count(mask_id) != 1 or set(words) != {1} or not 0 <= example.label < len(words):
            raise DataError(
                f"example {number} of the batch has {example.prompt_ids.count(mask_id)} masks, words of {words} tokens and "
                f"label {example.label}; needed are one mask, words of one token, and one of them as the label. Encode "
                "with encode_masked."
            )
        if longest is not None and tokens > longest:
            raise DataError(
                f"example {number} of the batch is {tokens} tokens long and the model reads {longest}. "
                f"Encode with max_length {longest} or less."
            )
