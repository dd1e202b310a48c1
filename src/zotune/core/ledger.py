"""The ledger: the losses of every query, in order. Base weights + ledger = trained weights, with no data and no forward.

One JSON object a line, numbers written so that they read back exactly:

    {"ledger": 1, "base": ..., "sites": ..., "method": ..., "groups": [...], "seed": 0, ...}     the header
    {"step": 0, "loss": 0.697, "losses": [0.693, 0.701]}                                         one line a step
    {"step": 1, "losses": [...], "groups": [{"lr": 9e-07, ...}]}       groups: only when they changed since the last line
    {"fold": 2}                                    after 2 steps what was pending was folded, though it was not due then
    {"end": 600, "weights": "sha256 ..."}                                                        when a run has ended

A line is flushed before the step's update is applied. A torn last line (a killed process, a full disk) is dropped: its
step was never acknowledged. Damage anywhere else is an error.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zotune.errors import LedgerError

FORMAT = 1
# Header entries that must agree for a ledger to be replayed or continued.
_MUST_AGREE = ("ledger", "sites", "method", "rule", "seed", "noise", "low_precision", "base")


@dataclass(frozen=True)
class Entry:
    """One step: the loss that was logged, the losses that the method was told, and the hyper-parameters it ran with."""

    step: int
    loss: float
    losses: list[float]
    groups: list[dict[str, float]]
    folded: bool = False  # by `ZO.fold`, after the step


@dataclass(frozen=True)
class LedgerFile:
    """What a ledger says."""

    header: dict[str, Any]
    entries: list[Entry]
    weights: str | None = None  # hash of the final weights, once the run has ended
    good_bytes: int = 0  # length of the file without a torn last line
    torn: bool = False  # whether there was one


def read_ledger(path: str | Path) -> LedgerFile:
    """Read a ledger; a torn last line is left out.

    Raises:
        LedgerError: no such file, no header, a damaged line that is not the last, or steps out of order.
    """
    path = Path(path)
    if not path.is_file():
        raise LedgerError(f"No ledger at {path}. Training writes it as `ledger.jsonl` into its run folder.")
    lines = path.read_bytes().splitlines(keepends=True)
    parsed: list[dict[str, Any]] = []
    good = 0
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line) if line.endswith(b"\n") else _torn())
        except ValueError as error:
            if number == len(lines):
                break
            raise LedgerError(f"{path}, line {number} is damaged ({error}); only the last line may be.") from error
        good += len(line)
    if not (parsed and isinstance(parsed[0], dict) and parsed[0].get("ledger") == FORMAT):
        raise LedgerError(f"{path} does not begin with a ledger header of format {FORMAT}.")
    try:
        entries, weights = _entries(path, parsed)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(f"{path} holds a line of another shape than a ledger's ({error!r}).") from error
    return LedgerFile(parsed[0], entries, weights, good, torn=len(parsed) < len(lines))


def _torn() -> dict[str, Any]:
    raise ValueError("the line does not end")


def _entries(path: Path, parsed: Sequence[Mapping[str, Any]]) -> tuple[list[Entry], str | None]:
    groups, weights = parsed[0]["groups"], None
    entries: list[Entry] = []
    for number, line in enumerate(parsed[1:], start=2):
        if "end" in line:
            weights = line["weights"]
            continue
        if "fold" in line:
            if not entries or line["fold"] != len(entries):
                raise LedgerError(f"{path}, line {number}: a fold after {line['fold']!r} of {len(entries)} steps.")
            entries[-1], weights = replace(entries[-1], folded=True), None
            continue
        if line.get("step") != len(entries):
            raise LedgerError(f"{path}, line {number}: expected step {len(entries)}, got {line.get('step')!r}.")
        groups = line.get("groups", groups)
        entries.append(Entry(len(entries), _number(line["loss"]), [_number(v) for v in line["losses"]], groups))
        weights = None
    return entries, weights


class Ledger:
    """Writes a ledger, or goes on with one."""

    def __init__(self, path: str | Path, base: Any = None) -> None:
        """Nothing is written before the first step.

        Args:
            path: the file; its folder must exist.
            base: what names the base model: any JSON value.
        """
        self.path = Path(path)
        self.base = base
        self._file: BinaryIO | None = None
        self._good = 0  # bytes that hold whole lines
        self._steps = 0  # that they tell of
        self._groups: list[dict[str, float]] | None = None

    def append(self, header: Callable[[], Mapping[str, Any]], entry: Entry, *, pending: bool = False) -> None:
        """Write one step; on return the line has left this process. The header is asked for when the file is opened.

        Args:
            header: what says how the run's optimizer is made.
            entry: the step.
            pending: whether moves of earlier steps wait to be folded, which must not be if the file says they were.

        Raises:
            LedgerError: the file belongs to another run, or stands at another step.
            OSError: the disk is full, or the like. What was written before stays readable.
        """
        self._go_on(header, entry.step, pending)
        losses = [_writable(value) for value in entry.losses]
        line: dict[str, Any] = {"step": entry.step, "loss": _writable(entry.loss), "losses": losses}
        if entry.groups != self._groups:
            line["groups"] = entry.groups
        self._write(line)
        self._groups, self._steps = entry.groups, entry.step + 1

    def fold(self, header: Callable[[], Mapping[str, Any]], steps: int) -> None:
        """Write down a fold that the number of steps does not tell of. Raises as `append` does."""
        self._go_on(header, steps)
        self._write({"fold": steps})

    def end(self, header: Callable[[], Mapping[str, Any]], steps: int, weights: str) -> None:
        """Write down that the run has ended, and the hash of its weights. Raises as `append` does."""
        self._go_on(header, steps)
        self._write({"end": steps, "weights": weights})
        self.sync()

    def sync(self) -> None:
        """Make sure that what was written survives a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _go_on(self, describe: Callable[[], Mapping[str, Any]], step: int, pending: bool = False) -> None:
        """Open the file, unless it is open; either way it must stand where the optimizer does."""
        if self._file is not None:
            self._check_steps(step)
            return
        header = {**describe(), "base": self.base}
        if has_header(self.path):
            before = read_ledger(self.path)
            check_header(before.header, header, self.path)
            self._steps = len(before.entries)
            self._check_steps(step)
            if pending and before.entries[-1].folded:
                raise LedgerError(
                    f"{self.path} says that the run was folded after step {step}; this optimizer's state is older than that. "
                    "Replay the ledger first (zotune.replay)."
                )
            self._groups = before.entries[-1].groups if before.entries else before.header["groups"]
            self._good = before.good_bytes
        elif step:
            raise LedgerError(
                f"A ledger begins at step 0; the optimizer stands at step {step} and {self.path} is empty."
            )
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(self._good)
        if not self._good:
            self._write(header)
            self._groups = header["groups"]

    def _check_steps(self, step: int) -> None:
        if self._steps != step:
            raise LedgerError(
                f"{self.path} holds {self._steps} steps, but the optimizer stands at step {step}. "
                "Replay the ledger first (zotune.replay), or name a new file."
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        """One line or nothing: what was cut short is taken back, and the next line opens the file again."""
        assert self._file is not None
        data = json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, f"{self.path} could not be extended: the disk is full")
        except BaseException:  # Ctrl-C too
            self._file.truncate(self._good)
            self.close()
            raise
        self._good += len(data)


def has_header(path: Path) -> bool:
    """Whether a ledger was begun there: a first line killed half-way counts as none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def check_header(found: Mapping[str, Any], expected: Mapping[str, Any], path: str | Path) -> None:
    """A ledger may only be replayed on what it was written for.

    Raises:
        LedgerError: says which entry differs, and how.
    """
    for key in _MUST_AGREE:
        if found.get(key) != expected.get(key):
            raise LedgerError(
                f"{path} was written for another run: its {key} is {found.get(key)!r}, here it is {expected.get(key)!r}. "
                "Replay needs the same base model, trained tensors, method options, rule and seed."
            )


def sites_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Names, shapes and dtypes of trained tensors in 16 hex digits; order does not matter."""
    lines = sorted(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and bits of tensors, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers in row-major order, as bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    # torch lets the stride of a single number be anything
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def _writable(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # JSON has no nan or inf


def _number(value: float | str) -> float:
    return float(value)
