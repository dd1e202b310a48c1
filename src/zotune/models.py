"""Load a causal language model and its tokenizer: by hub id, local folder, GGUF file, or the packaged alias."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from zotune.cache import Say, silent
from zotune.errors import ModelError
from zotune.extras import require
from zotune.masked.loading import load_masked
from zotune.packaged import ALIAS, load_gguf, packaged_model_folder, without_bars
from zotune.tuning import without_peft_warning


def load_model(name: str, *, dtype: torch.dtype | None = None, say: Say = silent) -> tuple[Any, Any]:
    """Load a causal language model for forward passes.

    Args:
        name: a hub id (``"facebook/opt-1.3b"``), a local folder of a model or of a PEFT adapter, a ``.gguf`` file, or
            ``"smollm2-135m"``, the small model that a Python package brings (fetched and converted on first use).
        dtype: of the weights; None keeps what the files hold (GGUF files become fp32).
        say: receives progress lines where something slow happens once.

    Returns:
        (model, tokenizer) of transformers: the model in eval mode, without key-value cache, both with a padding token.

    Raises:
        ModelError: no such folder, file or hub model, or one that cannot be read.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="hf", purpose="load language models")
    path = Path(name).expanduser()
    if name == ALIAS:
        model, tokenizer = _load_folder(transformers, packaged_model_folder(say=say), dtype)
    elif path.suffix == ".gguf":
        model, tokenizer = load_gguf(_existing_file(path), dtype=dtype)
    elif (path / "adapter_config.json").is_file():
        model, tokenizer = _load_adapter(path, dtype, say)
    elif path.is_dir():
        # absolute: an adapter's files name its base model, and are read from other folders
        model, tokenizer = _load_folder(transformers, _model_folder(path.resolve()), dtype)
    else:
        model, tokenizer = _load_pretrained(transformers, _hub_id(name), dtype)
    _settle(model, tokenizer)
    return model, tokenizer


def load_any(
    name: str, *, dtype: torch.dtype | None = None, say: Say = silent
) -> tuple[Any, Any, Literal["causal", "masked"]]:
    """As `load_model`, for causal and masked language models alike; the third is which of them it is."""
    if is_masked(name):
        return (*load_masked(name, dtype=dtype, say=say), "masked")
    return (*load_model(name, dtype=dtype, say=say), "causal")


def is_masked(name: str) -> bool:
    """Whether this is a masked language model (RoBERTa, BERT), by the architecture that its configuration names.

    What cannot be looked up counts as causal: loading it says what is wrong.
    """
    path = Path(name).expanduser()
    if name == ALIAS or path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    transformers = require("transformers", extra="hf", purpose="load language models")
    try:
        config = transformers.AutoConfig.from_pretrained(str(path) if path.is_dir() else name)
    except Exception:  # no such model, no connection, a broken file: `load_model` has the words for it
        return False
    return any(kind.endswith("ForMaskedLM") for kind in config.architectures or ())


def _load_folder(transformers: Any, folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    with without_bars(transformers):
        return _load_pretrained(transformers, str(folder), dtype)


def _load_adapter(folder: Path, dtype: torch.dtype | None, say: Say) -> tuple[Any, Any]:
    """A PEFT adapter on its base model."""
    peft = require("peft", extra="hf", purpose="load adapters")
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder} holds an adapter, but its adapter_config.json names no base model.")
    model, tokenizer = load_model(base, dtype=dtype, say=say)
    with without_peft_warning():
        return peft.PeftModel.from_pretrained(model, str(folder)), tokenizer


def _load_pretrained(transformers: Any, name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except Exception as error:  # the hub client, the file readers and transformers each raise their own kinds
        raise ModelError(
            f"the model {name!r} cannot be loaded: {error}\nNeeded is a hub id that this machine can reach, a folder "
            f"with config, weights and tokenizer of a causal language model, a .gguf file, or {ALIAS!r}. Offline, only "
            "what was downloaded before can be loaded; gated models need `hf auth login` first."
        ) from error
    return model, tokenizer


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"there is no file {path}. Give the path of an existing .gguf file, or {ALIAS!r}.")
    return path


def _model_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {path} holds no model: config.json is missing. "
            "Give the folder that save_pretrained wrote for both model and tokenizer."
        )
    return path


def _hub_id(name: str) -> str:
    """Return ``name`` if it can be a hub id (``model`` or ``owner/model``); it is no existing folder at this point."""
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")) or "\\" in name:
        raise ModelError(
            f"there is no folder {name!r}, and it is not a hub id either (those read owner/model). "
            f"Check the path; {ALIAS!r} needs no path."
        )
    return name


def _settle(model: Any, tokenizer: Any) -> None:
    """Eval mode, no key-value cache, and a padding token where the model came without one."""
    model.eval()
    model.config.use_cache = False
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad
