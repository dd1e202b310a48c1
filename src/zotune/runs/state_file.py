"""A state (nested dicts and lists of tensors, numbers and words) as one safetensors file: nothing in it can run.

Tensors are stored as `0`, `1`, ...; the file's own header carries, as JSON, the tree that they hang in:

    {"format": "zotune state 1", "tree": {"weights": {"w": {"$tensor": 0}}, "optimizer": {"step": 3}}}

What JSON has no word for is an object with one key that begins with `$`: tensors, dicts whose keys are not words (torch
numbers parameters), tuples, and floats that are not finite. Floats read back exactly.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zotune.errors import DataError

FORMAT = "zotune state 1"
LEDGER = "Remove it: the ledger of the run beside it has every step."


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, whole or not at all: under a temporary name, to the disk, then renamed.

    Raises:
        DataError: something in it is neither tensor, number, word, None, dict, list nor tuple.
        OSError: the disk is full, or the like.
    """
    tensors = _Tensors()
    tree = json.dumps(_plain(state, tensors, path.name))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata={"format": FORMAT, "tree": tree})
    except SafetensorError as error:  # what the library makes of an OSError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_state(path: Path, remedy: str = LEDGER) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU, with the same types, dtypes and bits.

    Args:
        path: of the file.
        remedy: what to do if it is damaged, as a sentence.

    Raises:
        DataError: damaged, or not a state of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        if facts.get("format") != FORMAT:
            raise DataError(
                f"{path} is not a state of this version: its format is {facts.get('format')!r}, not {FORMAT!r}."
            )
        state: dict[str, Any] = _rich(json.loads(facts["tree"]), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error!r}). {remedy}") from error
    return state


class _Tensors(dict[str, Tensor]):
    """Tensors by number, each with memory of its own, as the format wants them."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: set[int] = set()

    def keep(self, tensor: Tensor) -> str:
        """Take in a tensor; its number."""
        key, whole = str(len(self)), tensor.contiguous()
        memory = whole.untyped_storage().data_ptr()
        self[key] = whole.clone() if memory in self._memories else whole
        self._memories.add(memory)
        return key


def _plain(value: Any, tensors: _Tensors, where: str) -> Any:
    """As JSON; tensors go into `tensors`."""
    if isinstance(value, Tensor):
        return {"$tensor": tensors.keep(value.detach())}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, tensors, f"{where}[{number}]") for number, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(key, _plain(item, tensors, f"{where}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[_plain(key, tensors, where), item] for key, item in pairs]}
    raise DataError(
        f"{where} is a {type(value).__name__}, which a state file cannot hold: it takes tensors, numbers, words, None, "
        "dicts, lists and tuples."
    )


def _rich(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_rich(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    key = next(iter(value), "")
    if key.startswith("$"):
        return _MARKED[key](value[key], tensors)
    return {name: _rich(item, tensors) for name, item in value.items()}


_MARKED: dict[str, Any] = {
    "$tensor": lambda number, tensors: tensors[number],
    "$float": lambda text, tensors: float(text),
    "$tuple": lambda items, tensors: tuple(_rich(item, tensors) for item in items),
    "$dict": lambda pairs, tensors: {_rich(key, tensors): _rich(item, tensors) for key, item in pairs},
}
