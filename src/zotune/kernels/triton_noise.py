"""The Triton back end: `kernels.contract` on CUDA devices, one launch a call, nothing read on the host.

What a launch needs to know of its terms lies in a small table on the device, (terms, 3) int64: the two words of the
stream, the scale as fp64, the book. A scale that is a 0-d tensor on the device is copied into the table there; tables
of plain numbers are kept, since a step adds the same terms to every tensor.

With `run.rows`, tensors hold the chosen rows one after another. The kernels are in `kernels.triton_jit`, launches that cover
many tensors in `kernels.triton_many`. Under TRITON_INTERPRET=1 the same code runs on the CPU, slowly: that is how it is
tested where there is no GPU.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from zotune.kernels.codebook import integer_rows
from zotune.kernels.composed import widened
from zotune.kernels.contract import Run, Term, written
from zotune.kernels.triton_draws import MIXED, NORMAL, RADEMACHER
from zotune.kernels.triton_jit import (
    BF16,
    ELEMENTS,
    EXACT,
    FP16,
    FP32,
    FP64,
    TILE,
    perturb_rows,
    perturb_run,
    update_rows,
    update_run,
)
from zotune.kernels.unfused import Unfused

BLOCK = 512  # tiles begin at multiples of this
KEPT = 64  # tables of terms that are kept
BOOKS: dict[str, int] = {"normal": NORMAL.value, "rademacher": RADEMACHER.value}
# How a dtype is stored, the dtype in which the kernels see it, and the precision of its values.
KINDS: dict[torch.dtype, tuple[int, torch.dtype, Any]] = {
    torch.float32: (EXACT.value, torch.float32, FP32),
    torch.float64: (EXACT.value, torch.float64, FP64),
    torch.bfloat16: (BF16.value, torch.int16, FP32),
    torch.float16: (FP16.value, torch.float16, FP32),
}
# Without fusion a product is rounded before it is added; eight warps hold a tile in 32 numbers a thread.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class TritonBackend(Unfused):
    """Table noise on a CUDA device, one tensor a launch. `kernels.triton_many.Triton` is the whole back end."""

    name = "triton"

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def add(self, out: Tensor, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.add`."""
        if out.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Noise is added to fp32 and fp64 tensors; got {out.dtype}. Lower precision: perturb or update."
            )
        self.update(out, None, run, terms)

    def perturb(
        self,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        """See `Backend.perturb`."""
        _check([stored, *(out for out, _ in outs)], carried, run)
        if not terms:
            for out, _ in outs:
                out.copy_(stored if carried is None else widened(stored, carried))
        if not (terms and outs and stored.numel()):
            return
        kind, seen, _ = KINDS[stored.dtype]
        shared = self._shared(stored, run, terms) | {"KIND": kind, "CARRIED": carried is not None}
        whole = stored.view(seen)
        for plus, minus in _pairs(outs):
            sides = [whole if side is None else side.view(seen) for side in (plus, minus)]
            shared |= {"PLUS": plus is not None, "MINUS": minus is not None}
            with on(stored.device):
                kernel = perturb_run if run.rows is None else perturb_rows
                kernel[_grid(run)](whole, whole if carried is None else carried, *sides, **shared)
        written([out for out, _ in outs])

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """See `Backend.update`."""
        _check([stored], carried, run)
        kind, seen, _ = KINDS[stored.dtype]
        if kind != EXACT.value and carried is None:
            raise TypeError(f"An update of a {stored.dtype} tensor needs the tensor of carried bits beside it.")
        if not (terms and stored.numel()):
            return
        whole = stored.view(seen)
        shared = self._shared(stored, run, terms) | {"KIND": kind}
        with on(stored.device):
            kernel = update_run if run.rows is None else update_rows
            kernel[_grid(run)](whole, whole if carried is None else carried, **shared)
        written([stored] if carried is None else [stored, carried])

    def table(self, terms: Sequence[Term], device: torch.device) -> Tensor:
        """The terms as the kernels read them: (terms, 3) int64 on the device."""
        if any(_stays(term.scale, device) for term in terms):
            return _made(terms, device)  # somebody may write to a tensor
        key = (device, *((term.key, term.book, float(term.scale).hex()) for term in terms))  # hex: -0.0 is not 0.0
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = _made(terms, device)
            if len(self._tables) > KEPT:
                self._tables.popitem(last=False)
        return found

    def _shared(self, like: Tensor, run: Run, terms: Sequence[Term]) -> dict[str, Any]:
        """What every launch is told."""
        shared = {
            "table": self.table(terms, like.device),
            "terms": len(terms),
            "book": numbers(like.device),
            "site": signed(run.site),
            "count": like.numel(),
            "BOOK": book_of(terms),
            "FLOAT": KINDS[like.dtype][2],
            **OPTIONS,
        }
        if run.rows is not None:
            rows = run.rows.to(like.device, torch.int64, non_blocking=True).contiguous()
            return shared | {"rows": rows, "width": run.width, "ELEMENTS": ELEMENTS}
        aligned = run.start % 16 == 0 and run.count % 16 == 0
        return shared | {"start": run.start, "ALIGNED": aligned, "TILE": TILE}


@lru_cache(maxsize=8)
def numbers(device: torch.device) -> Tensor:
    """The codebook times 32: (4096, 64) int8, 256 KB, which stays in a second-level cache."""
    return torch.from_numpy(integer_rows()).to(torch.int8).to(device)


def book_of(terms: Sequence[Term]) -> int:
    """The book that all terms use, or MIXED."""
    books = {BOOKS[term.book] for term in terms}
    return books.pop() if len(books) == 1 else int(MIXED.value)


def signed(word: int) -> int:
    """64 bits as a signed number."""
    return word - (1 << 64) if word >> 63 else word


def _stays(scale: float | Tensor, device: torch.device) -> bool:
    """Whether a scale lies on the device, where it is used without being read."""
    return isinstance(scale, Tensor) and scale.device == device


def _made(terms: Sequence[Term], device: torch.device) -> Tensor:
    rows = []
    for term in terms:
        scale = 0.0 if _stays(term.scale, device) else float(term.scale)
        rows.append((signed(term.key[0] | term.key[1] << 32), _bits(scale), BOOKS[term.book]))
    # From pageable memory this neither waits for the device nor needs the source afterwards.
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    for row, term in zip(table, terms, strict=True):
        if isinstance(term.scale, Tensor) and _stays(term.scale, device):
            row[1:2].view(torch.float64).copy_(term.scale.reshape(1))
    return table


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _pairs(outs: Sequence[tuple[Tensor, float]]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Outputs two by two, one of each sign."""
    return zip_longest([out for out, sign in outs if sign > 0], [out for out, sign in outs if sign < 0])


def _grid(run: Run) -> tuple[int]:
    """Programs of a launch."""
    if run.rows is not None:
        return (-(-run.rows.numel() * run.width // ELEMENTS),)
    return (-(-(run.start % BLOCK + run.count) // TILE),)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(tensors: Sequence[Tensor], carried: Tensor | None, run: Run) -> None:
    """Kernels read and write addresses: whatever is not as the contract says must stop here."""
    count, first = run.count if run.rows is None else run.rows.numel() * run.width, tensors[0]
    for tensor, dtype in [(t, first.dtype) for t in tensors] + ([] if carried is None else [(carried, torch.int16)]):
        if (
            tensor.device != first.device
            or tensor.dtype != dtype
            or tensor.numel() != count
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"The kernels need {count} contiguous {dtype} numbers on {first.device}; got {tuple(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device}."
            )
