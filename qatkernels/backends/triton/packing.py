"""Packs and unpacks codes in Triton.

A code of 1, 2, 4 or 8 bits is in one byte: a tile of bytes is loaded once, and split in halves in registers until each
element is a code. Other codes may cross a byte: each code loads the byte where it starts, and the next one if needed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._element import OPTIONS
from ._launchers import launches
from ._rows import tiling


@triton.jit
def load_codes(row_ptr, exists, first, row_bytes, BITS: tl.constexpr, C: tl.constexpr):
    """Stored codes (code - code_min) ``[R, C]`` as uint8, of the rows at ``row_ptr`` ``[R, 1]``.

    ``first`` is the byte where the tile starts; a code must start there. Elements that do not exist are 0.
    """
    if 8 % BITS == 0:
        byte = (first + tl.arange(0, C * BITS // 8))[None, :]
        codes = tl.load(row_ptr + byte, exists & (byte < row_bytes), other=0)
        if BITS <= 4:
            codes = halves(codes, 4)
        if BITS <= 2:
            codes = halves(codes, 2)
        if BITS == 1:
            codes = halves(codes, 1)
        return codes
    bit = tl.arange(0, C) * BITS
    byte = (first + bit // 8)[None, :]
    shift = (bit % 8)[None, :]
    low = tl.load(row_ptr + byte, exists & (byte < row_bytes), other=0).to(tl.int32)
    crosses = (shift + BITS > 8) & (byte + 1 < row_bytes)
    high = tl.load(row_ptr + byte + 1, exists & crosses, other=0).to(tl.int32)
    return (((low | (high << 8)) >> shift) & ((1 << BITS) - 1)).to(tl.uint8)


@triton.jit
def halves(x, BITS: tl.constexpr):
    """The lower and the upper half of each element of ``[R, C]``, next to each other: ``[R, 2 C]``."""
    return tl.reshape(tl.join(x & ((1 << BITS) - 1), x >> BITS), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def pack_kernel(
    codes_ptr, packed_ptr, rows, cols, row_bytes, chunks,
    BITS: tl.constexpr, CODE_MIN: tl.constexpr, TOUCHED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = ((program // chunks).to(tl.int64) * R + tl.arange(0, R))[:, None]
    byte = ((program % chunks).to(tl.int64) * C + tl.arange(0, C))[None, :]
    mask = (row < rows) & (byte < row_bytes)
    packed = tl.zeros((R, C), tl.int32)
    for i in tl.static_range(TOUCHED):
        k = byte * 8 // BITS + i
        code = tl.load(codes_ptr + row * cols + k, mask & (k < cols), other=CODE_MIN).to(tl.int32) - CODE_MIN
        shift = tl.maximum(8 + byte * 8 - k * BITS, 0).to(tl.int32)  # 0: the code starts after this byte
        packed |= ((code << 8) >> shift) & 255
    tl.store(packed_ptr + row * row_bytes + byte, packed.to(tl.uint8), mask)


@triton.jit
def unpack_kernel(
    packed_ptr, codes_ptr, rows, cols, row_bytes, chunks,
    BITS: tl.constexpr, CODE_MIN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = ((program // chunks).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = (program % chunks).to(tl.int64)
    column = (chunk * C + tl.arange(0, C))[None, :]
    codes = load_codes(packed_ptr + row * row_bytes, row < rows, chunk * (C * BITS // 8), row_bytes, BITS, C)
    codes = codes.to(tl.int32) + CODE_MIN
    tl.store(codes_ptr + row * cols + column, codes.to(codes_ptr.dtype.element_ty), (row < rows) & (column < cols))


def codes_in_a_byte(bits: int) -> int:
    """Return the largest number of codes that have a bit in one byte."""
    return max((8 * byte + 7) // bits - 8 * byte // bits + 1 for byte in range(bits))


@launches("pack")
def pack_out(codes: Tensor, code_min: int, bits: int, out: Tensor) -> None:
    """Write the packed codes. Arguments as the op's."""
    if out.numel() == 0:
        return
    cols, row_bytes = codes.shape[-1], out.shape[-1]
    tiles = tiling(out.numel() // row_bytes, row_bytes, chunk_columns=1)
    pack_kernel[(tiles.programs,)](
        codes, out, out.numel() // row_bytes, cols, row_bytes, tiles.chunks, BITS=bits, CODE_MIN=code_min,
        TOUCHED=codes_in_a_byte(bits), R=tiles.tile_rows, C=tiles.tile_cols, **OPTIONS,
    )  # fmt: skip


@launches("unpack")
def unpack_out(packed: Tensor, code_min: int, bits: int, cols: int, out: Tensor) -> None:
    """Write the codes. Arguments as the op's."""
    if out.numel() == 0:
        return
    rows, row_bytes = out.numel() // cols, packed.shape[-1]
    tiles = tiling(rows, max(cols, 8), chunk_columns=1)  # a whole number of bytes
    unpack_kernel[(tiles.programs,)](
        packed, out, rows, cols, row_bytes, tiles.chunks, BITS=bits, CODE_MIN=code_min,
        R=tiles.tile_rows, C=tiles.tile_cols, **OPTIONS,
    )  # fmt: skip
