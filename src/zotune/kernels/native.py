"""The compiled back end: `native.c` called through ctypes, and how it is found.

Why a small C file: it runs near the speed of memory, an ordinary `pip install` builds it in a few seconds with any C
compiler, and without one the install succeeds and `kernels.reference` does the work. The other means that reach this speed
ask for more: numba is a heavy dependency that lags behind Python and compiles at run time; torch's own extensions and
its compiler need a C++ compiler where the program runs.
"""

import ctypes
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zotune.kernels.codebook import BASE_ROWS, WIDTH, integer_rows
from zotune.kernels.composed import Composed, Sums
from zotune.kernels.contract import Addition, Run, Term, written
from zotune.kernels.openmp import find_runtime
from zotune.kernels.reference import ReferenceBackend
from zotune.kernels.workspace import workspace

ABI = 3  # what `zotune_abi` of native.c must say
KEPT = 4  # packed terms: of an update and of a query
MOST_TERMS = 256  # of one call, as in native.c; more go through the reference
BOOKS = {"normal": 0, "rademacher": 1}
EXACT = {torch.float32: 0, torch.float64: 1}
BF16, BF16_CARRIED, BF16_SPLIT = 2, 3, 4
# Elements, counted once for each term, for each thread after the first: measured, a second one breaks even at 50,000.
WORTH_A_THREAD = 1 << 16


class MissingError(Exception):
    """The compiled kernels cannot be used; the message says why."""


_ROOM = 8 * BASE_ROWS * WIDTH  # bytes for one term
_JOB = struct.Struct("@PPPPQqqqiiiiPPP")  # the structs of native.c, padding included
_TERM = struct.Struct("@IIiid")
_OUT = struct.Struct("@Pq")
_PLACE = struct.Struct("@PPQq")


def compiled_file() -> Path:
    """Where the installation put the compiled kernels.

    Raises:
        MissingError: it did not.
    """
    here = Path(__file__)
    for suffix in EXTENSION_SUFFIXES:
        if (found := here.with_name("_native" + suffix)).is_file():
            return found
    raise MissingError(
        "they are not compiled. Was there a C compiler when zotune was installed? With one, reinstall: "
        "pip install --force-reinstall --no-deps zotune"
    )


def load(path: Path) -> ctypes.CDLL:
    """The compiled kernels of a file, on the best instruction set of this processor, with torch's threads.

    Raises:
        MissingError: the file does not load, or is of another version.
    """
    if sys.byteorder != "little":
        raise MissingError("they are written for little-endian processors")
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.zotune_abi())
    except (OSError, AttributeError) as error:
        raise MissingError(f"{path.name} does not load ({error}). Reinstall zotune") from error
    if version != ABI:
        raise MissingError(f"{path.name} was compiled from another version of zotune. Reinstall zotune")
    library.zotune_run.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.zotune_run.restype = None
    library.zotune_update_many.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    library.zotune_update_many.restype = None
    library.zotune_update_and_run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    library.zotune_update_and_run.restype = None
    library.zotune_level(-1)
    return library


class NativeBackend(Composed):
    """One pass over memory, on the CPU, for fp32, fp64 and bf16; fp16 by torch operations around it."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        base = np.ascontiguousarray(integer_rows()[:BASE_ROWS].astype(np.int8))  # those with no sign changed
        library.zotune_codebook(base.ctypes.data_as(ctypes.c_void_p))
        self._reference = ReferenceBackend()
        self._run, self._update_many = library.zotune_run, library.zotune_update_many
        self._update_and_run = library.zotune_update_and_run
        self._packed: dict[
            int, tuple[Sequence[Term], bytes]
        ] = {}  # the last terms: the same for most tensors of a model
        self.runtime = find_runtime()
        if self.runtime.addresses:
            library.zotune_threads(*(ctypes.c_void_p(address) for address in self.runtime.addresses))

    def level(self, wanted: int = -1) -> str:
        """Use an instruction set (0 to 3; -1: the best there is) and say which one it is now."""
        return ("plain", "AVX2", "AVX-512", "AVX-512 with bf16")[self._library.zotune_level(wanted)]

    def team(self, threads: int) -> int:
        """Threads that a call gets if it asks for so many."""
        return int(self._library.zotune_team(threads))

    def sums(self, like: Tensor, run: Run, terms: Sequence[Term]) -> Sums:
        """See `Composed.sums`."""
        if not self._takes(terms):
            return self._reference.sums(like, run, terms)

        def total(offset: int, count: int) -> Tensor:
            whole = workspace("total", count, like.dtype, like.device).fill_(-0.0)  # -0.0 + x is x, bit for bit
            self.add(whole, run if run.rows is not None else replace(run, start=run.start + offset, count=count), terms)
            return whole

        return total

    def add(self, out: Tensor, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.add`."""
        if not self._takes(terms):
            super().add(out, run, terms)
        else:
            self._call(EXACT[out.dtype], [(out, 1.0)], out, None, run, terms)

    def perturb(
        self,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        """See `Backend.perturb`."""
        if stored.dtype == torch.float16 or not self._takes(terms):
            super().perturb(outs, stored, carried, run, terms)
        elif stored.dtype == torch.bfloat16:
            self._call(BF16 if carried is None else BF16_CARRIED, outs, stored, carried, run, terms)
        else:
            self._call(EXACT[stored.dtype], outs, stored, None, run, terms)

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.update`."""
        if stored.dtype == torch.bfloat16 and carried is not None and self._takes(terms):
            self._call(BF16_SPLIT, [(stored, 1.0)], stored, carried, run, terms)
        else:
            super().update(stored, carried, run, terms)

    def update_many(self, additions: Sequence[Addition]) -> None:
        """See `Backend.update_many`: one call for all that move along the same terms."""
        alike: dict[tuple[int, int], list[Addition]] = {}
        for addition in additions:
            kind = EXACT.get(addition.stored.dtype, BF16_SPLIT if addition.carried is not None else -1)
            if kind < 0 or addition.stored.dtype == torch.float16 or not self._takes(addition.terms):
                addition.apply(self.update)
            else:
                alike.setdefault((kind, id(addition.terms)), []).append(addition)
        for (kind, _), group in alike.items():
            self._update_together(kind, group)

    def _update_together(self, kind: int, additions: Sequence[Addition]) -> None:
        places, changed, total = bytearray(), [], 0
        for addition in additions:
            _check(addition.stored, addition.stored.dtype, addition.stored.numel())
            changed.append(addition.stored)
            address, count = 0, addition.stored.numel()
            if addition.carried is not None:
                _check(addition.carried, torch.int16, count)
                changed.append(addition.carried)
                address = addition.carried.data_ptr()
            places += _PLACE.pack(addition.stored.data_ptr(), address, addition.site, count)
            total += count
        terms = additions[0].terms
        job = _JOB.pack(_room(len(terms)), 0, 0, 0, 0, 0, 0, 0, kind, len(terms), 1, 0, 0, 0, 0)
        threads = _threads(total * len(terms))
        self._update_many(job + self._terms(terms) + _OUT.pack(0, 0), bytes(places), len(additions), threads)
        written(changed)

    def update_and_perturb(
        self, addition: Addition, outs: Sequence[tuple[Tensor, float]], terms: Sequence[Term]
    ) -> None:
        """See `Backend.update_and_perturb`."""
        stored, carried, run = addition.flat
        kinds = (BF16_SPLIT, BF16_CARRIED) if stored.dtype == torch.bfloat16 and carried is not None else None
        if stored.dtype in EXACT:
            kinds = (EXACT[stored.dtype],) * 2
        own = addition.terms
        if kinds is None or not (self._takes(own) and self._takes(terms) and self._takes([*own, *terms])):
            super().update_and_perturb(addition, outs, terms)
        elif run.count:
            room = _room(len(own) + len(terms))
            update = self._job(kinds[0], [(stored, 1.0)], stored, carried, run, own, room)
            job = self._job(kinds[1], outs, stored, carried, run, terms, room + len(own) * _ROOM)
            self._update_and_run(update, job, _threads(run.count * (len(own) + len(terms))))
            written(
                [stored, *(out for out, _ in outs)] if carried is None else [stored, carried, *(o for o, _ in outs)]
            )

    def _terms(self, terms: Sequence[Term]) -> bytes:
        known, packed = self._packed.get(id(terms), ((), b""))
        if known is terms:
            return packed
        made = [_TERM.pack(*term.key, BOOKS[term.book], 0, float(term.scale)) for term in terms]
        packed = b"".join(made)
        if isinstance(terms, tuple) and not any(isinstance(term.scale, Tensor) for term in terms):
            if len(self._packed) >= KEPT:
                self._packed.clear()
            self._packed[id(terms)] = (terms, packed)  # of what cannot change
        return packed

    def _takes(self, terms: Sequence[Term]) -> bool:
        return 0 < len(terms) <= MOST_TERMS

    def _call(
        self,
        kind: int,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        if run.rows is not None:  # held until the call is over
            run = replace(run, rows=run.rows.to("cpu", torch.int64).contiguous())
        job = self._job(kind, outs, stored, carried, run, terms, _room(len(terms)))
        if stored.numel() and outs:
            self._run(job, _threads(stored.numel() * len(terms)))
            changed = [out for out, _ in outs]
            if kind == BF16_SPLIT and carried is not None:
                changed.append(carried)
            written(changed)

    def _job(
        self,
        kind: int,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
        room: int,
    ) -> bytes:
        """A Job of native.c, with its Terms and Outs. The caller holds the tensors until it is done."""
        meant = run.count if run.rows is None else run.rows.numel() * run.width
        _check(stored, stored.dtype, meant)
        if carried is not None:
            _check(carried, torch.int16, meant)
        places = b""
        for out, sign in outs:
            _check(out, stored.dtype, meant)
            places += _OUT.pack(out.data_ptr(), sign < 0)
        rows = 0 if run.rows is None else run.rows.data_ptr()
        low = 0 if carried is None else carried.data_ptr()
        sizes = (run.site, run.start, meant, run.width, kind, len(terms), len(outs), 0, 0, 0, 0)
        return _JOB.pack(room, stored.data_ptr(), low, rows, *sizes) + self._terms(terms) + places


def _threads(work: int) -> int:
    """How many threads are worth waking for so many elements, counted once for each term."""
    worth = 1 + work // WORTH_A_THREAD
    return 1 if worth == 1 else min(torch.get_num_threads(), worth)


_rooms = threading.local()


def _room(terms: int) -> int:
    """The address of this thread's room for each term's scaled base rows, in any precision."""
    held = getattr(_rooms, "held", None)
    if held is None or len(held) < terms * _ROOM:
        held = _rooms.held = ctypes.create_string_buffer(terms * _ROOM + 64)
    address = ctypes.addressof(held)
    return address + -address % 64


def _check(tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """Raw addresses are passed on: whatever is not as the contract says must stop here."""
    if tensor.dtype != dtype or tensor.numel() != count or not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(
            f"The kernels need {count} contiguous {dtype} numbers on the CPU; got {tuple(tensor.shape)} of "
            f"{tensor.dtype} on {tensor.device}."
        )
