"""The formulas of one element in Triton. Results equal those of ops/_fake_quantize.py and ops/noise.py bit for bit.

Every operation is rounded separately, except in `fused`. So: launch with `OPTIONS`, divide by `tl.div_rn` or
:func:`divide_rows`, take square roots by `tl.sqrt_rn`. ``GRID`` is `Grid.constants` as a compile-time tuple, so the
compiler removes what a scheme does not need.
"""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

#: Options of every launch. The compiler must not fuse multiply-adds, which would change bits. Eight warps keep the
#: elements of a thread few.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}

#: Triton's interpreter truncates to bfloat16, where hardware rounds. In the interpreter we convert ourselves.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

MIN_SCALE = tl.constexpr(1e-5)
WEIGHT_STREAM = tl.constexpr(0)
SCALE_STREAM = tl.constexpr(1)


@triton.jit
def constant(x: tl.constexpr, like):
    """A compile-time number as a scalar of the dtype of ``like``; without it float64 would lose precision."""
    return tl.full((), x, like.dtype)


@triton.jit
def from_element(x, COMPUTE: tl.constexpr):
    """Convert a loaded element to the dtype of computations."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def to_element(y, dtype: tl.constexpr):
    """Convert a result to the dtype of elements, rounding to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(y == y, rounded, (bits >> 16) | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@triton.jit
def divide(a, b):
    """Quotient, correctly rounded. Triton's own float32 division is not."""
    if a.dtype == tl.float64:
        return a / b
    else:  # Triton also compiles what follows a return, so this must be a branch
        return tl.div_rn(a, b)


def _quotients(also_tiny: bool) -> str:
    """Return PTX for four quotients: $0 ... $3 = $4 ... $7 / $8 ... $11, with the reciprocals in $12 ... $15."""
    lines = [".reg .pred again, tiny;", ".reg .f32 rest, minus;", "setp.ne.f32 again, $8, $8;"]
    for i in range(4):
        q, a, b, y = f"${i}", f"${i + 4}", f"${i + 8}", f"${i + 12}"
        lines += [f"mul.rn.f32 {q}, {a}, {y};", f"neg.f32 minus, {b};"]
        lines += [f"fma.rn.f32 rest, minus, {q}, {a};", f"fma.rn.f32 {q}, rest, {y}, {q};"] * 2
        lines += [f"setp.nan.or.f32 again, {q}, {q}, again;"]
        if also_tiny:
            lines += [f"abs.f32 rest, {a};", "setp.lt.f32 tiny, rest, 0f0D800000;"]
            lines += [f"setp.ne.and.f32 tiny, {a}, 0f00000000, tiny;", "or.pred again, again, tiny;"]
    lines += ["@!again bra done;", *(f"div.rn.f32 ${i}, ${i + 4}, ${i + 8};" for i in range(4)), "done:"]
    return "{" + " ".join(lines) + "}"


QUOTIENTS, QUOTIENTS_TINY = tl.constexpr(_quotients(False)), tl.constexpr(_quotients(True))
QUOTIENT_REGISTERS = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 12))


@triton.jit
def divide_rows(a, b, TINY: tl.constexpr):
    """Quotients of ``[R, C]`` by ``[R, 1]``, correctly rounded, with one reciprocal for each row.

    The method is that of csrc/cuda/divide.h: two corrections by an exact remainder, and a real division if one of four
    results is NaN. Without ``TINY``, a quotient with 0 < abs(a) < 2^-100 is only known to be below 2^-39, which is
    enough to round it to a code. A zero may lose its sign, which no caller uses. The interpreter divides.
    """
    if INTERPRETED or a.dtype == tl.float64:
        return divide(a, tl.broadcast_to(b, a.shape))
    else:
        inverse = tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)
        inverse = tl.where((b >= 2.0**-60) & (b <= 2.0**20), inverse, float("nan"))
        return tl.inline_asm_elementwise(
            QUOTIENTS_TINY if TINY else QUOTIENTS, QUOTIENT_REGISTERS,
            [a, tl.broadcast_to(b, a.shape), tl.broadcast_to(inverse, a.shape)],
            dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.constexpr_function
def exactly_invertible(x):
    """Whether x is a power of two. Then a product with its reciprocal equals the quotient."""
    return math.frexp(x)[0] == 0.5


@triton.jit
def by_steps(x, STEPS: tl.constexpr):
    """Quotient of x and a compile-time number, correctly rounded."""
    if exactly_invertible(STEPS):
        return x if STEPS == 1 else x * tl.full((), 1 / STEPS, x.dtype)
    else:
        return divide(x, tl.full(x.shape, STEPS, x.dtype))


@triton.jit
def round_half_even(x):
    """Round half to even. For magnitudes far below 2**22, as clamped values have; NaN stays NaN."""
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    return (x + 12582912.0) - 12582912.0


@triton.jit
def select_low(x, bound):
    """max(x, bound) that keeps NaN."""
    return tl.where(x < bound, bound, x)


@triton.jit
def select_high(x, bound):
    """min(x, bound) that keeps NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def code_of(w, r, zero, GRID: tl.constexpr):
    """The code of w as a floating point number, where r = w / scale."""
    if GRID[0] != 0:
        code = tl.where(w < 0, -1.0, 0.0).to(w.dtype)
        return tl.where(w != w, w, code)
    low, high = constant(GRID[3], r) - zero, constant(GRID[4], r) - zero
    clamped = select_high(select_low(r, low), high)
    return round_half_even(clamped * constant(GRID[1], r) - (constant(GRID[2], r) - zero))


@triton.jit
def value_of(code, scale, zero, GRID: tl.constexpr):
    """The dequantized value of a code."""
    step = by_steps(scale, GRID[1])
    return (code + (constant(GRID[2], code) - zero)) * step


@triton.jit
def fused(a, b, c):
    """Return a * b + c in float32, rounded once. The interpreter computes it in float64, as ops/noise.py does."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def horner_step(y, x, COEFFICIENT: tl.constexpr):
    """One step of Horner's rule in float32."""
    return fused(y, x, tl.full((), COEFFICIENT, tl.float32))


@triton.jit
def box_muller(word):
    """Two standard normals from a 32-bit word."""
    bits = ((word & 0x7FFFF800) | 0x400).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    h = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    y = horner_step(tl.full((), 216773.6875, tl.float32), h, -371393.53125)
    y = horner_step(y, h, 644046.875)
    y = horner_step(y, h, -1280924.125)
    y = horner_step(y, h, 2850889.75)
    radius = tl.sqrt_rn(fused(horner_step(h, h, -0.25), y, (0x4F000000 - bits).to(tl.float32)))
    x = (((word << 13) & 0x007FE000) | 0x40000000).to(tl.float32, bitcast=True) - 2.9990234375
    square = x * x
    even = horner_step(tl.full((), -9.166328e-8, tl.float32), square, 4.5561155e-6)
    even = horner_step(even, square, -8.8657667e-5)
    even = horner_step(even, square, 2.8745361e-4)
    odd = horner_step(tl.full((), 6.976795e-7, tl.float32), square, -2.320153e-5)
    odd = horner_step(odd, square, 2.2576441e-4)
    first = (radius * fused(odd, -x, even)).to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    second = (radius * fused(odd, x, even)).to(tl.uint32, bitcast=True) ^ ((word << 21) & 0x80000000)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def words_at(seed, counter, stream: tl.constexpr):
    """The four Philox words at 64-bit counters."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + stream, zero, n_rounds=7)


@triton.jit
def normals_each(seed, index, stream: tl.constexpr):
    """Normals of arbitrary elements, with one Philox block for each element."""
    x0, x1, x2, x3 = words_at(seed, index // 8, stream)
    second, upper = (index & 2) == 2, (index & 4) == 4
    cosine, sine = box_muller(tl.where(upper, tl.where(second, x3, x2), tl.where(second, x1, x0)))
    return tl.where((index & 1) == 1, sine, cosine)


@triton.jit
def normals_of_tile(seed, row_start, columns, R: tl.constexpr, C: tl.constexpr, BY_EIGHT: tl.constexpr):
    """Normals of the tile ``[R, C]`` whose rows start at flat indices ``row_start[:, None]``, at ``columns`` of [C]."""
    if BY_EIGHT:
        first = tl.min(columns, 0)
        counter = row_start // 8 + (first // 8 + tl.arange(0, C // 8))[None, :]
        x0, x1, x2, x3 = words_at(seed, counter, WEIGHT_STREAM)
        z0, z1 = box_muller(x0)
        z2, z3 = box_muller(x1)
        z4, z5 = box_muller(x2)
        z6, z7 = box_muller(x3)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
        return tl.reshape(tl.join(even, odd), (R, C))
    return normals_each(seed, row_start + columns[None, :], WEIGHT_STREAM)
