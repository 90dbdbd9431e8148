"""Packed codes: the stored form of a quantized weight, the same for every backend.

A row of K codes is a string of bits, in little-endian order. Code k, minus the smallest code of the grid, is the
unsigned number in bits ``k * bits`` to ``(k + 1) * bits - 1``. Bit i of the string is bit ``i % 8`` of byte ``i // 8``.
A row starts at a byte, and the bits after its last code are 0. The layout does not depend on a device, a tile size or a
group size.

Ternary codes take 2 bits. Five of them would fit in a byte (1.6 bits each), which saves a fifth of the memory. But
unpacking them needs multiplications where 2-bit codes need a shift. ggml has both ternary formats, and on a CPU the
denser one runs at half the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch_compat import is_fake
from ..arguments import check_integers, check_tensors
from ..grids import MIN_SCALE, Grid, check_grid, code_dtype
from ._expression import row_bytes
from ._op import define

BITS = range(1, 9)
#: Dtypes that scales may be stored in.
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def _pack(codes: Tensor, code_min: int, bits: int) -> Tensor:
    # At every bit width, eight codes take exactly `bits` bytes, and fit in a 64-bit word.
    cols, words = codes.shape[-1], -(-codes.shape[-1] // 8)
    unsigned = (codes.to(torch.int16) - code_min).to(torch.uint8)
    eights = torch.nn.functional.pad(unsigned, (0, 8 * words - cols)).unflatten(-1, (words, 8))
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for j in range(8):
        word |= eights[..., j].long() << (bits * j)
    word_bytes = torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], -1)
    return word_bytes.flatten(-2)[..., : row_bytes(cols, bits)].contiguous()


def _unpack(packed: Tensor, code_min: int, bits: int, cols: int) -> Tensor:
    words = -(-cols // 8)
    word_bytes = torch.nn.functional.pad(packed, (0, bits * words - packed.shape[-1])).unflatten(-1, (words, bits))
    word = torch.zeros(word_bytes.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= word_bytes[..., i].long() << (8 * i)
    mask, dtype = (1 << bits) - 1, code_dtype(code_min + (1 << bits) - 1)
    eights = torch.stack([((word >> (bits * j) & mask) + code_min).to(dtype) for j in range(8)], -1)
    return eights.flatten(-2)[..., :cols].contiguous()


def readable(t: Tensor) -> bool:
    """Whether the values of a tensor can be read: it is not on the meta device, and nothing is being traced."""
    return not (t.is_meta or torch.compiler.is_compiling() or is_fake(t))


#: The contract of the arguments ``code_min`` and ``bits``.
CODES = """
    require 1 <= bits <= 8; bits is {bits}, must be 1 to 8
    require code_min == 0 or -128 <= code_min <= min(0, 128 - 2 ** bits); code_min is {code_min}, must be 0, or at \
least -128 with {bits} bits that end at 127 at most
"""
PACK = define(
    "pack", "Tensor codes, int code_min, int bits",
    f"""
    {CODES}
    codes: int8|uint8 [*T, K]
    -> out: uint8 [*T, row_bytes(K, bits)]
    """,
    reference=_pack,
)  # fmt: skip
UNPACK = define(
    "unpack", "Tensor packed, int code_min, int bits, int cols",
    f"""
    {CODES}
    require cols >= 0; cols is {{cols}}, must be at least 0
    packed: uint8 [*T, row_bytes(cols, bits)]
    -> out: code(code_min + 2 ** bits - 1) [*T, cols]
    """,
    reference=_unpack,
)  # fmt: skip


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """Pack codes into bytes, with ``grid.storage_bits`` per code (2 for ternary).

    Args:
        codes: int8 or uint8 ``[..., K]``, as :func:`qatkernels.quantize` returns.
        grid: the grid of the codes.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``. The docstring of this module describes the layout.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if a code is not one of the grid.
        RuntimeError: if the dtype does not fit.
    """
    check_tensors(codes=codes)
    check_grid(grid)
    if codes.numel() and readable(codes) and codes.dtype in (torch.int8, torch.uint8):
        low, high = codes.amin().item(), codes.amax().item()
        if not grid.code_min <= low <= high <= grid.code_max:
            raise ValueError(f"codes are {low} to {high}, must be {grid.code_min} to {grid.code_max} for this grid")
    packed: Tensor = torch.ops.qatkernels.pack(codes, grid.code_min, grid.storage_bits)
    return packed


def unpack(packed: Tensor, grid: Grid, cols: int) -> Tensor:
    """Return the codes ``[..., cols]`` that :func:`pack` packed.

    Args:
        packed: uint8 ``[..., ceil(cols * bits / 8)]``.
        grid: the grid of the codes.
        cols: number of codes in a row.

    Raises:
        TypeError: if an argument has another type, naming it.
        RuntimeError: if shape or dtype do not fit.
    """
    check_tensors(packed=packed)
    check_grid(grid)
    check_integers(cols=cols)
    codes: Tensor = torch.ops.qatkernels.unpack(packed, grid.code_min, grid.storage_bits, cols)
    return codes


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype that they are stored in. Scales below 1e-5 become 1e-5, as kernels treat them.

    Raises:
        ValueError: if scales cannot be stored in this dtype, or a scale is not finite in it.
    """
    if dtype not in SCALES:
        raise ValueError(f"scale_dtype is {dtype}, must be one of {SCALES}")
    stored = scale.clamp_min(MIN_SCALE).to(dtype)  # 1e-5 is rounded up in both 16-bit dtypes, so it stays >= 1e-5
    if readable(stored) and not stored.isfinite().all():
        raise ValueError(f"scale is up to {scale.abs().max().item()}, must be finite in {dtype}")
    return stored
