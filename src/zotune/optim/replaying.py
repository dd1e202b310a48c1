"""Replay: rebuild trained weights from base weights and a ledger, without data and without a forward pass."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zotune.core.ledger import Entry, LedgerFile, check_header, read_ledger
from zotune.engines.recorded import Recorded
from zotune.errors import LedgerError
from zotune.optim.optimizer import ZO

Recording = str | Path | LedgerFile | Sequence[Entry]


def replay(opt: ZO, ledger: Recording, progress: Callable[[int], None] | None = None) -> None:
    """Take the steps that a ledger holds; afterwards `opt` and its tensors stand where that run stood.

    Args:
        opt: made as the run's optimizer was, standing at the first entry's step.
        ledger: the path of one, what `read_ledger` returned, or its entries, in order. Those before the optimizer's
            step are skipped. Where the run was folded, so is this one; moves that were pending at the end are pending
            again: `opt.fold()` writes them into the tensors.
        progress: called with each step's number.

    Raises:
        LedgerError: the ledger cannot be read, or holds other numbers of losses than the method asks for.
    """
    entries = _entries(ledger)
    engine, writer = opt.engine, opt.ledger
    opt.ledger = None
    try:
        if any(entry.folded for entry in entries[: opt.step_number][-1:]):  # maybe after the state `opt` has was saved
            opt.fold()
        for entry in entries[opt.step_number :]:
            for group, hyperparameters in zip(opt.param_groups, entry.groups, strict=True):
                group.update(hyperparameters)
            recorded = Recorded(entry.losses, entry.step)
            opt.patience.forgive()  # the run went on after its refused steps, and so does the replay
            opt.engine = recorded
            opt.step(_no_model)
            recorded.close()
            if entry.folded:
                opt.fold()
            if progress is not None:
                progress(entry.step)
    finally:
        opt.engine, opt.ledger = engine, writer


def optimizer_for(named: Any, ledger: str | Path | LedgerFile, base: Any = None) -> ZO:
    """The optimizer that wrote a ledger, over tensors that hold its base weights.

    Args:
        named: (name, tensor) pairs, or the parameter groups of the run.
        ledger: its path, or what `read_ledger` returned.
        base: what the run said of its base weights; None trusts the ledger.

    Raises:
        LedgerError: the tensors are not those of the run.
    """
    ledger = ledger if isinstance(ledger, LedgerFile) else read_ledger(ledger)
    header, named = ledger.header, list(named)
    grouped = bool(named) and isinstance(named[0], dict)
    if (len(named) if grouped else 1) != len(header["groups"]):
        raise LedgerError(
            f"The ledger's run had {len(header['groups'])} parameter groups, and it does not say which tensor was in which. "
            "Give the same groups, or make ZO with them yourself and call zotune.replay(opt, ledger)."
        )
    method, rule = dict(header["method"]), header["rule"]
    rule = {"name": rule} if isinstance(rule, str) else dict(rule)  # a rule without options is just its name
    fold_every = rule.pop("fold_every", 0)
    opt = ZO(
        named,
        method=method.pop("name"),
        method_options=method,
        rule=rule.pop("name"),
        rule_options=rule,
        seed=header["seed"],
        noise=header["noise"],
        low_precision=header["low_precision"],
        engine="in_place",
        fold_every=fold_every,
        **header["groups"][0],
    )
    check_header(header, {**opt.describe(), "base": header.get("base") if base is None else base}, "the ledger")
    return opt


def _entries(ledger: Recording) -> Sequence[Entry]:
    read = read_ledger(ledger) if isinstance(ledger, str | Path) else ledger
    return read.entries if isinstance(read, LedgerFile) else read


def _no_model() -> float:
    raise AssertionError("a replay asks no model")
