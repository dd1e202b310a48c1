"""A fine-tuner's folder: networks.safetensors (w1, b1, w2, b2) and finetuner.json (names, and where they come from)."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zotune.core.site import canonical_name
from zotune.errors import FinetunerError
from zotune.extras import require
from zotune.finetuner.networks import FEATURES, Networks

FORMAT = 1
ARRAYS, FACTS = "networks.safetensors", "finetuner.json"
SHAPE = {"features": list(FEATURES), "act": "tanh", "out": "abs"}  # what the arrays mean; another meaning is refused


def save_folder(
    folder: str | Path, networks: Networks, facts: dict[str, Any], beside: Mapping[str, str] | None = None
) -> None:
    """Write a new folder, whole or not at all.

    Args:
        folder: must not exist.
        networks: the networks.
        facts: what else to keep: where the networks come from, eps, B, world size (JSON values).
        beside: further text files by name, for people; nothing reads them.

    Raises:
        FinetunerError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FinetunerError(f"{folder} exists already; name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    save_file = require("safetensors.torch", extra="hf", purpose="save fine-tuners").save_file
    header = {"format": FORMAT, **SHAPE, "digest": networks.digest()}
    try:
        save_file(networks.arrays, temporary / ARRAYS)
        text = json.dumps({**header, **facts, "names": list(networks.names)}, indent=1)
        (temporary / FACTS).write_text(text + "\n", encoding="utf-8")
        for name, content in (beside or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner alone
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_folder(folder: str | Path) -> tuple[Networks, dict[str, Any]]:
    """The networks of a folder, and its facts.

    Raises:
        FinetunerError: no such folder, another format, or damaged.
    """
    folder = Path(folder)
    load_file = require("safetensors.torch", extra="hf", purpose="load fine-tuners").load_file
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
    except Exception as error:  # the readers raise kinds of their own
        raise FinetunerError(
            f"{folder} holds no fine-tuner that can be read ({error}). Needed are {FACTS} and {ARRAYS}; "
            "`zotune import-finetuner FILE --out FOLDER` makes them from a released file, `zotune learn` trains them."
        ) from error
    meaning = {key: facts.get(key) for key in ("format", *SHAPE)} if isinstance(facts, dict) else facts
    if meaning != {"format": FORMAT, **SHAPE}:
        raise FinetunerError(f"{folder / FACTS} describes other networks than this version knows: {meaning}.")
    if set(arrays) != {"w1", "b1", "w2", "b2"} or not isinstance(facts.get("names"), list):
        raise FinetunerError(f"{folder} must hold w1, b1, w2, b2 and a list of names; it holds {sorted(arrays)}.")
    networks = Networks(tuple(canonical_name(str(name)) for name in facts["names"]), **arrays)
    if networks.digest() != facts.get("digest"):
        raise FinetunerError(
            f"{folder} is damaged or was changed by hand: its networks hash to {networks.digest()}, {FACTS} says "
            f"{facts.get('digest')}. Make it again."
        )
    return networks, facts
