"""zotune: fine-tune large language models with forward passes only.

Names are loaded when they are first used, so that the command line answers before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from zotune.version import __version__

if TYPE_CHECKING:
    from zotune.core.ledger import Ledger, read_ledger
    from zotune.errors import ZotuneError
    from zotune.methods.mezo import MeZO
    from zotune.optimizer import ZO
    from zotune.replaying import replay

_HOMES = {
    "ZO": "zotune.optimizer",
    "Ledger": "zotune.core.ledger",
    "MeZO": "zotune.methods.mezo",
    "ZotuneError": "zotune.errors",
    "read_ledger": "zotune.core.ledger",
    "replay": "zotune.replaying",
}

__all__ = ["ZO", "Ledger", "MeZO", "ZotuneError", "__version__", "read_ledger", "replay"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zotune' has no attribute {name!r}")
