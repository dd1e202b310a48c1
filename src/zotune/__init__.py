"""zotune: fine-tune large language models with forward passes only.

Names are loaded when they are first used, so that the command line answers before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from zotune.version import __version__

if TYPE_CHECKING:
    from zotune.core.ledger import Ledger, LedgerFile, read_ledger
    from zotune.errors import ClosureError, ConfigError, EngineError, LedgerError, ParameterError, ZotuneError
    from zotune.methods import METHODS
    from zotune.methods.mezo import MeZO
    from zotune.optim.optimizer import ZO
    from zotune.optim.replaying import optimizer_for, replay
    from zotune.rules import RULES

__all__ = [
    "METHODS",
    "RULES",
    "ZO",
    "ClosureError",
    "ConfigError",
    "EngineError",
    "Ledger",
    "LedgerError",
    "LedgerFile",
    "MeZO",
    "ParameterError",
    "ZotuneError",
    "__version__",
    "optimizer_for",
    "read_ledger",
    "replay",
]

_HOMES = {
    "zotune.core.ledger": ("Ledger", "LedgerFile", "read_ledger"),
    "zotune.errors": ("ClosureError", "ConfigError", "EngineError", "LedgerError", "ParameterError", "ZotuneError"),
    "zotune.methods": ("METHODS",),
    "zotune.methods.mezo": ("MeZO",),
    "zotune.optim.optimizer": ("ZO",),
    "zotune.optim.replaying": ("optimizer_for", "replay"),
    "zotune.rules": ("RULES",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(home), name)
            return value
    raise AttributeError(f"module 'zotune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
