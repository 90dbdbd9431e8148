"""One element's meaning in Triton: the mirror of ops/fake_quantize.py and ops/noise.py, equal to them bit for bit.

Every operation is rounded on its own: launch with `OPTIONS`, divide by `tl.div_rn`, take roots by `tl.sqrt_rn`.
``GRID`` is `Grid.constants` as a compile-time tuple, so what a scheme does not need folds away.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Options of every launch: fused multiply-adds would change bits; eight warps leave a thread few enough elements.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}

#: Triton's interpreter truncates where hardware rounds to bfloat16; there the conversion is spelled out.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

MIN_SCALE = tl.constexpr(1e-5)
WEIGHT_STREAM = tl.constexpr(0)
SCALE_STREAM = tl.constexpr(1)


@triton.jit
def constant(x: tl.constexpr, like):
    """A compile-time number as a scalar of the type of ``like``, which float64 needs."""
    return tl.full((), x, like.dtype)


@triton.jit
def from_element(x, COMPUTE: tl.constexpr):
    """An element as loaded, in the computing type."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def to_element(y, dtype: tl.constexpr):
    """A result as an element, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(y == y, rounded, (bits >> 16) | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@triton.jit
def divide(a, b):
    """Quotient, correctly rounded; Triton's own float32 division is not."""
    if a.dtype == tl.float64:
        return a / b
    return tl.div_rn(a, b)


@triton.jit
def round_half_even(x):
    """For magnitudes far below 2**22, which clamped values are; NaN stays."""
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
    """The code of w as a floating point number; r = w / scale."""
    if GRID[0] != 0:
        code = tl.where(w < 0, -1.0, 0.0).to(w.dtype)
        return tl.where(w != w, w, code)
    low, high = constant(GRID[3], r) - zero, constant(GRID[4], r) - zero
    clamped = select_high(select_low(r, low), high)
    return round_half_even(clamped * constant(GRID[1], r) - (constant(GRID[2], r) - zero))


@triton.jit
def value_of(code, scale, zero, GRID: tl.constexpr):
    """The dequantized value of a code."""
    step = divide(scale, tl.full(scale.shape, GRID[1], scale.dtype))
    return (code + (constant(GRID[2], code) - zero)) * step


@triton.jit
def box_muller(word0, word1):
    """Two standard normals from two 32-bit words."""
    u = ((word0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8
    radius = tl.sqrt_rn(natural_log(u) * -2.0)
    turn = (word1 >> 8).to(tl.float32) * 2.384185791015625e-7
    quadrant = (turn + 0.5).to(tl.int32)
    angle = (turn - quadrant.to(tl.float32)) * 1.5707963267948966
    square = angle * angle
    sine = square * -1.9515295891e-4 + 8.3321608736e-3
    sine = sine * square + -1.6666654611e-1
    sine = sine * square * angle + angle
    cosine = square * 2.443315711809948e-5 + -1.388731625493765e-3
    cosine = cosine * square + 4.166664568298827e-2
    cosine = (cosine * square * square - square * 0.5) + 1.0
    odd = (quadrant & 1) == 1
    s, c = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    s = tl.where((quadrant & 2) == 2, -s, s)
    c = tl.where(((quadrant + 1) & 2) == 2, -c, c)
    return radius * c, radius * s


@triton.jit
def natural_log(u):
    """The logarithm of float32 u in (0, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = mantissa < 0.70710678118654752
    exponent = tl.where(small, exponent - 1.0, exponent)
    t = tl.where(small, mantissa + mantissa, mantissa) - 1.0
    square = t * t
    y = t * 7.0376836292e-2 + -1.1514610310e-1
    y = y * t + 1.1676998740e-1
    y = y * t + -1.2420140846e-1
    y = y * t + 1.4249322787e-1
    y = y * t + -1.6668057665e-1
    y = y * t + 2.0000714765e-1
    y = y * t + -2.4999993993e-1
    y = y * t + 3.3333331174e-1
    y = y * t * square
    y = y + exponent * -2.12194440e-4
    y = y - square * 0.5
    return (t + y) + exponent * 0.693359375


@triton.jit
def words_at(seed, counter, stream: tl.constexpr):
    """The four Philox words at 64-bit counters."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + stream, zero)


@triton.jit
def normals_each(seed, index, stream: tl.constexpr):
    """Normals of any elements, one Philox block for each."""
    x0, x1, x2, x3 = words_at(seed, index // 4, stream)
    second = (index & 2) == 2
    cosine, sine = box_muller(tl.where(second, x2, x0), tl.where(second, x3, x1))
    return tl.where((index & 1) == 1, sine, cosine)


@triton.jit
def normals_of_tile(seed, row_start, columns, R: tl.constexpr, C: tl.constexpr, BY_FOUR: tl.constexpr):
    """Normals of the tile ``[R, C]`` whose rows start at flat indices ``row_start[:, None]``, at ``columns`` of [C]."""
    if BY_FOUR:
        first = tl.min(columns, 0)
        counter = row_start // 4 + (first // 4 + tl.arange(0, C // 4))[None, :]
        x0, x1, x2, x3 = words_at(seed, counter, WEIGHT_STREAM)
        z0, z1 = box_muller(x0, x1)
        z2, z3 = box_muller(x2, x3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (R, C))
    return normals_each(seed, row_start + columns[None, :], WEIGHT_STREAM)
