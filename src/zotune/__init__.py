"""zotune: fine-tune large language models with forward passes only."""

from zotune.core.errors import (
    ClosureError,
    ConfigError,
    DataError,
    EngineError,
    LedgerError,
    MissingExtraError,
    ModelError,
    ParameterError,
    ZotuneError,
)
from zotune.core.ledger import Ledger, read_ledger
from zotune.optimizer import ZO
from zotune.replay import replay
from zotune.version import __version__

__all__ = [
    "ZO",
    "ClosureError",
    "ConfigError",
    "DataError",
    "EngineError",
    "Ledger",
    "LedgerError",
    "MissingExtraError",
    "ModelError",
    "ParameterError",
    "ZotuneError",
    "__version__",
    "read_ledger",
    "replay",
]
