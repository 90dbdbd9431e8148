"""Blocks of GGUF (llama.cpp), written from integers and steps, never derived anew from values.

Each type stores blocks of consecutive elements of a row. With ``d`` and ``m`` as float16 and ``q`` unsigned,

    Q8_0, Q4_0, Q5_0, Q6_K, Q3_K    value = d * (q - zero)
    TQ1_0, TQ2_0, Q2_0              value = d * (q - 1)
    Q1_0                            value = d * (2 * q - 1)
    Q4_1                            value = d * q + m
    Q2_K, Q4_K, Q5_K                value = d * a * q - d * b    a, b: small integers of the block

Types whose name ends in K have 256 elements to a block, with a scale for every 16 or 32 of them. All of these get the
same value here, so that one float16 carries the step of the whole block; rows or groups that are multiples of 256
fit exactly.

The layouts are those of ggml (ggml-quants.h, ggml-common.h; MIT), read in llama.cpp of October 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..arithmetic import quotient
from .integers import IntegerWeight, UnfitError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Block:
    """One type of block.

    Attributes:
        name: its name in GGUF.
        number: its number in GGUF.
        size: elements of a block.
        nbytes: bytes of a block.
        write: returns the bytes ``[N, K / size, nbytes]`` of a weight that has a step for each block, or raises
            UnfitError.
    """

    name: str
    number: int
    size: int
    nbytes: int
    write: Callable[[IntegerWeight], Array]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, steps included."""
        return 8 * self.nbytes / self.size

    def encode(self, weight: IntegerWeight) -> Array:
        """Return the rows of a weight as bytes ``[N, K / size * nbytes]``.

        Raises:
            UnfitError: if this type does not hold the weight exactly.
        """
        written = self.write(weight.by_block(self.size))
        assert written.shape[1:] == (weight.integers.shape[1] // self.size, self.nbytes), written.shape
        return written.reshape(len(written), -1)


def _half(steps: Array) -> Array:
    """Return numbers as the two bytes of a float16 each.

    Raises:
        UnfitError: if float16 does not hold one of them.
    """
    with np.errstate(over="ignore"):
        half = steps.astype(np.float16)
    if (lost := half.astype(np.float32) != steps).any():
        raise UnfitError(
            f"{int(lost.sum())} of {lost.size} scales are not float16 numbers: train with "
            "QuantConfig(scale_dtype=torch.float16), or export with convert=True, which rounds them"
        )
    return half[..., None].view(np.uint8)


def _signed(weight: IntegerWeight, low: int, high: int) -> tuple[Array, Array]:
    """Return integers ``[N, blocks, size]`` within low to high, and steps ``[N, blocks]``.

    Raises:
        UnfitError: if an integer is out of range.
    """
    integers, steps = weight.integers.numpy(), weight.steps.numpy()
    if integers.size and (integers.min() < low or integers.max() > high):
        raise UnfitError(f"its integers are {integers.min()} to {integers.max()}, the type holds {low} to {high}")
    return integers.reshape(*steps.shape, -1), steps


def _signed_or_negated(weight: IntegerWeight, low: int, high: int) -> tuple[Array, Array]:
    """Do as :func:`_signed`, or negate both integers and steps where that is what fits (lsq of 2 bits: -2 to 1)."""
    integers = weight.integers
    if integers.numel() and -int(integers.min()) == high and -int(integers.max()) >= low:
        weight = IntegerWeight(-integers, -weight.steps, -weight.low, weight.spacing, weight.levels)
    return _signed(weight, low, high)


def _with_minimum(weight: IntegerWeight, levels: int, most: int) -> tuple[Array, Array, int, Array]:
    """Return ``q`` and ``d, a, b`` of ``d * a * q - d * b``.

    Raises:
        UnfitError: if there are more levels, or b is no integer from 0 to ``most``.
    """
    steps, b = weight.steps.numpy(), -weight.low.numpy()
    if weight.levels > levels:
        raise UnfitError(f"it has {weight.levels} levels, the type holds {levels}")
    if b.size and (b.min() < 0 or b.max() > most):
        raise UnfitError(f"its minima are {-b.max()} to {-b.min()} steps, the type holds {-most} to 0")
    q = (weight.integers.numpy().reshape(*steps.shape, -1) + b[..., None]) // weight.spacing
    return q.astype(np.uint8), steps, weight.spacing, b.astype(np.uint8)


def _nibbles(q: Array) -> Array:
    """Pack 4-bit numbers ``[..., 32]``: byte j holds elements j and j + 16."""
    return q[..., :16] | q[..., 16:] << 4


def _planes(q: Array, bits: int, run: int) -> Array:
    """Pack numbers of 1, 2 or 4 bits: byte j of a run holds element j of each of the next ``8 / bits`` runs."""
    count = 8 // bits
    parts = q.reshape(*q.shape[:-1], -1, count, run).astype(np.uint8)
    packed = sum((parts[..., i, :] << (bits * i) for i in range(1, count)), parts[..., 0, :])
    return np.asarray(packed, np.uint8).reshape(*q.shape[:-1], -1)


def _q8_0(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -128, 127)
    return np.concatenate([_half(d), integers.astype(np.int8).view(np.uint8)], -1)


def _q4_0(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -8, 7)
    return np.concatenate([_half(d), _nibbles((integers + 8).astype(np.uint8))], -1)


def _q5_0(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -16, 15)
    q = (integers + 16).astype(np.uint8)
    high = np.packbits(q >> 4, axis=-1, bitorder="little")
    return np.concatenate([_half(d), high, _nibbles(q & 15)], -1)


def _q4_1(weight: IntegerWeight) -> Array:
    q, d, a, b = _with_minimum(weight, 16, 2**15)
    return np.concatenate([_half(d * np.float32(a)), _half(-d * b.astype(np.float32)), _nibbles(q)], -1)


def _q1_0(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -1, 1)
    if not integers.all():
        raise UnfitError("it has zeros, the type holds -1 and 1")
    return np.concatenate([_half(d), np.packbits(integers > 0, axis=-1, bitorder="little")], -1)


def _q2_0(weight: IntegerWeight) -> Array:
    integers, d = _signed_or_negated(weight, -1, 2)
    q = (integers + 1).astype(np.uint8).reshape(*integers.shape[:-1], -1, 4)
    return np.concatenate([_half(d), q[..., 0] | q[..., 1] << 2 | q[..., 2] << 4 | q[..., 3] << 6], -1)


def _tq2_0(weight: IntegerWeight) -> Array:
    integers, d = _signed_or_negated(weight, -1, 2)
    return np.concatenate([_planes(integers + 1, 2, 32), _half(d)], -1)


def _tq1_0(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -1, 1)
    q = integers + 1

    def trits(part: Array, run: int) -> Array:
        """Pack five of three values to a byte: a fraction of 256, whose base-3 digits a multiplication reads."""
        fives = part.reshape(*part.shape[:-1], -1, run)
        fives = np.concatenate([fives, np.zeros_like(fives[..., : 5 - fives.shape[-2], :])], -2)
        number = sum(fives[..., i, :].astype(np.int64) * 3 ** (4 - i) for i in range(5))
        return np.asarray((number * 256 + 242) // 243, np.uint8)

    return np.concatenate([trits(q[..., :160], 32), trits(q[..., 160:240], 16), trits(q[..., 240:], 4), _half(d)], -1)


def _q2_k(weight: IntegerWeight) -> Array:
    q, d, a, b = _with_minimum(weight, 4, 15)
    scales = np.repeat((a | b << 4)[..., None], 16, -1).astype(np.uint8)
    return np.concatenate([scales, _planes(q, 2, 32), _half(d), _half(d)], -1)


def _q3_k(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -4, 3)
    q = (integers + 4).astype(np.uint8)
    # Sixteen scales of six bits, biased by 32, all 1: low nibbles first, then the upper two bits of each.
    scales = np.array([0x11] * 8 + [0b10101010] * 4, np.uint8)
    scales = np.broadcast_to(scales, (*d.shape, 12))
    return np.concatenate([_planes(q >> 2, 1, 32), _planes(q & 3, 2, 32), scales, _half(d)], -1)


def _six_bit_scales(a: int, b: Array) -> Array:
    """Pack eight scales a and eight minima b of six bits, each the same: the first four whole, the rest in parts."""
    whole = np.repeat(b[..., None], 4, -1)
    first = np.full_like(whole, a & 63 | (a >> 4) << 6)
    return np.concatenate([first, whole & 63 | whole >> 4 << 6, (a & 15) | (whole & 15) << 4], -1).astype(np.uint8)


def _q4_k(weight: IntegerWeight) -> Array:
    q, d, a, b = _with_minimum(weight, 16, 63)
    return np.concatenate([_half(d), _half(d), _six_bit_scales(a, b), _planes(q, 4, 32)], -1)


def _q5_k(weight: IntegerWeight) -> Array:
    q, d, a, b = _with_minimum(weight, 32, 63)
    parts = [_half(d), _half(d), _six_bit_scales(a, b), _planes(q >> 4, 1, 32), _planes(q & 15, 4, 32)]
    return np.concatenate(parts, -1)


def _q6_k(weight: IntegerWeight) -> Array:
    integers, d = _signed(weight, -32, 31)
    q = (integers + 32).astype(np.uint8)
    low = (q & 15).reshape(*d.shape, 2, 2, 64)  # of each 128: byte j holds element j and j + 64
    low = (low[..., 0, :] | low[..., 1, :] << 4).reshape(*d.shape, 128)
    scales = np.ones((*d.shape, 16), np.uint8)
    return np.concatenate([low, _planes(q >> 4, 2, 32), scales, _half(d)], -1)


#: The types by name.
BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("Q1_0", 41, 128, 18, _q1_0),
        Block("TQ1_0", 34, 256, 54, _tq1_0),
        Block("TQ2_0", 35, 256, 66, _tq2_0),
        Block("Q2_0", 42, 64, 18, _q2_0),
        Block("Q2_K", 10, 256, 84, _q2_k),
        Block("Q3_K", 11, 256, 110, _q3_k),
        Block("Q4_K", 12, 256, 144, _q4_k),
        Block("Q4_0", 2, 32, 18, _q4_0),
        Block("Q4_1", 3, 32, 20, _q4_1),
        Block("Q5_K", 13, 256, 176, _q5_k),
        Block("Q5_0", 6, 32, 22, _q5_0),
        Block("Q6_K", 14, 256, 210, _q6_k),
        Block("Q8_0", 8, 32, 34, _q8_0),
    )
}


def fitting(weight: IntegerWeight) -> tuple[dict[str, Array], dict[str, str]]:
    """Try every type.

    Returns:
        The bytes by name of each type that holds the weight exactly, smallest first; and by name why another does not.
    """
    found, reasons = {}, {}
    for block in sorted(BLOCKS.values(), key=lambda block: block.bits_per_weight):
        try:
            found[block.name] = block.encode(weight)
        except UnfitError as error:
            reasons[block.name] = str(error)
    return found, reasons


def as_steps(values: torch.Tensor, size: int = 32) -> IntegerWeight:
    """Return a weight in full precision, rounded to nearest as Q8_0 does: 127 steps to the largest of a block."""
    grouped = values.float().reshape(len(values), -1, size)
    steps = quotient(grouped.abs().amax(-1), 127.0).to(torch.float16).float()
    integers = torch.where(steps[..., None] > 0, (grouped / steps[..., None]).round().clamp(-127, 127), 0.0)
    low = torch.full(steps.shape, -127, dtype=torch.int32)
    return IntegerWeight(integers.to(torch.int32).reshape(values.shape), steps, low, 1, 255)
