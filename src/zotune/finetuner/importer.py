"""Read released fine-tuners without running what they say.

They are pickled dicts of tensor name -> nn.Sequential(Linear(5, 64), Tanh, Linear(64, 1)), in torch's zip format. A pickle
can name any function to be called on loading. Here torch's restricted reader is allowed three classes of modules and `set`
beside its tensors, and of what it returns the tensors are taken out and nothing is called.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.site import canonical_name
from zotune.errors import FinetunerError
from zotune.finetuner.networks import FEATURES, HIDDEN, Networks

ALLOWED: list[Any] = [nn.Linear, nn.Sequential, nn.Tanh, set]
_LAYERS = [nn.Linear, nn.Tanh, nn.Linear]
_SHAPES = {
    "0.weight": (HIDDEN, len(FEATURES)),
    "0.bias": (HIDDEN,),
    "2.weight": (1, HIDDEN),
    "2.bias": (1,),
}
_WHAT = "A released fine-tuner is a dict of tensor name -> Sequential(Linear(5, 64), Tanh, Linear(64, 1))"


def read_released(path: str | Path) -> tuple[Networks, dict[str, Any]]:
    """The networks of a released file, in its order and dtype, and facts about the file.

    Raises:
        FinetunerError: no such file, one that would run or hold anything else than networks, or damaged networks.
    """
    path = Path(path)
    if not path.is_file():
        raise FinetunerError(f"There is no file {path}. Give the path of a released .pth file.")
    held = _load(path)
    if not (isinstance(held, Mapping) and held and all(isinstance(name, str) for name in held)):
        raise FinetunerError(f"{path} holds a {type(held).__name__}, not networks by name. {_WHAT}.")
    parts = [_tensors(path, name, network) for name, network in held.items()]
    dtypes = {tensor.dtype for network in parts for tensor in network}
    if len(dtypes) > 1:
        raise FinetunerError(f"{path} holds networks of several dtypes: {', '.join(sorted(map(str, dtypes)))}.")
    w1, b1, w2, b2 = (torch.stack(same) for same in zip(*parts, strict=True))
    networks = Networks(
        tuple(canonical_name(name) for name in held), w1, b1, w2[:, 0].contiguous(), b2[:, 0].contiguous()
    )
    facts = {
        "source": path.name,
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "source_dtype": str(w1.dtype).removeprefix("torch."),
    }
    return networks, facts


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file made by anybody can fail in any way
        raise FinetunerError(f"{path} is refused, and nothing in it was run. {_WHAT}; {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # reads the pickle, runs nothing
    except Exception:  # not a zip archive of torch's
        named = []
    if named:
        return f"this file also names {', '.join(sorted(named))}."
    said = str(error).strip().splitlines()
    return f"this file cannot be read as one: {said[0] if said else type(error).__name__}"


def _tensors(path: Path, name: str, network: Any) -> list[Tensor]:
    """The four tensors of one network, looked up in the modules' own dicts."""
    found = f"{path} has for {name!r}"
    if type(network) is not nn.Sequential:
        raise FinetunerError(f"{found} a {type(network).__name__}. {_WHAT}.")
    layers = list(vars(network).get("_modules", {}).values())
    if [type(layer) for layer in layers] != _LAYERS:
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise FinetunerError(f"{found} the layers {kinds or 'none'}. {_WHAT}.")
    tensors: dict[str, Any] = {
        f"{number}.{key}": vars(layers[number]).get("_parameters", {}).get(key)
        for number in (0, 2)
        for key in ("weight", "bias")
    }
    for key, needed in _SHAPES.items():
        if not isinstance(tensors[key], Tensor) or tuple(tensors[key].shape) != needed:
            shape = tuple(getattr(tensors[key], "shape", ()))
            raise FinetunerError(f"{found} {key} of shape {shape}, needed is {needed}. {_WHAT}.")
    return [tensors[key].detach() for key in _SHAPES]
