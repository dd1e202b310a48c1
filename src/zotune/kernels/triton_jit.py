# mypy: ignore-errors
"""The device side of `kernels.triton_noise`: Triton functions that make table noise and add it to memory in one pass.

A program takes a tile of TILE numbers. Where a site's elements lie in order, the tile is 128 codebook rows of 64: one
Philox call names eight of them, and nothing but the weights and the rows' 64 bytes is read. Chosen rows of an embedding
are made one element at a time instead, which costs a Philox call each and needs no alignment.

Bits: a product is rounded, then the sum, as `kernels.contract` says. All launches forbid the fused multiply-add
(`enable_fp_fusion=False`), Triton keeps subnormal numbers, and the roundings to bf16 and of carried bits are integer
arithmetic or IEEE conversions. Only builtins of Triton's language are called, so that the same source runs in Triton's
interpreter, whose own conversion to bf16 rounds halves up: there the rounding is written out.
"""

import triton
import triton.language as tl

from zotune.kernels.triton_draws import element_sum, tile_sum

TILE = 8192  # numbers a program makes: 16 blocks of "normal", 64 of "rademacher"; 32 for each of 256 threads
ELEMENTS = 1024  # numbers a program makes where each element has a Philox call of its own

# Kinds of storage
EXACT = tl.constexpr(0)  # fp32 and fp64: what is stored is the value
BF16 = tl.constexpr(1)  # handed over as int16
FP16 = tl.constexpr(2)

FP32, FP64 = tl.float32, tl.float64  # precisions of values

INTERPRETED = tl.constexpr(not isinstance(tile_sum, triton.JITFunction))


# ----------------------------------------------------------------------------------------------------------------------
# Storage: full-precision values out of memory, and back


@triton.jit
def _fp16_exponent(bits):
    """Of the unit of an fp16 number's carried bits, ulp / 2**16, from the number's bits: -40 to -10."""
    field = (bits >> 10) & 31
    return tl.where(field == 0, 1, field) - 41


@triton.jit
def _read(stored, carried, at, mask, KIND: tl.constexpr, CARRIED: tl.constexpr):
    """Full-precision values."""
    if KIND == EXACT:
        value = tl.load(stored + at, mask=mask)
    elif KIND == BF16:
        bits = tl.load(stored + at, mask=mask).to(tl.int32) << 16
        if CARRIED:
            bits = bits + tl.load(carried + at, mask=mask).to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
    else:
        half = tl.load(stored + at, mask=mask)
        value = half.to(tl.float32)
        if CARRIED:
            rest = tl.load(carried + at, mask=mask)
            exponent = _fp16_exponent(half.to(tl.int16, bitcast=True).to(tl.int32))
            unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            value = tl.where(rest == 0, value, value + rest.to(tl.float32) * unit)  # -0.0 + 0.0 would be 0.0
    return value


@triton.jit
def _write(out, at, mask, value, KIND: tl.constexpr):
    """Values rounded to nearest, halves to even."""
    if KIND == EXACT:
        tl.store(out + at, value, mask=mask)
    elif KIND == BF16:
        if INTERPRETED:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
        else:
            rounded = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
        tl.store(out + at, rounded, mask=mask)
    else:
        tl.store(out + at, value.to(tl.float16), mask=mask)


@triton.jit
def _keep(stored, carried, at, mask, value, KIND: tl.constexpr):
    """Values split into what is stored and what is carried (`core.weights`)."""
    if KIND == EXACT:
        tl.store(stored + at, value, mask=mask)
    elif KIND == BF16:
        bits = value.to(tl.int32, bitcast=True)
        tl.store(stored + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
        tl.store(carried + at, bits.to(tl.int16), mask=mask)
    else:
        half = value.to(tl.float16)
        exponent = _fp16_exponent(half.to(tl.int16, bitcast=True).to(tl.int32))
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        rest = (value - half.to(tl.float32)) * inverse  # exact: a power of two
        rest = tl.where(rest == rest, rest, 0.0)
        rest = tl.where(rest > 32767.0, 32767.0, tl.where(rest < -32768.0, -32768.0, rest))
        rest = (rest + 12582912.0) - 12582912.0  # to the nearest integer, halves to even: 1.5 * 2**23 has units of one
        tl.store(stored + at, half, mask=mask)
        tl.store(carried + at, rest.to(tl.int16), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels over a run of elements

_ANY = ["site", "start", "count", "width"]  # these differ from call to call: no compilation for each
_SOME = ["terms"]  # one term is a case of its own: no loop


@triton.jit
def _place(start, count, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile's first element, where that is in memory, the places of its elements from there, and which are meant."""
    start = start.to(tl.int64)  # one a line: Triton 3.3 cannot compile arguments that are assigned as a tuple
    count = count.to(tl.int64)
    if ALIGNED:  # both are multiples of 16: said in this way, the compiler moves 16 bytes at once
        start = start // 16 * 16
        count = count // 16 * 16
    first = start // 512 * 512 + tl.program_id(0).to(tl.int64) * TILE  # blocks are not cut
    base = first - start
    at = tl.arange(0, TILE // 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    high = tl.minimum(count - base, TILE).to(tl.int32)
    return first, base, at, (at >= (-tl.minimum(base, 0)).to(tl.int32)) & (at < high)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_SOME)
def update_run(
    stored, carried, table, terms, book, site, start, count,
    BOOK: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """value += sum of terms, kept in `stored` and `carried`."""
    first, base, at, mask = _place(start, count, TILE, ALIGNED)
    value = _read(stored + base, carried + base, at, mask, KIND, KIND != EXACT)
    value = value + tile_sum(book, table, terms, first, site, BOOK, TILE, FLOAT)
    _keep(stored + base, carried + base, at, mask, value, KIND)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_SOME)
def perturb_run(
    stored, carried, plus, minus, table, terms, book, site, start, count,
    BOOK: tl.constexpr, KIND: tl.constexpr, CARRIED: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """plus = round(value + sum of terms), minus = round(value - sum of terms), either or both."""
    first, base, at, mask = _place(start, count, TILE, ALIGNED)
    value = _read(stored + base, carried + base, at, mask, KIND, CARRIED)
    total = tile_sum(book, table, terms, first, site, BOOK, TILE, FLOAT)
    if PLUS:
        _write(plus + base, at, mask, value + total, KIND)
    if MINUS:
        _write(minus + base, at, mask, value - total, KIND)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels over chosen rows; in memory the chosen rows lie one after another


@triton.jit
def _chosen(rows, width, count, ELEMENTS: tl.constexpr):
    """Places in memory, the element numbers there, and which of them are meant."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = at < count
    row = at // width
    element = tl.load(rows + row, mask=mask, other=0) * width + (at - row * width)
    return at, element, mask


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_SOME)
def update_rows(
    stored, carried, rows, table, terms, book, site, width, count,
    BOOK: tl.constexpr, KIND: tl.constexpr, ELEMENTS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """As `update_run`."""
    at, element, mask = _chosen(rows, width, count, ELEMENTS)
    value = _read(stored, carried, at, mask, KIND, KIND != EXACT)
    value = value + element_sum(book, table, terms, element, site, BOOK, FLOAT)
    _keep(stored, carried, at, mask, value, KIND)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_SOME)
def perturb_rows(
    stored, carried, plus, minus, rows, table, terms, book, site, width, count,
    BOOK: tl.constexpr, KIND: tl.constexpr, CARRIED: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    ELEMENTS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """As `perturb_run`."""
    at, element, mask = _chosen(rows, width, count, ELEMENTS)
    value = _read(stored, carried, at, mask, KIND, CARRIED)
    total = element_sum(book, table, terms, element, site, BOOK, FLOAT)
    if PLUS:
        _write(plus, at, mask, value + total, KIND)
    if MINUS:
        _write(minus, at, mask, value - total, KIND)


# ----------------------------------------------------------------------------------------------------------------------
# One launch for many tensors


@triton.jit(do_not_specialize_on_alignment=_SOME)
def update_many(
    owner, place, table, terms, book, BOOK: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr
):
    """`update_run` of whole tensors of one kind.

    owner: (tiles,) int32, which tensor a tile belongs to. place: (tensors, 6) int64, for each tensor the addresses of what
    is stored and carried (multiples of 16), its id, its number of elements (a multiple of 16), its first tile, and its
    first row in the table of terms.
    """
    tile = tl.program_id(0)
    own = place + tl.load(owner + tile).to(tl.int64) * 6
    pointer = tl.pointer_type(FLOAT if KIND == EXACT else (tl.int16 if KIND == BF16 else tl.float16))
    stored = tl.multiple_of(tl.load(own).to(pointer), 16)
    carried = tl.multiple_of(tl.load(own + 1).to(tl.pointer_type(tl.int16)), 16)
    site, count = tl.load(own + 2), tl.multiple_of(tl.load(own + 3), 16)
    first = (tile - tl.load(own + 4)) * TILE
    at = tl.arange(0, TILE // 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    mask = at < tl.minimum(count - first, TILE).to(tl.int32)
    value = _read(stored + first, carried + first, at, mask, KIND, KIND != EXACT)
    value = value + tile_sum(book, table + tl.load(own + 5) * 3, terms, first, site, BOOK, TILE, FLOAT)
    _keep(stored + first, carried + first, at, mask, value, KIND)
