"""Where the predictions come from: the model's body and head apart where that is the same, else the model as a whole.

Apart, only the hidden states that are asked for go through the output matrix. On SmolLM2 (49,152 tokens) all positions
of a batch cost as much again as half the body. Whether apart is the same is tried once, on four tokens: wrappers that
feed the model something more (prefix and prompt tuning) or change its logits (soft-capping, scaling) go as a whole.

Under autocast only the body runs in low precision. The head keeps the dtype of its weights: rounding logits to bf16
(steps of 1/16 at 16) doubles the error of the difference between two options (rms 0.051 against 0.024, SmolLM2 on
SST-2), and for the few rows asked for, casting the matrix costs more than it saves.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotune.errors import ModelError
from zotune.tasks.head import TokenLogProbability, wide
from zotune.tasks.layout import Layout
from zotune.tasks.packed import visible

LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Settings of a model's configuration by which its logits are not simply the head's output."""


class LogitSource(Protocol):
    """Answers with the logits at the queries of a layout."""

    def logits(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the logits (Q, V) at the layout's queries."""
        ...

    def read_on(self, ids: Tensor, cache: Any, row: Tensor, position: Tensor) -> tuple[Tensor, Any]:
        """Read ids (R, S) after what a key-value cache holds (None: nothing); logits (Q, V) at places, and the cache."""
        ...


class BodyAndHead:
    """The decoder and the output matrix, called one after the other; only the first under autocast."""

    def __init__(self, body: nn.Module, head: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.body = body
        self.head = head
        self.autocast = autocast

    def hidden(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the last hidden states (Q, d) at the layout's queries."""
        extra: dict[str, Tensor] = {}
        if layout.ends is not None and layout.position_ids is not None:
            dtype = next(self.body.parameters()).dtype
            extra["attention_mask"] = visible(layout.ends.to(device), dtype)
            extra["position_ids"] = layout.position_ids.to(device)
        with lowered(device, self.autocast):
            states = _body_states(self.body, layout.input_ids.to(device), **extra)
        # a gathered copy: a strided slice takes a batched matrix path in the head, at ten times the cost of all logits
        return states[layout.query_row.to(states.device), layout.query_position.to(states.device)]

    def logits(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the logits (Q, V) at the layout's queries."""
        return self._through_head(self.hidden(layout, device))

    def read_on(self, ids: Tensor, cache: Any, row: Tensor, position: Tensor) -> tuple[Tensor, Any]:
        """See ``LogitSource.read_on``."""
        with lowered(ids.device, self.autocast):
            output = self.body(input_ids=ids, past_key_values=cache, use_cache=True)
        return self._through_head(output.last_hidden_state[row, position]), output.past_key_values

    def _through_head(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return logits


class WholeModel:
    """The model as it is, asked for few positions if it takes ``logits_to_keep``."""

    def __init__(self, model: nn.Module, virtual_tokens: int, keeps: bool, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast = autocast
        self.virtual_tokens = virtual_tokens  # that the model puts before the input and returns logits for
        self.keeps = keeps

    def logits(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the logits (Q, V) at the layout's queries."""
        positions = layout.query_position + self.virtual_tokens
        extra: dict[str, Tensor] = {}
        if self.keeps:
            kept, positions = torch.unique(positions, return_inverse=True)
            extra["logits_to_keep"] = kept.to(device)
        with lowered(device, self.autocast):
            logits: Tensor = self.model(input_ids=layout.input_ids.to(device), use_cache=False, **extra).logits
        return logits[layout.query_row.to(logits.device), positions.to(logits.device)]

    def read_on(self, ids: Tensor, cache: Any, row: Tensor, position: Tensor) -> tuple[Tensor, Any]:
        """See ``LogitSource.read_on``."""
        with lowered(ids.device, self.autocast):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        start = 0 if cache is not None else self.virtual_tokens
        return output.logits[row, start + position], output.past_key_values


def find_logit_source(
    model: nn.Module, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[LogitSource, str]:
    """Choose how to ask this model for logits, by trying on four tokens.

    Args:
        model: a causal language model.
        device: where its inputs go.
        autocast: dtype of the matrix products of the forward pass, or None for that of the weights.

    Returns:
        the source, and the reason it was chosen.

    Raises:
        ModelError: this is no causal language model.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("this is an encoder-decoder model; options are scored by causal (decoder-only) models.")
    logits = _probe(lambda ids: _whole_logits(model, ids), device)
    _check_causal(model, logits, device)
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped  # out of a PEFT wrapper
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    whole = WholeModel(model, logits.shape[1] - 4, keeps, autocast)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return whole, "the model as a whole: a prompt or prefix is learned in front of the input"
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if changes := [name for name in LOGIT_CHANGES if getattr(text_config, name, None) not in (None, 1, 1.0)]:
        return whole, f"the model as a whole: its configuration sets {changes[0]}"
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(body, nn.Module) or body is inner or not isinstance(head, nn.Module):
        return whole, "the model as a whole: it does not name its body and its head"
    apart = _probe(lambda ids: head(_body_states(body, ids)), device)
    if apart.shape != logits.shape or not _agree(apart, logits):
        return whole, "the model as a whole: body and head called apart give other logits"
    return BodyAndHead(body, head, autocast), "body and head apart: the same logits on a trial input"


def shared_rows(source: LogitSource, device: torch.device) -> tuple[nn.Embedding | None, str]:
    """Return a module that looks up rows of the head's matrix, sharing its Parameter, if the head is no more than that.

    It is a module of its own, and is called as one, because engines perturb weights when a module is called.

    Returns:
        the module or None, and the reason.
    """
    if not isinstance(source, BodyAndHead):
        return None, "full logits: the head cannot be called apart"
    head = source.head
    if type(head) is not nn.Linear or head.bias is not None:  # a subclass (adapters, parametrisations) computes more
        return None, "full logits: the head is not a plain linear map without bias"
    if head.weight.is_meta or hasattr(head, "_hf_hook"):
        return None, "full logits: the head's weight is kept elsewhere and brought for each call"
    rows = nn.Embedding(head.out_features, head.in_features, device="meta")  # meta: allocates and draws nothing
    rows.weight = head.weight
    states = _probe(lambda ids: _body_states(source.body, ids), device)[0]
    ids = torch.arange(4, device=head.weight.device)
    full, few = _detached(lambda: head(states)[:, :4]), _detached(lambda: states @ rows(ids).T)
    if not _agree(full, few, size=float((states.abs() @ head.weight.detach()[:4].abs().T).max())):
        return None, "full logits: rows of the head's matrix give other logits on a trial input"
    return rows, "only the options' rows of the head: the normaliser cancels between options of one token"


def head_in_pieces(source: LogitSource, device: torch.device) -> TokenLogProbability | None:
    """Return what gives log-probabilities without the matrix of logits, if the head is a linear map and no more."""
    head = source.head if isinstance(source, BodyAndHead) else None
    if type(head) is not nn.Linear or head.weight.is_meta or hasattr(head, "_hf_hook"):
        return None  # see `shared_rows`
    made = TokenLogProbability(head)
    states = torch.linspace(-1, 1, 2 * head.in_features, device=device).view(2, -1).to(head.weight.dtype)
    query, token = (torch.tensor(numbers, device=device) for numbers in ([0, 1, 1], [0, 3, head.out_features - 1]))
    full = _detached(lambda: head(states))
    few = _detached(lambda: made((states, query, token)))
    predicted = wide(full).log_softmax(-1)[query, token]
    size = float(full.abs().max()) + float(predicted.abs().max())
    return made if (predicted - few).abs().max() <= 4 * torch.finfo(full.dtype).eps * size else None


def lowered(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast, if asked for. Its cache of cast weights is off: weights move between two calls of a closure."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(device.type, autocast, cache_enabled=False)


def _body_states(body: nn.Module, ids: Tensor, **extra: Tensor) -> Tensor:
    states: Tensor = body(input_ids=ids, use_cache=False, **extra).last_hidden_state
    return states


def _whole_logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{type(model).__name__} returns no logits; a causal language model is needed.")
    return logits


def _check_causal(model: nn.Module, logits: Tensor, device: torch.device) -> None:
    """Another last token must leave the logits before it alone."""
    other = _probe(lambda ids: _whole_logits(model, ids), device, last=0)
    if not _agree(logits[:, :-1], other[:, :-1]):
        raise ModelError(
            f"{type(model).__name__} is not causal: a later token changes the logits before it, so they do not "
            "predict the next token. Options are scored by causal language models."
        )


def _probe(ask: Callable[[Tensor], Tensor], device: torch.device, last: int = 3) -> Tensor:
    """Ask about four tokens. Dropout may be on: generators go back after each question, so all have the same draws."""
    ids = torch.tensor([[0, 1, 2, last]], device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        return ask(ids)


def _detached(compute: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return compute()


def _agree(left: Tensor, right: Tensor, size: float = 0.0) -> bool:
    """Equal but for rounding: a few units of the dtype, and of fp32 sums whose terms' sizes add up to ``size``."""
    unit = torch.finfo(left.dtype).eps
    allowed = 4 * unit * float(left.abs().max()) + 64 * torch.finfo(torch.float32).eps * size
    return bool((left - right).abs().max() <= allowed)
