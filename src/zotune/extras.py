"""Optional libraries: imported where they are used, with an error that names the extra that brings them."""

import importlib
from typing import Any

from zotune.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional library and return its module.

    Args:
        module: what to import, for example ``"transformers"``.
        extra: the extra of zotune that brings it, for example ``"hf"``.
        purpose: what it is needed for, as the end of the sentence "... is needed to".

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed to {purpose}, and it cannot be imported ({error}). "
            f'Install it with: pip install "zotune[{extra}]"'
        ) from error
