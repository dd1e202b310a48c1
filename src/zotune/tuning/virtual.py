"""Virtual tokens that are learned: a prefix (keys and values in every layer) or a prompt (embeddings before the input).

Both start as tokens of the vocabulary, drawn by the seed, would have looked: the model with its fresh prefix or prompt is
the model that has read those tokens. MeZO finds this start essential for zeroth-order tuning; attaching checks it.

The trained numbers are fp32 whatever the model's dtype (PEFT casts them to it at each forward).
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.core.noise import stream, uniform
from zotune.errors import ModelError
from zotune.extras import require
from zotune.tasks.module_modes import eval_mode
from zotune.tuning.base import BaseMode, is_masked_lm, refuse_adapters, without_peft_warning

TRIAL = 3  # tokens that the check of the start reads after the virtual ones
TOLERANCE = 0.3
"""Of the check, as a share of what the tokens change: bf16 logits of small models round by a tenth of it, and a prefix
in the wrong place is off by about as much as no prefix."""


@dataclass(frozen=True)
class _Virtual(BaseMode):
    """What prefix and prompt share."""

    tokens: int

    def __post_init__(self) -> None:
        """Check the range."""
        self.check("tokens", isinstance(self.tokens, int) and self.tokens >= 1, "a whole number, at least 1")

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`. The start is a function of the model and `seed`; torch's generators are left as they were."""
        peft = require("peft", extra="hf", purpose=f"learn a {self.name}")
        refuse_adapters(model, self.name)
        self._refuse_unfit(model)
        ids = random_tokens(model, self.tokens, seed, self.name)
        with torch.no_grad(), _steady(model), torch.random.fork_rng(), without_peft_warning():
            expected, without = self._trial(model, ids), self._trial(model, ids[:, :0])
            start = self._start(model, ids)
            try:
                adapted = peft.get_peft_model(model, self._settings(peft, model)).eval()
                weight = adapted.prompt_encoder["default"].embedding.weight
                weight.copy_(start.reshape(weight.shape))
                found = self._trial(adapted, ids[:, :0])
            except Exception as error:  # PEFT and the model each raise their own kinds
                raise ModelError(
                    f"a {self.name} cannot be put before {type(model).__name__}: {error} Choose mode 'lora'."
                ) from error
            _check_start(self.name, type(model).__name__, found, expected, without)
        return adapted

    @abstractmethod
    def _settings(self, peft: Any, model: Any) -> Any:
        """PEFT's configuration."""

    @abstractmethod
    def _start(self, model: Any, ids: Tensor) -> Tensor:
        """The values to start from, (tokens, numbers per token), from token ids (1, tokens)."""

    def _refuse_unfit(self, model: Any) -> None:
        if is_masked_lm(model):
            raise ModelError(
                f"mode {self.name!r} works with causal models, and {type(model).__name__} fills in masks. Choose mode "
                "'lora', 'head' or 'norm_bias'."
            )
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.tokens + TRIAL > limit:
            raise ModelError(f"{self.tokens} virtual tokens do not fit into the {limit} positions of this model.")

    def _trial(self, model: Any, before: Tensor) -> Tensor:
        """Logits (V,) after reading `before` (1, n) and a few fixed tokens."""
        ids = torch.cat([before, torch.arange(TRIAL, device=before.device)[None]], dim=1)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
        return logits.float()


@dataclass(frozen=True)
class Prefix(_Virtual):
    """Keys and values of `tokens` positions before the input in every layer (Li and Liang 2021), not re-parameterised."""

    tokens: int = 5

    name: ClassVar[str] = "prefix"
    lr: ClassVar[float] = 1e-2
    eps: ClassVar[float | None] = 1e-1
    source: ClassVar[str] = "MeZO's for prefix tuning of OPT, Table 16 (lr 1e-2 or 1e-3)"

    def _settings(self, peft: Any, model: Any) -> Any:
        return peft.PrefixTuningConfig(num_virtual_tokens=self.tokens, prefix_projection=False, task_type="CAUSAL_LM")

    def _start(self, model: Any, ids: Tensor) -> Tensor:
        """The model's own key and value cache, in the order in which PEFT reads it: (tokens, layers * 2 * heads * size)."""
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
            raise ModelError(
                f"{type(model).__name__} keeps no keys and values of what it has read, so it can have no prefix. "
                "Choose mode 'prompt' or 'lora'."
            )
        shapes = {tuple(states.shape) for layer in layers for states in (layer.keys, layer.values)}
        if len(shapes) > 1 or next(iter(shapes))[2] != self.tokens:
            raise ModelError(
                f"the layers of {type(model).__name__} keep keys and values of different shapes ({sorted(shapes)}) or "
                f"fewer than {self.tokens} positions, which a prefix cannot hold. Choose mode 'prompt' or 'lora'."
            )
        states = torch.stack([states[0] for layer in layers for states in (layer.keys, layer.values)])
        return states.permute(2, 0, 1, 3).float()  # (layers * 2, heads, tokens, size) -> tokens first


@dataclass(frozen=True)
class Prompt(_Virtual):
    """Embeddings of `tokens` positions before the input (Lester et al. 2021)."""

    tokens: int = 10

    name: ClassVar[str] = "prompt"
    lr: ClassVar[float] = 1e-3
    eps: ClassVar[float | None] = 1e-2
    source: ClassVar[str] = (
        "SubZero's for prompt tuning of OPT-1.3B (arXiv 2410.08989), within ZO-Bench's grid (2402.11592)"
    )

    def _settings(self, peft: Any, model: Any) -> Any:
        return peft.PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="RANDOM",  # what PEFT draws is overwritten
            token_dim=model.get_input_embeddings().embedding_dim,  # not the hidden size: OPT-350m projects
            task_type="CAUSAL_LM",
        )

    def _start(self, model: Any, ids: Tensor) -> Tensor:
        """What the embedding module gives for the tokens (some scale their rows): (tokens, embedding size)."""
        embedded: Tensor = model.get_input_embeddings()(ids)[0]
        return embedded.float()


def random_tokens(model: Any, count: int, seed: int, purpose: str) -> Tensor:
    """Token ids (1, count) of the vocabulary, a function of the seed alone; no generator is used."""
    embedding = model.get_input_embeddings()
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size = min(embedding.weight.shape[0], config.vocab_size)
    drawn = [int(uniform(stream(seed, "mode", purpose, number), 0, size)) for number in range(count)]
    return torch.tensor([drawn], device=embedding.weight.device)


def _check_start(mode: str, model: str, found: Tensor, expected: Tensor, without: Tensor) -> None:
    """The adapted model must be the model that has read the tokens, but for rounding in its dtype."""
    error, influence = (float((other - expected).abs().max()) for other in (found, without))
    if not error <= TOLERANCE * influence:
        raise ModelError(
            f"a fresh {mode} before {model} does not act as the tokens that it was made of: its logits are off by "
            f"{error:.3g}, where reading the tokens changes them by {influence:.3g}. PEFT does not know this "
            "architecture well enough; choose mode 'lora'."
        )


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Dropout off and one thread: keys and values get the same bits whatever the number of threads, as a replay needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with eval_mode(model):
            yield
    finally:
        torch.set_num_threads(threads)
