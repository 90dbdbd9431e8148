"""A packed weight as the arguments of kernels, and its codes as exact operands of products."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.packing import row_bytes
from ._codes import by_words, group_of
from ._element import INTERPRETED
from ._products import Config

BY_ROW, BY_TILE, BY_ELEMENT = 0, 1, 2  # scales multiply whole sums, the sum of each tile, or each element
#: From so many terms of a sum on two bfloat16 parts are enough: their error is a quarter of the float32 sum's.
ENOUGH_TERMS = 1024

_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def operand_type(dtype: torch.dtype, scales: int, parts: int) -> Any:
    """Return the dtype of operands. The interpreter would multiply bfloat16 as integers, so it uses float32."""
    dot = tl.float32 if scales == BY_ELEMENT else tl.bfloat16 if parts > 1 else _DOTS[dtype]
    return tl.float32 if INTERPRETED and dot == tl.bfloat16 else dot


@lru_cache
def processors(device: torch.device) -> int:
    """Return how many programs process the tiles of experts."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def whole_codes(shift: float, bits: int, zero: bool, integer: bool) -> tuple[int, float, bool]:
    """Return (factor, addend, sums): operands are ``factor * code + addend``; ``sums`` says if sums of x are needed.

    Args:
        shift: smallest code + offset of the grid.
        bits: bits of a stored code.
        zero: whether there is a zero point, which is not known at compile time.
        integer: whether operands are int8. Floats hold multiples of 1/2 up to 128, and integers up to 256, exactly.
    """
    most = (1 << bits) - 1
    if not integer:
        exact = (2 * shift).is_integer() and ((shift >= -128 and most + shift <= 128) or shift == 0)
        return (1, shift, False) if exact and not zero else (1, 0.0, True)
    factor = 1 if float(shift).is_integer() else 2
    if not zero and (factor * shift).is_integer() and factor * shift >= -128 and factor * (most + shift) <= 127:
        return factor, int(factor * shift), False
    return 1, (-128 if bits == 8 else 0), True


class Weight:
    """A packed weight, with the arguments that the kernels take."""

    def __init__(
        self, packed: Tensor, scale: Tensor, zero_point: Tensor | None, offsets: Tensor | None, grid: list[float],
        code_min: int, bits: int, cols: int,
    ) -> None:  # fmt: skip
        self.packed, self.scale, self.zero, self.offsets = packed, scale, zero_point, offsets
        self.bits, self.cols, self.outputs, self.groups = bits, cols, packed.shape[-2], scale.shape[-1]
        self.group_size = cols // self.groups
        self.experts = 1 if offsets is None else packed.shape[0]
        self.steps, self.shift = grid[1], code_min + grid[2]
        self.row_bytes = row_bytes(cols, bits)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """Codes, scales and zero points. The scales replace absent zero points; flags prevent that they are read."""
        return self.packed, self.scale, self.scale if self.zero is None else self.zero

    @property
    def sizes(self) -> tuple[int, ...]:
        """Run-time sizes."""
        return self.outputs, self.cols, self.row_bytes, self.groups, self.experts

    def whole_words(self, columns: int) -> bool:
        """Whether tiles of so many columns are loaded as 32-bit words, not as bytes."""
        return by_words(self.bits, self.row_bytes, self.packed.data_ptr(), columns)

    def constants(self, columns: int) -> dict[str, Any]:
        """Compile-time arguments that both kernels share; ``columns`` of the weight are in a tile."""
        grouped = self.offsets is not None
        words, units = group_of(self.bits)
        words = words if self.whole_words(columns) else 0
        # With a single group every tile is in group 0.
        group = self.group_size if self.groups > 1 else 1 << 30
        return {
            "BITS": self.bits, "STEPS": self.steps, "SHIFT": self.shift, "ZERO": self.zero is not None,
            "GROUP": group, "WORDS": words, "UNITS": units, "GROUPED": grouped,
            "EXPERTS": triton.next_power_of_2(self.experts + 1) if grouped else 1,
        }  # fmt: skip

    def programs(self, config: Config, tokens: int, columns: int) -> int:
        """Return the programs of a launch: one for each tile, or with experts as many as the GPU runs at once."""
        tiles = triton.cdiv(tokens, config.block_m)
        if self.offsets is None:
            return tiles * triton.cdiv(columns, config.block_n) * config.split
        bound = (tiles + self.experts + 1) * triton.cdiv(columns, config.block_n) * config.split
        return min(bound, processors(self.packed.device))
