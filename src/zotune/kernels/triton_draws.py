# mypy: ignore-errors
"""Table noise as Triton functions: sums of terms on a tile of consecutive elements, or at any elements.

The table of terms has three int64 numbers for each: the stream's two words (low first), the scale as fp64, the book.
"""

import triton
import triton.language as tl

# Books of the terms of a launch
NORMAL = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
MIXED = tl.constexpr(2)  # some of each: both are made, and each term takes its own

_ROUND_0 = tl.constexpr(0xD2511F53)
_ROUND_1 = tl.constexpr(0xCD9E8D57)
_KEY_0 = tl.constexpr(0x9E3779B9)
_KEY_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def _philox(block, site, key):
    """Philox4x32-10: int64 block numbers, the site's 64 bits, the stream's two words (low first) -> four words each."""
    site = site.to(tl.int64)
    c0, c1 = (block & 0xFFFFFFFF).to(tl.uint32), ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = (site & 0xFFFFFFFF).to(tl.uint32), ((site >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0, m1 = tl.full((), _ROUND_0, tl.uint32), tl.full((), _ROUND_1, tl.uint32)
    s0, s1 = tl.full((), _KEY_0, tl.uint32), tl.full((), _KEY_1, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + s0, k1 + s1
    return c0, c1, c2, c3


@triton.jit
def _normal_tile(book, first, site, key, TILE: tl.constexpr, FLOAT: tl.constexpr):
    """(TILE / 64, 64) numbers: elements first ... first + TILE - 1, first being a multiple of 512."""
    w0, w1, w2, w3 = _philox((first >> 9) + tl.arange(0, TILE // 512), site, key)
    # joined so that word and half word are the last two indices: eight row numbers a block, in order
    low = tl.join(tl.join(w0 & 0xFFF, w2 & 0xFFF), tl.join(w1 & 0xFFF, w3 & 0xFFF))
    high = tl.join(tl.join((w0 >> 16) & 0xFFF, (w2 >> 16) & 0xFFF), tl.join((w1 >> 16) & 0xFFF, (w3 >> 16) & 0xFFF))
    rows = tl.reshape(tl.join(low, high), (TILE // 64,)).to(tl.int32)
    return tl.load(book + rows[:, None] * 64 + tl.arange(0, 64)[None, :]).to(FLOAT) * 0.03125


@triton.jit
def _sign_tile(first, site, key, TILE: tl.constexpr, FLOAT: tl.constexpr):
    """The same for signs, of which a block holds 128: two rows of 64, two words each."""
    w0, w1, w2, w3 = _philox((first >> 7) + tl.arange(0, TILE // 128), site, key)
    left, right = tl.reshape(tl.join(w0, w2), (TILE // 64,)), tl.reshape(tl.join(w1, w3), (TILE // 64,))
    lane = tl.arange(0, 64)
    words = tl.where((lane < 32)[None, :], left[:, None], right[:, None])
    return 1.0 - 2.0 * ((words >> (lane & 31)[None, :].to(tl.uint32)) & 1).to(FLOAT)


@triton.jit
def _tile_term(book, table, number, first, site, BOOK: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr):
    """scale * z of a row of the table of terms: the stream's words, the scale (kept as fp64), the book."""
    row = table + number * 3
    key, scale = tl.load(row), tl.load(row + 1).to(tl.float64, bitcast=True).to(FLOAT)
    if BOOK == NORMAL:
        z = _normal_tile(book, first, site, key, TILE, FLOAT)
    elif BOOK == RADEMACHER:
        z = _sign_tile(first, site, key, TILE, FLOAT)
    else:
        signs = _sign_tile(first, site, key, TILE, FLOAT)
        z = tl.where(tl.load(row + 2) == RADEMACHER, signs, _normal_tile(book, first, site, key, TILE, FLOAT))
    return scale * z


@triton.jit
def tile_sum(book, table, terms, first, site, BOOK: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr):
    """The sum of the terms on a tile: each product rounded, then added in order."""
    total = _tile_term(book, table, 0, first, site, BOOK, TILE, FLOAT)
    for number in range(1, terms):
        total = total + _tile_term(book, table, number, first, site, BOOK, TILE, FLOAT)
    return total


@triton.jit
def _normal_at(book, element, site, key, FLOAT: tl.constexpr):
    """Numbers at any int64 element numbers."""
    w0, w1, w2, w3 = _philox(element >> 9, site, key)
    row = (element >> 6) & 7
    word = tl.where(row < 4, tl.where(row < 2, w0, w1), tl.where(row < 6, w2, w3))
    number = (word >> ((row & 1) * 16).to(tl.uint32)) & 0xFFF
    return tl.load(book + number.to(tl.int32) * 64 + (element & 63).to(tl.int32)).to(FLOAT) * 0.03125


@triton.jit
def _sign_at(element, site, key, FLOAT: tl.constexpr):
    """Signs at any int64 element numbers."""
    w0, w1, w2, w3 = _philox(element >> 7, site, key)
    place = element & 127
    word = tl.where(place < 64, tl.where(place < 32, w0, w1), tl.where(place < 96, w2, w3))
    return 1.0 - 2.0 * ((word >> (element & 31).to(tl.uint32)) & 1).to(FLOAT)


@triton.jit
def _element_term(book, table, number, element, site, BOOK: tl.constexpr, FLOAT: tl.constexpr):
    """As `_tile_term`, at any elements."""
    row = table + number * 3
    key, scale = tl.load(row), tl.load(row + 1).to(tl.float64, bitcast=True).to(FLOAT)
    if BOOK == NORMAL:
        z = _normal_at(book, element, site, key, FLOAT)
    elif BOOK == RADEMACHER:
        z = _sign_at(element, site, key, FLOAT)
    else:
        signs = _sign_at(element, site, key, FLOAT)
        z = tl.where(tl.load(row + 2) == RADEMACHER, signs, _normal_at(book, element, site, key, FLOAT))
    return scale * z


@triton.jit
def element_sum(book, table, terms, element, site, BOOK: tl.constexpr, FLOAT: tl.constexpr):
    """As `tile_sum`, at any elements."""
    total = _element_term(book, table, 0, element, site, BOOK, FLOAT)
    for number in range(1, terms):
        total = total + _element_term(book, table, number, element, site, BOOK, FLOAT)
    return total
