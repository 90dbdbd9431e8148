"""A quantized linear layer and its tangent in Triton.

A tile of the weight and of its tangent is loaded once, quantized in registers, and multiplied three times. The
quantized weight and its tangent are never written to memory. A float32 product is three TF32 products, which keeps
float32's precision.

The weight is quantized again for every tile of tokens. With more than one tile it is faster to write the quantized
weight once and use the library's products: for a weight N x K that pass moves 8 N K bytes in 16 bits, while a tile of
64 tokens takes 384 N K operations at the lower rate of a kernel that also quantizes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._element import (
    INTERPRETED,
    MIN_SCALE,
    OPTIONS,
    SCALE_STREAM,
    WEIGHT_STREAM,
    code_of,
    constant,
    divide,
    from_element,
    normals_each,
    select_low,
    to_element,
    value_of,
)
from ._launchers import launches
from ._rows import shape_of
from .fake_quantize import fake_quantize_dual_out, slopes_at

#: Tokens, outputs and inputs of a tile, by bytes of an element of x. Registers limit it: three sums and two weights.
TILES = {2: (64, 64, 32), 4: (32, 32, 32)}
#: With more tokens the library multiplies. The limit is estimated, not measured on a GPU.
MOST_TOKENS = 64
#: Triton 3.6 fails to pipeline this loop for sm_100.
STAGES = {"num_stages": 1}


@triton.jit
def multiplied(a, b, total, dtype: tl.constexpr):
    """Return total + a b^T, with a and b rounded to a dtype. The interpreter cannot multiply bfloat16."""
    a, b = to_element(a, dtype), tl.trans(to_element(b, dtype))
    if INTERPRETED:
        a, b = from_element(a, tl.float32), from_element(b, tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def quant_linear_dual_kernel(
    x_ptr, tangent_x_ptr, tangent_w_ptr, tangent_scale_ptr, tangent_zero_ptr, y_ptr, tangent_ptr,
    w_ptr, scale_ptr, zero_ptr, seed_ptr, tokens, outputs, inputs, output_stride, input_stride, per_scale,
    noise_std, scale_noise_std,
    GRID: tl.constexpr, ZERO: tl.constexpr, NOISE: tl.constexpr, SCALE_NOISE: tl.constexpr, ALONG_X: tl.constexpr,
    ALONG_W: tl.constexpr, ALONG_S: tl.constexpr, ALONG_Z: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    output = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    value = tl.zeros((T, N), tl.float32)
    along_x = tl.zeros((T, N), tl.float32)
    along_w = tl.zeros((T, N), tl.float32)
    for start in range(0, inputs, K):
        column = start + tl.arange(0, K)
        there = (token < tokens)[:, None] & (column < inputs)[None, :]
        mask = (output < outputs)[:, None] & (column < inputs)[None, :]
        index = output[:, None] * output_stride + column[None, :].to(tl.int64) * input_stride
        shared = index // per_scale
        scale = tl.load(scale_ptr + shared, mask, other=1.0).to(tl.float32)
        if SCALE_NOISE:
            drawn = normals_each(tl.load(seed_ptr), shared, SCALE_STREAM)
            scale += drawn * tl.full((), scale_noise_std, tl.float32)
        scale = select_low(scale, constant(MIN_SCALE, scale))
        zero = tl.zeros(scale.shape, tl.float32)
        if ZERO:
            zero = tl.load(zero_ptr + shared, mask, other=0.0).to(tl.float32)
        w = from_element(tl.load(w_ptr + index, mask, other=0.0), tl.float32)
        if NOISE:
            drawn = normals_each(tl.load(seed_ptr), index, WEIGHT_STREAM)
            w += drawn * tl.full((), noise_std, tl.float32)
        r = divide(w, scale)
        beyond, slope = slopes_at(r, w, zero, GRID)
        q = tl.where(mask, value_of(code_of(w, r, zero, GRID), scale, zero, GRID), 0.0)
        v = tl.zeros(q.shape, tl.float32)
        if ALONG_W:
            v = tl.where(beyond, 0.0, from_element(tl.load(tangent_w_ptr + index, mask, other=0.0), tl.float32))
        if ALONG_S:
            v += slope * tl.load(tangent_scale_ptr + shared, mask, other=0.0).to(tl.float32)
        if ALONG_Z:
            along_zero = tl.load(tangent_zero_ptr + shared, mask, other=0.0).to(tl.float32)
            v += tl.where(beyond, -scale, 0.0) * along_zero
        place = token[:, None] * inputs + column[None, :]
        x = from_element(tl.load(x_ptr + place, there, other=0.0), tl.float32)
        value = multiplied(x, q, value, DTYPE)
        if ALONG_W or ALONG_S or ALONG_Z:
            along_w = multiplied(x, tl.where(mask, v, 0.0), along_w, DTYPE)
        if ALONG_X:
            tangent_x = from_element(tl.load(tangent_x_ptr + place, there, other=0.0), tl.float32)
            along_x = multiplied(tangent_x, q, along_x, DTYPE)
    out = token[:, None] * outputs + output[None, :]
    inside = (token < tokens)[:, None] & (output < outputs)[None, :]
    tl.store(y_ptr + out, to_element(value, DTYPE), inside)
    tl.store(tangent_ptr + out, to_element(along_x + along_w, DTYPE), inside)


@launches("quant_linear_dual")
def quant_linear_dual_out(
    x: Tensor, tangent_x: Tensor | None, tangent_w: Tensor | None, tangent_scale: Tensor | None,
    tangent_zero_point: Tensor | None, w: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None,
    grid: list[float], noise_std: float, scale_noise_std: float, grad_scale: float, transposed: bool,
    out: Tensor, tangent: Tensor,
) -> None:  # fmt: skip
    """Write y and its tangent. Arguments as the op's. Many tokens, and float64, use the library's products."""
    tangents = (tangent_w, tangent_scale, tangent_zero_point)
    call = (w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale)
    if x.dtype == torch.float64 or x.shape[0] > MOST_TOKENS:
        q, v = torch.empty_like(w, dtype=x.dtype), torch.empty_like(w, dtype=x.dtype)
        fake_quantize_dual_out(*tangents, *call, x.dtype, q, v)
        q, v = (q, v) if transposed else (q.t(), v.t())
        torch.mm(x, q, out=out)
        torch.mm(x, v, out=tangent)
        if tangent_x is not None:
            tangent.addmm_(tangent_x, q)
        return
    if out.numel() == 0:
        return
    (outputs, inputs), strides = w.shape, (w.shape[1], 1)
    if transposed:
        outputs, inputs, strides = inputs, outputs, (1, w.shape[1])
    # grad_scale multiplies the tangents of the scales here.
    scaled = (None if t is None else t * grad_scale for t in tangents[1:])
    # An absent tensor is replaced by the scale; the flags prevent that it is read.
    along: list[Any] = [scale if t is None else t for t in (tangent_x, tangent_w, *scaled)]
    point = (w, scale, *(scale if t is None else t for t in (zero_point, seed)))
    t, n, k = TILES[x.element_size()]
    quant_linear_dual_kernel[(triton.cdiv(outputs, n), triton.cdiv(x.shape[0], t))](
        x, *along, out, tangent, *point, x.shape[0], outputs, inputs, *strides, max(shape_of(w, scale)[1], 1),
        noise_std, scale_noise_std, GRID=tuple(grid), ZERO=zero_point is not None,
        NOISE=seed is not None and noise_std != 0, SCALE_NOISE=seed is not None and scale_noise_std != 0,
        ALONG_X=tangent_x is not None, ALONG_W=tangent_w is not None, ALONG_S=tangent_scale is not None,
        ALONG_Z=tangent_zero_point is not None, T=t, N=n, K=k, **OPTIONS, **STAGES,
    )  # fmt: skip
