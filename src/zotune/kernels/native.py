"""The compiled back end: `native.c` called through ctypes, and how it is found.

Why a small C file: it runs near the speed of memory, an ordinary `pip install` builds it in a few seconds with any C
compiler, and without one the install succeeds and `kernels.reference` does the work. The other means that reach this speed
ask for more: numba is a heavy dependency that lags behind Python and compiles at run time; torch's own extensions and
its compiler need a C++ compiler where the program runs.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zotune.kernels.codebook import BASE_ROWS, integer_rows
from zotune.kernels.composed import Composed, Sums
from zotune.kernels.contract import Addition, Run, Term, written
from zotune.kernels.native_packing import (
    BF16,
    BF16_CARRIED,
    BF16_SPLIT,
    EXACT,
    GIVEN,
    JOB,
    MOST_TERMS,
    OUT,
    PLACE,
    ROOM,
    PackedTerms,
    check,
    job,
    room_for,
    takes,
    threads_for,
)
from zotune.kernels.native_prepared import NativePrepared
from zotune.kernels.native_thin import DTYPES, add_thin
from zotune.kernels.native_values import copy_values, declare, in_memory, moments
from zotune.kernels.openmp import find_runtime
from zotune.kernels.prepared import Prepared
from zotune.kernels.reference import ReferenceBackend
from zotune.kernels.workspace import workspace

ABI = 8  # what `zotune_abi` of native.c must say


class MissingError(Exception):
    """The compiled kernels cannot be used; the message says why."""


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
    library.zotune_thin.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.zotune_thin.restype = None
    library.zotune_crossing.restype = ctypes.c_double
    declare(library)
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
        self.run, self._update_many = library.zotune_run, library.zotune_update_many
        self.update_and_run = library.zotune_update_and_run
        self.packed = PackedTerms()
        self.runtime = find_runtime()
        if self.runtime.addresses:
            library.zotune_threads(*(ctypes.c_void_p(address) for address in self.runtime.addresses))

    def level(self, wanted: int = -1) -> str:
        """Use an instruction set (0 to 3; -1: the best there is) and say which one it is now."""
        return ("plain", "AVX2", "AVX-512", "AVX-512 with bf16")[self._library.zotune_level(wanted)]

    def team(self, threads: int) -> int:
        """Threads that a call gets if it asks for so many."""
        return int(self._library.zotune_team(threads))

    def crossing(self) -> float:
        """Nanoseconds in which a thread reads a line that another has just written, now; 0 without threads."""
        return float(self._library.zotune_crossing())

    def apart(self, wanted: int = -1) -> bool:
        """Whether each of two threads now writes an out whole, and not half of both. No bit depends on it.

        Args:
            wanted: 1 or 0: from now on; -1: in fp32, where they share no cache, as is looked at again and again.
        """
        return bool(self._library.zotune_apart(wanted))

    def takes(self, terms: Sequence[Term]) -> bool:
        """See `Backend.takes`: masks, and numbers of tensors in memory."""
        return all(term.drawn for term in terms) or (len(terms) <= MOST_TERMS and all(map(_addressed, terms)))

    def sums(self, like: Tensor, run: Run, terms: Sequence[Term]) -> Sums:
        """See `Composed.sums`."""
        if not takes(terms):
            return self._reference.sums(like, run, terms)

        def total(offset: int, count: int) -> Tensor:
            whole = workspace("total", count, like.dtype, like.device).fill_(-0.0)  # -0.0 + x is x, bit for bit
            self.add(whole, run if run.rows is not None else replace(run, start=run.start + offset, count=count), terms)
            return whole

        return total

    def add(self, out: Tensor, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.add`."""
        if not takes(terms):
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
        if stored.dtype == torch.float16 or not takes(terms):
            super().perturb(outs, stored, carried, run, terms)
        elif stored.dtype == torch.bfloat16:
            self._call(BF16 if carried is None else BF16_CARRIED, outs, stored, carried, run, terms)
        else:
            self._call(EXACT[stored.dtype], outs, stored, None, run, terms)

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.update`."""
        if stored.dtype == torch.bfloat16 and carried is not None and takes(terms):
            self._call(BF16_SPLIT, [(stored, 1.0)], stored, carried, run, terms)
        else:
            super().update(stored, carried, run, terms)

    def update_many(self, additions: Sequence[Addition]) -> None:
        """See `Backend.update_many`: one call for all that move along the same terms."""
        alike: dict[tuple[int, bytes], list[Addition]] = {}
        for addition in additions:
            kind = EXACT.get(addition.stored.dtype, BF16_SPLIT if addition.carried is not None else -1)
            if kind < 0 or addition.stored.dtype == torch.float16 or not takes(addition.terms):
                addition.apply(self.update)
            else:
                alike.setdefault((kind, self.packed.of(addition.terms)), []).append(addition)
        for (kind, terms), group in alike.items():
            self._update_together(kind, terms, group)

    def _update_together(self, kind: int, terms: bytes, additions: Sequence[Addition]) -> None:
        places, changed, total = bytearray(), [], 0
        for addition in additions:
            check(addition.stored, addition.stored.dtype, addition.stored.numel())
            changed.append(addition.stored)
            address, numel = 0, addition.stored.numel()
            if addition.carried is not None:
                check(addition.carried, torch.int16, numel)
                changed.append(addition.carried)
                address = addition.carried.data_ptr()
            places += PLACE.pack(addition.stored.data_ptr(), address, addition.site, numel)
            total += numel
        count = len(additions[0].terms)
        head = JOB.pack(room_for(count), 0, 0, 0, 0, 0, 0, 0, kind, count, 1, 0, 0, 0, 0)
        self._update_many(head + terms + OUT.pack(0, 0), bytes(places), len(additions), threads_for(total * count))
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
        if kinds is None or not (takes(own, terms)):
            super().update_and_perturb(addition, outs, terms)
        elif run.count:
            room = room_for(len(own) + len(terms))
            update = job(kinds[0], [(stored, 1.0)], stored, carried, run, self.packed.of(own), room)
            query = job(kinds[1], outs, stored, carried, run, self.packed.of(terms), room + len(own) * ROOM)
            self.update_and_run(update, query, threads_for(run.count * (len(own) + len(terms))))
            written(
                [stored, *(out for out, _ in outs)] if carried is None else [stored, carried, *(o for o, _ in outs)]
            )

    def prepared(self, stored: Tensor, carried: Tensor | None, site: int, outs: Sequence[Tensor]) -> Prepared:
        """See `Backend.prepared`."""
        kind = Prepared if stored.dtype == torch.float16 else NativePrepared
        return kind(self, stored, carried, site, outs)

    def read(self, stored: Tensor, carried: Tensor | None, out: Tensor) -> None:
        """See `Backend.read`."""
        if stored.dtype == torch.bfloat16 and in_memory(stored, carried, out):
            copy_values(self._library.zotune_read, stored, carried, out)
            written([out])
        else:
            super().read(stored, carried, out)

    def write(self, values: Tensor, stored: Tensor, carried: Tensor) -> None:
        """See `Backend.write`."""
        if stored.dtype == torch.bfloat16 and in_memory(stored, carried, values):
            copy_values(self._library.zotune_write, stored, carried, values)
            written([stored, carried])
        else:
            super().write(values, stored, carried)

    def moments(self, values: Tensor, pivot: float) -> Tensor:
        """See `Backend.moments`."""
        return moments(self._library, values.contiguous(), pivot)

    def adds_low_rank(self, dtype: torch.dtype) -> bool:
        """See `Backend.adds_low_rank`."""
        return dtype in DTYPES

    def add_low_rank(self, y: Tensor, x: Tensor, kept: Tensor, fresh: Tensor) -> None:
        """See `Backend.add_low_rank`."""
        add_thin(self._library, y, x, kept, fresh)
        written([y])

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
        packed = job(kind, outs, stored, carried, run, self.packed.of(terms), room_for(len(terms)))
        if stored.numel() and outs:
            self.run(packed, threads_for(stored.numel() * len(terms)))
            changed = [out for out, _ in outs]
            if kind == BF16_SPLIT and carried is not None:
                changed.append(carried)
            written(changed)


def _addressed(term: Term) -> bool:
    """Whether what a term is made of can be read at addresses."""
    if term.factors is not None:
        left, right = term.factors.left, term.factors.right
        return left.dtype == right.dtype == torch.float32 and left.is_cpu and right.is_cpu and right.is_contiguous()
    n = term.numbers
    return n is None or (n.dtype in GIVEN and n.is_cpu and n.is_contiguous() and type(n) is Tensor)
