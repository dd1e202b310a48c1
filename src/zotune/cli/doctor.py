"""`zotune doctor`: what this machine offers, and what is off, and why."""

import importlib.metadata
import importlib.util
import os
import platform

import torch

from zotune.cache import cache_folder
from zotune.cli.console import console, facts_table
from zotune.errors import KernelError
from zotune.kernels.dispatch import choice_for
from zotune.kernels.native import NativeBackend
from zotune.packaged import ALIAS, packaged_model_place
from zotune.precision import choose_precision, native_bf16
from zotune.version import __version__

# library, the extra that brings it, what is off without it
OPTIONAL = (
    ("transformers", "hf", "language models"),
    ("accelerate", "hf", "loading GGUF files"),
    ("gguf", "demo", "the packaged model"),
    ("peft", "hf", "LoRA, prefix and prompt tuning"),
    ("datasets", "hf", "rows from the hub"),
    ("trl", "trl", "zotune.hf: SFT and DPO trainers"),
    ("lm_eval", "eval", "zotune evaluate --harness"),
    ("matplotlib", "plot", "curves of a run"),
)


def show_doctor() -> None:
    """Print versions, devices and features."""
    fetched = (packaged_model_place() / "config.json").is_file()
    facts = {
        "zotune": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} processors",
        "CPU bf16 products": "yes" if native_bf16() else "no: bf16 forwards would be slower than fp32 here",
        **_devices(),
        "precision 'auto' on the CPU": choose_precision("auto", torch.device("cpu")).reason,
        **_kernels(),
        "cache": f"{cache_folder()}{'' if cache_folder().is_dir() else ' (not made yet)'}",
        f"packaged model {ALIAS}": "converted" if fetched else "not fetched yet; the first run does it",
    }
    facts |= {library: _library(library, extra, purpose) for library, extra, purpose in OPTIONAL}
    console.print(facts_table(facts))


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device was found"
        return {"GPU": f"none: {why}"}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _kernels() -> dict[str, str]:
    """What makes the noise on each kind of device that is here, and why."""
    kinds = {"cpu": "noise on the CPU"} | ({"cuda": "noise on the GPU"} if torch.cuda.is_available() else {})
    found = {}
    for kind, name in kinds.items():
        try:
            choice = choice_for(kind)
            found[name] = choice.reason
            if isinstance(choice.backend, NativeBackend) and choice.backend.team(2) == torch.get_num_threads() == 2:
                found["two threads"] = _sharing(choice.backend.apart(), choice.backend.crossing())
        except KernelError as error:
            found[name] = f"off: {error}"
    return found


def _sharing(apart: bool, nanoseconds: float) -> str:
    """What the threads share, and what follows."""
    found = f"{nanoseconds:.0f} ns to read what the other wrote; looked at again and again in a run"
    if apart:
        return f"share no cache, so in fp32 each writes the matrix of a pair that it will read ({found})"
    return f"share a cache, so each writes half of both matrices of a pair ({found})"


def _library(name: str, extra: str, purpose: str) -> str:
    if importlib.util.find_spec(name) is None:
        return f'off: {purpose}. Install it with pip install "zotune[{extra}]"'
    return f"{importlib.metadata.version(name)}: {purpose}"
