"""What `native.c` is told: its structs as bytes, made from tensors that were looked at before, and room to work in."""

import ctypes
import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.kernels.codebook import BASE_ROWS, WIDTH
from zotune.kernels.contract import LANES, Run, Term

KEPT = 4  # packed terms: of an update and of a query
MOST_TERMS = 256  # of one call, as in native.c; more go through the reference
BOOKS = {"normal": 0, "rademacher": 1}
GIVEN = {torch.float32: 2, torch.float64: 3, torch.bfloat16: 4}  # books of the numbers of a tensor
LOW_RANK, LOW_RANK_FP32 = 5, 6
EXACT = {torch.float32: 0, torch.float64: 1}
BF16, BF16_CARRIED, BF16_SPLIT = 2, 3, 4
# Elements, counted once for each term, for each thread after the first: measured, a second one breaks even at 50,000.
WORTH_A_THREAD = 1 << 16
ROOM = 8 * BASE_ROWS * WIDTH  # bytes for one term
JOB = struct.Struct("@PPPPQqqqiiiiPPP")  # the structs of native_types.h, padding included
TERM = struct.Struct("@IIiidIIPPqqqq")
OUT = struct.Struct("@Pq")
PLACE = struct.Struct("@PPQq")


class PackedTerms:
    """Terms as bytes. The last ones are kept: they are the same for most tensors of a model."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Sequence[Term], bytes]] = {}

    def of(self, terms: Sequence[Term]) -> bytes:
        """Terms of native.c."""
        known, packed = self._kept.get(id(terms), ((), b""))
        if known is terms:
            return packed
        packed = b"".join(map(_packed, terms))
        if isinstance(terms, tuple) and not any(isinstance(term.scale, Tensor) for term in terms):
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[id(terms)] = (terms, packed)  # of what cannot change
        return packed


def _packed(term: Term) -> bytes:
    limit, mask = (0, (0, 0)) if term.mask is None or term.mask.limit == LANES else (term.mask.limit, term.mask.key)
    head = (*term.key, _book(term), limit, float(term.scale), *mask)
    if term.factors is not None:
        left, right = term.factors.left, term.factors.right
        return TERM.pack(*head, left.data_ptr(), right.data_ptr(), right.shape[1], right.shape[0], *left.stride())
    return TERM.pack(*head, 0 if term.numbers is None else term.numbers.data_ptr(), 0, 0, 0, 0, 0)


def _book(term: Term) -> int:
    if term.factors is not None:
        return LOW_RANK_FP32 if term.factors.single else LOW_RANK
    return BOOKS[term.book] if term.numbers is None else GIVEN[term.numbers.dtype]


def takes(*terms: Sequence[Term]) -> bool:
    """Whether one call can add so many."""
    return all(terms) and sum(map(len, terms)) <= MOST_TERMS


def job(
    kind: int,
    outs: Sequence[tuple[Tensor, float]],
    stored: Tensor,
    carried: Tensor | None,
    run: Run,
    terms: bytes,
    room: int,
) -> bytes:
    """A Job of native.c, with its Terms and Outs. The caller holds the tensors until it is done."""
    meant = run.count if run.rows is None else run.rows.numel() * run.width
    check(stored, stored.dtype, meant)
    if carried is not None:
        check(carried, torch.int16, meant)
    places = b""
    for out, sign in outs:
        check(out, stored.dtype, meant)
        places += OUT.pack(out.data_ptr(), sign < 0)
    rows = 0 if run.rows is None else run.rows.data_ptr()
    low = 0 if carried is None else carried.data_ptr()
    sizes = (run.site, run.start, meant, run.width, kind, len(terms) // TERM.size, len(outs), 0, 0, 0, 0)
    return JOB.pack(room, stored.data_ptr(), low, rows, *sizes) + terms + places


def threads_for(work: int) -> int:
    """How many threads are worth waking for so many elements, counted once for each term."""
    worth = 1 + work // WORTH_A_THREAD
    return 1 if worth == 1 else min(torch.get_num_threads(), worth)


_rooms = threading.local()


def room_for(terms: int) -> int:
    """The address of this thread's room for each term's scaled base rows, in any precision."""
    held = getattr(_rooms, "held", None)
    if held is None or len(held) < terms * ROOM:
        held = _rooms.held = ctypes.create_string_buffer(terms * ROOM + 64)
    address = ctypes.addressof(held)
    return address + -address % 64


def check(tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """Raw addresses are passed on: whatever is not as the contract says must stop here."""
    if tensor.dtype != dtype or tensor.numel() != count or not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(
            f"The kernels need {count} contiguous {dtype} numbers on the CPU; got {tuple(tensor.shape)} of "
            f"{tensor.dtype} on {tensor.device}."
        )
