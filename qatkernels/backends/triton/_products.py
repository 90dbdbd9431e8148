"""How a product with a packed weight is cut into tiles: the configurations as data, and the choice among them.

The choice depends on shapes and the generation of the GPU alone, so that sums are added in one order; how many tokens
each expert has is known on the device only, so a stack of experts is cut for their average. None of these numbers was
measured on a GPU: they are the sizes that products of this kind use elsewhere, and what compiles without spills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton

PROGRAMS = 264  # two for each processor of an H100; fewer tiles than that are split along the sum
MIN_BLOCK = {True: 32, False: 16}  # the smallest side of a tile along the sum, of integer products and of others
NARROW = 32  # columns of a tile that takes registers: zero points or parts at each step, codes by bytes
MAX_INTEGERS = 65536  # products of -127 ... 127 and 0 ... 255 that 32 bits can sum


@dataclass(frozen=True)
class Config:
    """One row of the table.

    Attributes:
        capability: compute capability from which on it applies.
        kind: what is multiplied: ``"rows"`` 8-bit or 16-bit numbers, scaled at the end; ``"groups"`` the same, scaled
            at each step; ``"parts"`` float32 numbers in parts; ``"ieee"`` float32 numbers without tensor cores.
        tokens: up to so many tokens, of an expert on average.
        block_m: rows of an output tile.
        block_n: columns of an output tile.
        block_k: terms of a sum that a step adds.
        warps: warps of a program.
        stages: tiles in flight.
        split: most parts of a sum that programs share.
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
    # 4 warps of 128 columns: two blocks, of which one multiplies while the other one decodes.
    Config((9, 0), "rows", 16, 16, 32, 128, 4, 4, 16),
    Config((9, 0), "rows", 64, 64, 64, 128, 4, 3, 8),
    Config((9, 0), "rows", ANY, 128, 128, 64, 4, 3, 4),
    Config((9, 0), "groups", 16, 16, 32, 128, 4, 4, 16),
    Config((9, 0), "groups", 64, 64, 64, 128, 4, 3, 8),
    Config((9, 0), "groups", ANY, 128, 64, 128, 8, 2, 4),
    Config((9, 0), "parts", 16, 16, 128, 32, 4, 3, 16),
    Config((9, 0), "parts", 64, 64, 64, 64, 4, 3, 8),
    Config((9, 0), "parts", ANY, 128, 128, 64, 8, 3, 4),
    Config((8, 0), "rows", 16, 16, 32, 128, 4, 4, 16),
    Config((8, 0), "rows", 64, 64, 64, 64, 4, 3, 8),
    Config((8, 0), "rows", ANY, 128, 64, 64, 8, 3, 4),
    Config((8, 0), "groups", 16, 16, 32, 128, 4, 4, 16),
    Config((8, 0), "groups", 64, 64, 64, 64, 4, 3, 8),
    Config((8, 0), "groups", ANY, 128, 64, 64, 8, 3, 4),
    Config((8, 0), "parts", 16, 16, 64, 32, 4, 3, 16),
    Config((8, 0), "parts", ANY, 64, 64, 32, 4, 3, 8),
    # Triton 3.6 takes float32 tiles of 64 rows to Blackwell's tensor cores, as TF32, whatever precision is asked for.
    Config((10, 0), "ieee", 16, 16, 32, 32, 4, 2, 16),
    Config((10, 0), "ieee", ANY, 32, 64, 16, 4, 2, 4),
    Config((8, 0), "ieee", 16, 16, 32, 32, 4, 2, 16),
    Config((8, 0), "ieee", ANY, 64, 64, 16, 8, 2, 4),
)  # fmt: skip


def choose(capability: tuple[int, int], kind: str, tokens: int) -> Config:
    """Return the first row of the table that fits; devices older than every row get the oldest ones."""
    capability = max(capability, min(c.capability for c in CONFIGS))
    return next(c for c in CONFIGS if c.capability <= capability and c.kind == kind and tokens <= c.tokens)


def by_elements(config: Config) -> Config:
    """Return a configuration for tiles that are loaded element by element, whose addresses take registers."""
    if config.block_m * config.block_k <= 64 * 64:
        return config
    return replace(config, block_n=min(config.block_n, 64), block_k=min(config.block_k, 64), warps=8)


def common_block(block: int, size: int, least: int) -> int | None:
    """Return the largest power of two up to ``block`` that divides ``size``, or None if it is below ``least``."""
    common = min(block, size & -size)
    return common if common >= least else None


def fitted(config: Config, tokens: int, outputs: int, terms: int, least: int) -> Config:
    """Return a configuration for one shape: no tile much larger than the matrix, and as many parts as keep a GPU busy.

    Args:
        config: a row of the table, its blocks possibly made smaller.
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
    split = 1 << (split.bit_length() - 1)  # few variants to compile
    return replace(config, block_n=block_n, block_k=block_k, split=split)


def distinct(plan: Callable[[int], Any]) -> list[int]:
    """Return the fewest tokens for each different plan that any number of tokens has."""
    found: dict[Any, int] = {}
    step = min(c.block_m for c in CONFIGS)  # between its multiples nothing changes
    most = max(c.block_m for c in CONFIGS) * PROGRAMS  # from there on a product has tiles enough not to be split
    for tokens in range(1, most + step, step):
        found.setdefault(plan(tokens), tokens)
    return list(found.values())
