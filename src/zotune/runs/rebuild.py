"""Rebuild a trained model from its base model and the run's ledger, and check it by hash."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.core.ledger import read_ledger, weights_hash
from zotune.core.site import canonical_name
from zotune.errors import ConfigError, LedgerError
from zotune.models import load_any
from zotune.optim.replaying import optimizer_for, replay
from zotune.runs.job import Listener
from zotune.runs.run_folder import save_model
from zotune.tuning import mode_of


def rebuild(base: str, ledger_path: Path, out: Path, listener: Listener) -> str:
    """Load the base model, replay the ledger on it, save the result, and say by hash whether it is the trained model.

    Raises:
        ConfigError: nothing can be written there.
        LedgerError: the ledger is damaged, was written for another base model, or the rebuilt weights differ.
        ModelError: the base model cannot be loaded.
    """
    ledger = read_ledger(ledger_path)
    if out.exists():
        raise LedgerError(f"{out} exists already; name a new folder with --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(f"{out.parent} cannot be written to")
    except OSError as error:  # before hours of replaying
        raise ConfigError(f"{out} cannot be made ({error}). Name another folder with --out.") from error
    origin = ledger.header.get("base") or {}
    try:
        dtype = getattr(torch, origin["dtype"]) if "dtype" in origin else None
        mode, seed = mode_of(origin.get("mode"))
        eps = float(ledger.header["groups"][0]["eps"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"The header of {ledger_path} has another shape than a run's ({error!r}).") from error
    listener.say(f"loading {base}")
    model, tokenizer, _ = load_any(base, dtype=dtype, say=listener.say)
    model = mode.attach(model, seed)
    named = [(canonical_name(name), tensor) for name, tensor in model.named_parameters()]
    trained = [(name, tensor) for name, tensor in named if tensor.requires_grad]
    _check_base(base, origin, "weights", trained)
    _check_base(base, origin, "frozen", [(name, tensor) for name, tensor in named if not tensor.requires_grad])
    opt = optimizer_for(mode.groups(trained, eps) or trained, ledger)
    steps = len(ledger.entries)

    def progress(step: int) -> None:
        listener.evaluating(step + 1, steps, "replayed steps")

    replay(opt, ledger.entries, progress=progress)
    opt.fold()
    digest = weights_hash((name, slot.tensor) for name, slot in opt.weights.slots.items())
    if ledger.weights is not None and digest != ledger.weights:
        raise LedgerError(
            f"The rebuilt weights hash to {digest[:16]}, the run's to {ledger.weights[:16]}. Exact Gaussian noise agrees "
            "only on the same kind of device; otherwise the ledger or the base model was changed."
        )
    save_model(out, model, tokenizer)
    verdict = (
        "equal to the trained model's"
        if ledger.weights is not None
        else "the run had not ended, nothing to compare with"
    )
    return f"{steps} steps replayed without data; weights sha256 {digest} ({verdict}); model in {out}"


def _check_base(base: str, origin: dict[str, Any], key: str, named: list[tuple[str, Tensor]]) -> None:
    if key in origin and (found := weights_hash(named)) != origin[key]:
        raise LedgerError(
            f"{base} is not the base model of this ledger: its weights hash to {found[:16]}, the ledger began at "
            f"{origin[key][:16]} ({origin.get('model')}). (A prefix starts from a forward pass, which other processors round "
            "otherwise: replay it on the kind of machine that made it.)"
        )
