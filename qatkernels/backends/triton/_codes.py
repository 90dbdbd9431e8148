"""Unpacks codes into operands of products: loads 32-bit words, shifts by compile-time constants, avoids conversions.

A *group* is the smallest number of words that holds a whole number of codes: one word for 1, 2, 4 or 8 bits, ``BITS``
words for 3, 5 or 7 bits, three words for 6 bits. A *unit* is four consecutive codes. A GPU converts integers to floats
slowly, so a code becomes a float without a conversion instruction: its bits are put into the mantissa of a power of
two, at the place where they have the value of the code, and the power of two is subtracted. Both steps are exact.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

from ._element import INTERPRETED
from .packing import load_codes


def group_of(bits: int) -> tuple[int, int]:
    """Return the number of words and of units in a group of codes."""
    return bits // gcd(bits, 8), 8 // gcd(bits, 8)


def by_words(bits: int, row_bytes: int, address: int, columns: int) -> bool:
    """Return whether tiles with so many columns can be loaded as 32-bit words.

    Args:
        bits: bits of a code.
        row_bytes: bytes of a row.
        address: address of the first row.
        columns: columns of a tile; a tile starts at a multiple of this.
    """
    return row_bytes % 4 == 0 and address % 4 == 0 and columns % (4 * group_of(bits)[1]) == 0


@triton.jit
def unit(words, J: tl.constexpr, BITS: tl.constexpr):
    """The ``J``-th unit of a group. Its codes start at bit 1 (at bit 0 for 8-bit codes, which fill the word)."""
    WORD: tl.constexpr = J * 4 * BITS // 32
    AT: tl.constexpr = J * 4 * BITS % 32
    if BITS == 8:
        return words[WORD]
    elif AT == 0:
        return words[WORD] << 1
    elif AT + 4 * BITS > 32:
        return (words[WORD] >> (AT - 1)) | (words[WORD + 1] << (33 - AT))
    else:
        return words[WORD] >> (AT - 1)


@triton.jit
def units(words, J: tl.constexpr, STRIDE: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """The units J, J + STRIDE, J + 2 STRIDE, ..., joined in new last dimensions of size 2."""
    if STRIDE == UNITS:
        return unit(words, J, BITS)
    else:
        return tl.join(units(words, J, 2 * STRIDE, UNITS, BITS), units(words, J + STRIDE, 2 * STRIDE, UNITS, BITS))


@triton.jit
def chosen(x, MASK: tl.constexpr, BITS: tl.constexpr):
    """(x & MASK) | BITS in one instruction (lop3), which the compiler does not generate by itself."""
    if INTERPRETED:
        return (x & MASK) | BITS
    else:
        constants = tl.full((), MASK, tl.uint32), tl.full((), BITS, tl.uint32)
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [x, constants[0], constants[1]],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def number(x, AT: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr):
    """The code that starts at bit AT of x, as an operand ``FACTOR * code + ADD``. Only integers have a factor."""
    if DOT.is_int():
        return (((x >> AT) & ((1 << BITS) - 1)).to(tl.int16) * FACTOR + ADD).to(tl.int8)
    else:
        # PLACE is the bit of the mantissa where the code goes: not 0, so that ADD may be a half, and not beyond bit 23.
        PLACE: tl.constexpr = 1 if AT == 0 or AT + BITS > 23 else AT
        if AT < PLACE:
            x = x << 1
        elif AT > PLACE:
            x = x >> (AT - PLACE)
        y = chosen(x, ((1 << BITS) - 1) << PLACE, (150 - PLACE) << 23).to(tl.float32, bitcast=True)
        return (y - (2.0 ** (23 - PLACE) - ADD)).to(DOT)


@triton.jit
def numbers(
    row_ptr, exists, first, row_bytes, BITS: tl.constexpr, WORDS: tl.constexpr, UNITS: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Operands ``[C / 4 / UNITS, R, 2, 2, ...]``. Dimension 1 is the rows, all others together are the columns."""
    row_ptr = row_ptr.to(tl.pointer_type(tl.uint32))
    words = ()  # type: tuple[tl.tensor, ...]
    for j in tl.static_range(WORDS):
        at = (first // 4 + tl.arange(0, C // 4 // UNITS) * WORDS + j)[:, None]
        words = words + (tl.load(row_ptr + at, exists & (at < row_bytes // 4), other=0),)
    x = units(words, 0, 1, UNITS, BITS)
    AT: tl.constexpr = 0 if BITS == 8 else 1
    even = tl.join(number(x, AT, BITS, DOT, FACTOR, ADD), number(x, AT + 2 * BITS, BITS, DOT, FACTOR, ADD))
    odd = tl.join(number(x, AT + BITS, BITS, DOT, FACTOR, ADD), number(x, AT + 3 * BITS, BITS, DOT, FACTOR, ADD))
    return tl.join(even, odd)


@triton.jit
def columns_first(x, R: tl.constexpr, C: tl.constexpr):
    """Return the result of `numbers` as ``[C, R]``."""
    if len(x.shape) == 4:
        x = tl.permute(x, (0, 2, 3, 1))
    elif len(x.shape) == 5:
        x = tl.permute(x, (0, 2, 3, 4, 1))
    elif len(x.shape) == 6:
        x = tl.permute(x, (0, 2, 3, 4, 5, 1))
    else:
        x = tl.permute(x, (0, 2, 3, 4, 5, 6, 1))
    return tl.reshape(x, (C, R))


@triton.jit
def operand(codes, DOT: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr):
    """Convert codes that were loaded byte by byte to operands. The conversion is exact."""
    if DOT.is_int():
        return (codes.to(tl.int16) * FACTOR + ADD).to(tl.int8)
    if ADD == 0:
        return codes.to(DOT)
    return (codes.to(tl.float32) + ADD).to(DOT)


@triton.jit
def load_operands(
    packed_ptr, row, exists, first, row_bytes, BITS: tl.constexpr, WORDS: tl.constexpr, UNITS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Operands ``[C, R]`` of a tile: rows ``[R]`` where they exist, and C columns that start at byte ``first``.

    ``WORDS`` is 0 if a tile is not a whole number of groups. Then it is loaded byte by byte.
    """
    if WORDS == 0:
        codes = load_codes(packed_ptr + row[:, None] * row_bytes, exists[:, None], first, row_bytes, BITS, C)
        return tl.trans(operand(codes, DOT, FACTOR, ADD))
    else:
        row_ptr = packed_ptr + row[None, :] * row_bytes
        x = numbers(row_ptr, exists[None, :], first, row_bytes, BITS, WORDS, UNITS, C, DOT, FACTOR, ADD)
        return columns_first(x, R, C)
