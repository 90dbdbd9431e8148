"""Tilings of products with a packed weight: the configurations as a table, and the choice of one.

The choice depends only on the shapes and the generation of the GPU, so that the order of a sum is always the same. The
number of tokens of each expert is known only on the device, so a stack of experts uses the average. Only the rows that
say so were measured. The others are common sizes for such products, and they compile without register spills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton

PROGRAMS = 264  # two for each multiprocessor of an H100; with fewer tiles the sum is split (split-K)
SMALLEST = 16  # of a tile, in each direction
#: Smallest block_k of integer products, and where codes are halves of loaded bytes. There Triton 3.6 gives each of the
#: four threads that share a row of an operand eight consecutive terms, whatever block_k is. Of a tile with 16 terms it
#: would count half twice and omit the others.
MIN_TERMS = 32
NARROW = 32  # block_n of variants that need many registers: zero points or parts at each step, codes loaded by bytes
#: block_n of variants on Hopper whose registers would spill with 128 columns: few tokens with zero points or more than
#: 4 bits, and any number of tokens with both.
NARROW_HOPPER = 64
HOPPER = (9, 0)
MAX_INTEGERS = 65536  # so many products of -127 ... 127 and 0 ... 255 fit a 32-bit sum


@dataclass(frozen=True)
class Config:
    """One row of the table.

    Attributes:
        capability: it applies to this compute capability and newer ones.
        kind: ``"rows"``: 8-bit or 16-bit operands, scaled after the sum; ``"groups"``: the same, scaled at each step;
            ``"parts"``: float32 split into bfloat16 parts; ``"ieee"``: float32 without tensor cores.
        tokens: it applies up to so many tokens (of an expert, on average).
        block_m: rows of an output tile.
        block_n: columns of an output tile.
        block_k: terms of the sum in one step.
        warps: warps of a program.
        stages: stages of the software pipeline.
        split: maximum number of programs that share one sum (split-K).
    """

    capability: tuple[int, int]
    kind: str
    tokens: float
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int


ANY = float("inf")
#: For each kind: the newest capability first, then the fewest tokens first.
CONFIGS = (
    Config((10, 0), "rows", 16, 16, 32, 128, 4, 4, 16),
    Config((10, 0), "rows", 64, 64, 64, 64, 4, 3, 8),
    Config((10, 0), "rows", ANY, 128, 64, 32, 8, 3, 4),
    Config((10, 0), "groups", 16, 16, 32, 128, 4, 4, 16),
    Config((10, 0), "groups", 64, 64, 32, 64, 4, 3, 8),
    Config((10, 0), "groups", ANY, 64, 32, 64, 4, 3, 4),
    Config((10, 0), "parts", 16, 16, 64, 32, 4, 3, 16),
    Config((10, 0), "parts", ANY, 64, 64, 32, 4, 3, 8),
    # "rows" up to 64 tokens and "groups" were the fastest of five to ten on an H100, for a weight of 8192 x 28672.
    # 4 warps and 128 columns: two blocks fit a multiprocessor, so one can multiply while the other decodes.
    Config(HOPPER, "rows", 16, 16, 128, 128, 4, 4, 16),
    Config(HOPPER, "rows", 64, 64, 128, 128, 4, 3, 8),
    Config(HOPPER, "rows", ANY, 128, 128, 64, 4, 3, 4),
    Config(HOPPER, "groups", 16, 16, 128, 128, 4, 3, 16),
    Config(HOPPER, "groups", 64, 64, 128, 64, 4, 3, 8),
    Config(HOPPER, "groups", ANY, 64, 128, 128, 4, 3, 4),
    Config(HOPPER, "parts", 16, 16, 128, 32, 4, 3, 16),
    Config(HOPPER, "parts", 64, 64, 64, 64, 4, 3, 8),
    Config(HOPPER, "parts", ANY, 128, 128, 64, 8, 3, 4),
    Config((8, 0), "rows", 16, 16, 32, 128, 4, 4, 16),
    Config((8, 0), "rows", 64, 64, 64, 64, 4, 3, 8),
    Config((8, 0), "rows", ANY, 128, 64, 64, 8, 3, 4),
    Config((8, 0), "groups", 16, 16, 32, 128, 4, 4, 16),
    Config((8, 0), "groups", 64, 64, 64, 64, 4, 3, 8),
    Config((8, 0), "groups", ANY, 128, 64, 64, 8, 3, 4),
    Config((8, 0), "parts", 16, 16, 64, 32, 4, 3, 16),
    Config((8, 0), "parts", ANY, 64, 64, 32, 4, 3, 8),
    # Triton 3.6 multiplies float32 tiles of 64 rows as TF32 on Blackwell, whatever input_precision says.
    Config((10, 0), "ieee", 16, 16, 32, 32, 4, 2, 16),
    Config((10, 0), "ieee", ANY, 32, 64, 16, 4, 2, 4),
    Config((8, 0), "ieee", 16, 16, 32, 32, 4, 2, 16),
    Config((8, 0), "ieee", ANY, 64, 64, 16, 8, 2, 4),
)  # fmt: skip


def choose(capability: tuple[int, int], kind: str, tokens: int) -> Config:
    """Return the first row of the table that applies. Devices older than every row use the oldest rows."""
    capability = max(capability, min(c.capability for c in CONFIGS))
    return next(c for c in CONFIGS if c.capability <= capability and c.kind == kind and tokens <= c.tokens)


def by_elements(config: Config) -> Config:
    """Return a configuration for tiles that are loaded element by element. Their addresses need registers."""
    if config.block_m * config.block_k <= 64 * 64:
        return config
    return replace(config, block_n=min(config.block_n, 64), block_k=min(config.block_k, 64), warps=8)


def least_terms(bits: int, words: bool, integer: bool) -> int:
    """Return the smallest ``block_k``.

    Args:
        bits: bits of a code.
        words: whether codes are loaded as 32-bit words.
        integer: whether operands are integers.
    """
    return MIN_TERMS if integer or (bits < 8 and 8 % bits == 0 and not words) else SMALLEST


def common_block(block: int, size: int, least: int) -> int | None:
    """Return the largest power of two up to ``block`` that divides ``size``, or None if it is below ``least``."""
    common = min(block, size & -size)
    return common if common >= least else None


def fitted(config: Config, tokens: int, outputs: int, terms: int, least: int) -> Config:
    """Adapt a configuration to a shape: no tile much larger than the matrix, and enough programs to fill a GPU.

    Args:
        config: a row of the table; its blocks may be smaller.
        tokens: rows of the output.
        outputs: columns of the output.
        terms: terms of a sum.
        least: smallest ``block_k``.
    """
    block_n = min(config.block_n, max(16, triton.next_power_of_2(outputs)))
    block_k = min(config.block_k, max(least, triton.next_power_of_2(terms)))
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, block_n)
    steps = triton.cdiv(terms, block_k)
    split = max(1, min(config.split, PROGRAMS // tiles, steps // 2))
    split = 1 << (split.bit_length() - 1)  # a power of two, so that few variants are compiled
    return replace(config, block_n=block_n, block_k=block_k, split=split)


def distinct(plan: Callable[[int], Any]) -> list[int]:
    """Return, for each different plan, the smallest number of tokens that has it."""
    found: dict[Any, int] = {}
    step = min(c.block_m for c in CONFIGS)  # plans change only at multiples of this
    most = max(c.block_m for c in CONFIGS) * PROGRAMS  # with more tokens no product is split
    for tokens in range(1, most + step, step):
        found.setdefault(plan(tokens), tokens)
    return list(found.values())
