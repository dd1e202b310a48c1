"""zotune inside the Hugging Face libraries: forward-only twins of transformers' and TRL's trainers.

Names are loaded when they are first used, so that importing this package needs none of the libraries; a missing one is
an error that names the extra which brings it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.hf.arguments import ZOArguments
    from zotune.hf.mixin import ZOMixin
    from zotune.hf.settings import ZOSettings
    from zotune.hf.trainer import ZOTrainer
    from zotune.hf.trl import ZODPOConfig, ZODPOTrainer, ZOSFTConfig, ZOSFTTrainer

_HOMES = {
    "ZOArguments": "arguments",
    "ZODPOConfig": "trl",
    "ZODPOTrainer": "trl",
    "ZOMixin": "mixin",
    "ZOSFTConfig": "trl",
    "ZOSFTTrainer": "trl",
    "ZOSettings": "settings",
    "ZOTrainer": "trainer",
}

__all__ = [
    "ZOArguments",
    "ZODPOConfig",
    "ZODPOTrainer",
    "ZOMixin",
    "ZOSFTConfig",
    "ZOSFTTrainer",
    "ZOSettings",
    "ZOTrainer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"zotune.hf.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zotune.hf' has no attribute {name!r}")
