"""Codes as bits: the stored form of a quantized weight, the same for every backend.

A row of K codes is one string of bits, little end first: code k minus the smallest code of the grid is the unsigned
number in bits ``k * bits ... (k + 1) * bits - 1``, and bit i of the string is bit ``i % 8`` of byte ``i // 8``. Rows
start on a byte; the bits after the last code of a row are 0. Nothing depends on a device, a tile or a group size.

Ternary codes take 2 bits. Five of them fit a byte (1.6 bits), a fifth less memory, but taking them apart is
multiplications where others need a shift: the ternary formats of ggml differ in just this, and on a CPU the denser one
runs at half the speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import is_fake
from ..arguments import check_dtype, check_integers, check_optional_tensors, check_tensors
from ..grids import MIN_SCALE, Grid, check_grid
from ._op import define
from .contract import row_bytes
from .fake_quantize import check_layout
from .quantize import dequantize, quantize

BITS = range(1, 9)
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def code_dtype(code_min: int, bits: int) -> torch.dtype:
    """Return the dtype of unpacked codes."""
    return torch.uint8 if code_min + (1 << bits) - 1 > 127 else torch.int8


def _pack(codes: Tensor, code_min: int, bits: int) -> Tensor:
    # Eight codes are `bits` whole bytes and fit one 64-bit word, whatever the width.
    cols, words = codes.shape[-1], -(-codes.shape[-1] // 8)
    unsigned = (codes.to(torch.int16) - code_min).to(torch.uint8)
    eights = torch.nn.functional.pad(unsigned, (0, 8 * words - cols)).unflatten(-1, (words, 8))
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for j in range(8):
        word |= eights[..., j].long() << (bits * j)
    every = torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], -1)
    return every.flatten(-2)[..., : row_bytes(cols, bits)].contiguous()


def _unpack(packed: Tensor, code_min: int, bits: int, cols: int) -> Tensor:
    words = -(-cols // 8)
    every = torch.nn.functional.pad(packed, (0, bits * words - packed.shape[-1])).unflatten(-1, (words, bits))
    word = torch.zeros(every.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= every[..., i].long() << (8 * i)
    mask, dtype = (1 << bits) - 1, code_dtype(code_min, bits)
    eights = torch.stack([((word >> (bits * j) & mask) + code_min).to(dtype) for j in range(8)], -1)
    return eights.flatten(-2)[..., :cols].contiguous()


def readable(t: Tensor) -> bool:
    """Whether a tensor has values that can be looked at: not on the meta device, and while nothing is traced."""
    return not (t.is_meta or torch.compiler.is_compiling() or is_fake(t))


#: The contract of a packed code.
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
    """Pack codes into bytes, ``grid.storage_bits`` each (2 for ternary).

    Args:
        codes: int8 or uint8 ``[..., K]``, as :func:`qatkernels.quantize` returns.
        grid: the grid they belong to.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``; the layout is the string of bits of this module's docstring.

    Raises:
        TypeError: if an argument is of another type, naming it.
        ValueError: if a code does not belong to the grid.
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
    """Return the codes ``[..., cols]`` that :func:`pack` was given.

    Args:
        packed: uint8 ``[..., ceil(cols * bits / 8)]``.
        grid: the grid of the codes.
        cols: codes in a row.

    Raises:
        TypeError: if an argument is of another type, naming it.
        RuntimeError: if shape or dtype do not fit.
    """
    check_tensors(packed=packed)
    check_grid(grid)
    check_integers(cols=cols)
    codes: Tensor = torch.ops.qatkernels.unpack(packed, grid.code_min, grid.storage_bits, cols)
    return codes


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class PackedWeight:
    """A weight ``[..., N, K]`` as packed codes and what turns them back into numbers.

    Attributes:
        packed: uint8 ``[..., N, ceil(K * bits / 8)]``.
        scale: float32, bfloat16 or float16 ``[..., N, K / group_size]``, one column if a row shares a scale.
        zero_point: float32 like ``scale``, or None.
        grid: the grid of the codes.
        cols: K.
        bits: bits of a stored code, of the grid.
        constants: the constants of the grid, as ops take them.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    cols: int
    bits: int = field(init=False, repr=False)
    constants: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_tensors(packed=self.packed, scale=self.scale)
        check_optional_tensors(zero_point=self.zero_point)
        check_grid(self.grid)
        check_integers(cols=self.cols)
        if self.cols < 0:
            raise ValueError(f"cols is {self.cols}, must be at least 0")
        # Read at every call: attributes, as properties cost as much as a small product.
        object.__setattr__(self, "bits", self.grid.storage_bits)
        object.__setattr__(self, "constants", list(self.grid.constants))
        wanted = (*self.scale.shape[:-1], row_bytes(self.cols, self.bits))
        if self.packed.dtype != torch.uint8 or self.packed.ndim < 2 or tuple(self.packed.shape) != wanted:
            raise ValueError(
                f"packed is {self.packed.dtype} of shape {tuple(self.packed.shape)}, must be torch.uint8 of shape "
                f"{wanted} for {self.cols} columns at {self.bits} bits and a scale of shape {tuple(self.scale.shape)}"
            )
        if self.scale.dtype not in SCALES:
            raise ValueError(f"scale is {self.scale.dtype}, must be one of {SCALES}")
        if self.scale.shape[-1] < 1 or self.cols % self.scale.shape[-1]:
            raise ValueError(f"scale has {self.scale.shape[-1]} columns, must divide the {self.cols} of the weight")
        z = self.zero_point
        if z is not None and (z.shape != self.scale.shape or z.dtype != torch.float32):
            raise ValueError(
                f"zero_point is {z.dtype} of shape {tuple(z.shape)}, must be torch.float32 of shape "
                f"{tuple(self.scale.shape)} like scale"
            )
        if z is not None and not self.grid.has_zero_point:
            raise ValueError(f"zero_point is given, but scheme {self.grid.scheme!r} has none, only 'affine' has")

    @classmethod
    def from_float(
        cls,
        w: Tensor,
        scale: Tensor,
        grid: Grid,
        group_size: int | None = None,
        *,
        zero_point: Tensor | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedWeight:
        """Quantize and pack a weight; in float32 scales :meth:`dequantize` is `fake_quantize`, bit for bit.

        Args:
            w: weight ``[..., N, K]``.
            scale: as for :func:`qatkernels.fake_quantize`.
            grid: the quantization grid.
            group_size: as for :func:`qatkernels.fake_quantize`.
            zero_point: as for :func:`qatkernels.fake_quantize`.
            scale_dtype: dtype that scales are stored in. Codes are those of the scale as it was given.

        Raises:
            TypeError: if an argument is of another type, naming it.
            ValueError: if shapes do not fit, ``w`` has NaN, a scale or zero point is not finite, or ``scale_dtype``
                cannot hold it.
            RuntimeError: if a dtype or device does not fit.
        """
        check_tensors(w=w)
        check_dtype(scale_dtype, name="scale_dtype")
        if w.ndim < 2:
            raise ValueError(f"w has shape {tuple(w.shape)}, must have at least two dimensions")
        check_layout(w, scale, grid, group_size, zero_point)
        if readable(w) and w.isnan().any():
            raise ValueError(f"w has NaN in {int(w.isnan().sum())} of {w.numel()} elements, no code stands for it")
        if zero_point is not None and readable(zero_point) and not zero_point.isfinite().all():
            odd = zero_point[~zero_point.isfinite()][0].item()
            raise ValueError(f"zero_point has an element {odd}, must be finite")
        codes = quantize(w, scale, grid, group_size=group_size, zero_point=zero_point)

        def by_row(t: Tensor) -> Tensor:
            t = t.detach().float()
            if group_size is not None:
                return t.contiguous()
            return t.reshape(t.shape + (1,) * (w.ndim - t.ndim)).expand(*w.shape[:-1], 1).contiguous()

        zero = None if zero_point is None else by_row(zero_point)
        return cls(pack(codes, grid), store_scale(by_row(scale), scale_dtype), zero, grid, w.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.packed.shape[:-1], self.cols))

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; K where a row does."""
        return self.cols // self.scale.shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero_point) if t is not None)

    def to(self, device: Any) -> PackedWeight:
        """Return the same weight on another device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, packed=self.packed.to(device), scale=self.scale.to(device), zero_point=zero)

    def codes(self) -> Tensor:
        """Return the integer codes ``[..., N, K]``."""
        return unpack(self.packed, self.grid, self.cols)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[..., N, K]`` in a floating point dtype."""
        check_dtype(dtype)
        return dequantize(
            self.codes(), self.scale.float(), self.grid, group_size=self.group_size if self.cols else None,
            zero_point=self.zero_point, dtype=dtype,
        )  # fmt: skip


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype they are stored in, none below the smallest scale that a kernel honours.

    Raises:
        ValueError: if the dtype is not one for scales, or a scale is not finite in it.
    """
    if dtype not in SCALES:
        raise ValueError(f"scale_dtype is {dtype}, must be one of {SCALES}")
    stored = scale.clamp_min(MIN_SCALE).to(dtype)  # 1e-5 rounds upwards in both 16-bit floats
    if readable(stored) and not stored.isfinite().all():
        raise ValueError(f"scale is up to {scale.abs().max().item()}, must be finite in {dtype}")
    return stored
