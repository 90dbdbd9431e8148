"""Packed codes as operands of products: 32-bit words from memory, shifts known at compile time, no conversions.

A *group* is the fewest words that hold whole codes: one word of 1, 2, 4 or 8 bits, ``BITS`` words of 3, 5 or 7 and
three of 6. A *unit* is four codes in one word. A code becomes a float without a conversion, for which a GPU has few
units: its bits replace those of the mantissa of a power of two, where each counts as much as it does in the code, and
the power is subtracted. Both steps are exact.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

from ._element import INTERPRETED
from .packing import load_codes


def group_of(bits: int) -> tuple[int, int]:
    """Return how many words a group of codes has, and how many units."""
    return bits // gcd(bits, 8), 8 // gcd(bits, 8)


def by_words(bits: int, row_bytes: int, address: int, columns: int) -> bool:
    """Return whether tiles of so many columns can be loaded as words.

    Args:
        bits: bits of a code.
        row_bytes: bytes of a row.
        address: where the first row starts.
        columns: columns of a tile, which starts at a multiple of them.
    """
    return row_bytes % 4 == 0 and address % 4 == 0 and columns % (4 * group_of(bits)[1]) == 0


@triton.jit
def unit(words, J: tl.constexpr, BITS: tl.constexpr):
    """The ``J``-th four codes of a group, from bit 1 on (8-bit ones, which fill a word, from bit 0 on)."""
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
    """Every ``STRIDE``-th unit from the ``J``-th on, in new last dimensions of 2."""
    if STRIDE == UNITS:
        return unit(words, J, BITS)
    else:
        return tl.join(units(words, J, 2 * STRIDE, UNITS, BITS), units(words, J + STRIDE, 2 * STRIDE, UNITS, BITS))


@triton.jit
def chosen(x, MASK: tl.constexpr, BITS: tl.constexpr):
    """The bits of x under a mask, with other bits set: one instruction, which the compiler would not find."""
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
    """The code at a bit of x as an operand, ``FACTOR * code + ADD``; a factor only for integers."""
    if DOT.is_int():
        return (((x >> AT) & ((1 << BITS) - 1)).to(tl.int16) * FACTOR + ADD).to(tl.int8)
    else:
        # At bit 0 a half could not be added; beyond bit 23 there is no mantissa.
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
    """Operands ``[C / 4 / UNITS, R, 2, 2, ...]``, whose dimensions but the second are the columns."""
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
    """What `numbers` returns as ``[C, R]``."""
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
    """Stored codes that were loaded by bytes as operands, which hold them exactly."""
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
    """Operands ``[C, R]``: columns of a tile from the byte ``first`` on, of rows ``[R]`` that exist.

    ``WORDS`` is 0 where tiles are no whole groups of words; then they are loaded by bytes.
    """
    if WORDS == 0:
        codes = load_codes(packed_ptr + row[:, None] * row_bytes, exists[:, None], first, row_bytes, BITS, C)
        return tl.trans(operand(codes, DOT, FACTOR, ADD))
    else:
        row_ptr = packed_ptr + row[None, :] * row_bytes
        x = numbers(row_ptr, exists[None, :], first, row_bytes, BITS, WORDS, UNITS, C, DOT, FACTOR, ADD)
        return columns_first(x, R, C)
