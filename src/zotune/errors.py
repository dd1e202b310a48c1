"""Every error zotune raises on purpose: what was given, what is needed, why, and what to do."""


class ZotuneError(Exception):
    """Base of all errors that zotune raises on purpose."""


class ConfigError(ZotuneError, ValueError):
    """A setting is out of range, unknown, or does not go with another one."""


class ParameterError(ZotuneError, ValueError):
    """The parameters handed over cannot be trained: none, packed, or not named apart."""


class ClosureError(ZotuneError, RuntimeError):
    """The closure does not answer as a loss must: one finite number that depends on the weights."""


class EngineError(ZotuneError, RuntimeError):
    """An engine cannot keep its promise for this model and closure."""


class StateError(ZotuneError, RuntimeError):
    """An optimizer's weights stand between two steps: what moved them broke off half-way."""


class LedgerError(ZotuneError, ValueError):
    """A ledger does not belong to this model or run, or it is damaged before its last line."""


class ModelError(ZotuneError, ValueError):
    """A model cannot be found, fetched, verified or loaded."""


class DataError(ZotuneError, ValueError):
    """A task, a row, or a label cannot be used."""


class MissingExtraError(ZotuneError, ImportError):
    """An optional library is needed; the message names the extra that brings it."""


class FinetunerError(ZotuneError, ValueError):
    """A file or folder of networks cannot be read, is not what it should be, or belongs to another model."""


class KernelError(ZotuneError, RuntimeError):
    """The kernels that were asked for cannot be had."""
