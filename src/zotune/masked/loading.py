"""Load a masked language model and its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from zotune.cache import Say, silent
from zotune.errors import ModelError
from zotune.extras import require


def load_masked(name: str, *, dtype: torch.dtype | None = None, say: Say = silent) -> tuple[Any, Any]:
    """Load a masked language model for forward passes.

    Args:
        name: a hub id (``"FacebookAI/roberta-large"``) or a local folder of a model.
        dtype: of the weights; None keeps what the files hold.
        say: receives progress lines.

    Returns:
        (model, tokenizer) of transformers, the model in eval mode.

    Raises:
        ModelError: it cannot be loaded, is no masked language model, or its tokenizer has no mask or padding token.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="hf", purpose="load language models")
    path = Path(name).expanduser()
    say(f"loading {name} as a masked language model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
        model = transformers.AutoModelForMaskedLM.from_pretrained(
            str(path) if path.is_dir() else name, dtype=dtype or "auto"
        )
    except Exception as error:  # the hub client, the file readers and transformers each raise their own kinds
        raise ModelError(
            f"the masked language model {name!r} cannot be loaded: {error}\nNeeded is a hub id that this machine can "
            "reach or a folder with config, weights and tokenizer of a model such as RoBERTa or BERT."
        ) from error
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise ModelError(f"the tokenizer of {name!r} has no {kind} token; a masked language model's has one.")
    return model.eval(), tokenizer
