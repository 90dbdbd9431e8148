"""Fake quantization: quantize and dequantize in one pass, with the straight-through gradients of its grid.

Three ops are closed under differentiation of any order. M is the pass-through mask of the grid, D its derivative with
respect to the scale; the straight-through rule holds both constant. gamma is the gradient scale.

    forward   y  = Q(w; s, z)
    jvp       dy = M * dw + gamma * (D * ds + Z * dz)                        linear in the tangents
    backward  dw = M * g,   ds = gamma * sum(D * g),   dz = gamma * sum(Z * g)     its transpose

The derivative of the backward is the jvp, and that of the jvp is the backward, so no other op is needed. Z, the
derivative with respect to the zero point, is 0 where the gradient passes and -s elsewhere. A fourth op, the dual,
computes y and dy together and reads w once.

Here a *row* is everything that shares a scale: the whole weight, an output channel, or a group. All arithmetic is in
float32 (float64 for float64 weights). The backward needs only w, the scales and the seed; it draws the noise again.

NaN in w gives NaN in y and in the gradient of the scale. NaN in a scale makes the whole row NaN. A NaN counts as inside
the mask, so the gradient of that weight is the upstream gradient. Infinite weights saturate. An infinite scale gives
what the formula gives: 0 * inf is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dtype, check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ..arithmetic import quotient
from ..dtensor import is_dtensor
from ..grids import MIN_SCALE, Grid, GridConstants, check_grid, check_group_size
from . import noise
from ._autograd import OpFunction
from ._op import LIBRARY, define
from .contract import check_out


class Rows:
    """The arguments of a call as rows that share a scale: r = w / s as ``[rows, cols]``, and a grid for each row.

    The grid of a row is shifted by its zero point.
    """

    def __init__(
        self,
        w: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        seed: Tensor | None,
        grid: tuple[float, ...],
        noise_std: float = 0.0,
        scale_noise_std: float = 0.0,
    ) -> None:
        self.grid = g = GridConstants(*grid)
        self.shape, self.scale_shape = w.shape, scale.shape
        self.dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.w = self.view(w)
        scale = scale.reshape(-1, 1).to(self.dtype)
        if seed is not None and noise_std:
            weight_noise = noise.normal(seed, w.numel(), noise.WEIGHT_STREAM)
            self.w = self.w + (weight_noise * noise_std).view(self.w.shape).to(self.dtype)
        if seed is not None and scale_noise_std:
            scale_noise = noise.normal(seed, scale.numel(), noise.SCALE_STREAM)
            scale = scale + (scale_noise * scale_noise_std).view(-1, 1).to(self.dtype)
        self.scale = scale.clamp_min(MIN_SCALE)
        zero = scale.new_zeros(()) if zero_point is None else zero_point.reshape(-1, 1).to(self.dtype)
        self.offset, self.low, self.high = g.offset - zero, g.low - zero, g.high - zero
        self.pass_low, self.pass_high = g.pass_low - zero, g.pass_high - zero
        self.below, self.above = g.below - zero, g.above - zero
        self.r = self.w / self.scale

    def view(self, t: Tensor) -> Tensor:
        """Return a tensor shaped like w as ``[rows, cols]`` in the computing dtype."""
        rows = max(self.scale_shape.numel(), 1)
        return t.reshape(rows, t.numel() // rows).to(self.dtype)

    def codes(self) -> Tensor:
        """Return the integer codes, as floating-point numbers."""
        if self.grid.by_sign:
            return torch.where(self.w.isnan(), self.w, -(self.w < 0).to(self.dtype))
        r = torch.minimum(torch.maximum(self.r, self.low), self.high)
        return torch.round(r * self.grid.steps - self.offset)

    def values(self) -> Tensor:
        """Return the dequantized weights."""
        return (self.codes() + self.offset) * quotient(self.scale, self.grid.steps)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Return where r is below, and where it is above, the pass-through range."""
        return self.r < self.pass_low, self.r > self.pass_high

    def scale_derivative(self) -> Tensor:
        """Return D, the derivative with respect to the scale (see the docstring of this module)."""
        below, above = self.masks()
        inside = quotient(self.codes() + self.offset, self.grid.steps) - self.grid.residual * self.r
        return torch.where(below, self.below, torch.where(above, self.above, inside))


def _forward(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    grid: list[float],
    noise_std: float,
    scale_noise_std: float,
    grad_scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    rows = Rows(w, scale, zero_point, seed, tuple(grid), noise_std, scale_noise_std)
    return rows.values().to(dtype or w.dtype).view(w.shape)


def _backward(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    grid: list[float],
    noise_std: float,
    scale_noise_std: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(w, scale, zero_point, seed, tuple(grid), noise_std, scale_noise_std)
    g = rows.view(g)
    below, above = rows.masks()
    dw = torch.where(below | above, 0.0, g).to(w.dtype).view(w.shape)
    ds = ((g * rows.scale_derivative()).sum(-1) * grad_scale).to(scale.dtype).view(scale.shape)
    if zero_point is None:
        return dw, ds, scale.new_empty(0)
    dz = (g * torch.where(below | above, -rows.scale, 0.0)).sum(-1) * grad_scale
    return dw, ds, dz.to(scale.dtype).view(scale.shape)


def _jvp(
    tangent_w: Tensor | None,
    tangent_scale: Tensor | None,
    tangent_zero_point: Tensor | None,
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    grid: list[float],
    noise_std: float,
    scale_noise_std: float,
    grad_scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    rows = Rows(w, scale, zero_point, seed, tuple(grid), noise_std, scale_noise_std)
    out = torch.zeros_like(rows.r)
    below, above = rows.masks()
    if tangent_w is not None:
        out = torch.where(below | above, 0.0, rows.view(tangent_w))
    if tangent_scale is not None:
        out = out + rows.scale_derivative() * (tangent_scale.reshape(-1, 1).to(rows.dtype) * grad_scale)
    if tangent_zero_point is not None:
        slope = torch.where(below | above, -rows.scale, 0.0)
        out = out + slope * (tangent_zero_point.reshape(-1, 1).to(rows.dtype) * grad_scale)
    return out.to(dtype or w.dtype).view(w.shape)


def _dual(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(*args[3:]), _jvp(*args)


_CALL = "Tensor w, Tensor scale, Tensor? zero_point, Tensor? seed, float[] grid, float noise_std, float scale_noise_std"
#: Parts of contracts that several ops share: the scales and the grid of a weight; a weight; its tangents.
SCALES = """
    require numel(S) == 0 or numel(R) > 0 and numel(S) % numel(R) == 0; scale has {numel(R)} elements, must divide the \
{numel(S)} elements of the weight
    zero_point: like(scale) [*R]
    require len(grid) == 10; grid has {len(grid)} constants, must be Grid.constants
"""
WEIGHT = f"""
    w: float [*S]
    scale: scale(w) [*R]
    {SCALES}
    seed: int64 one
"""
TANGENTS = """
    tangent_w: like(w) [*S]
    tangent_scale: like(scale) [*R]
    require tangent_zero_point is None or zero_point is not None; tangent_zero_point is given, must be None without \
a zero_point
    tangent_zero_point: like(scale) [*R]
"""
_DUAL = f"""
    {WEIGHT}
    {TANGENTS}
    dtype: narrow(w)
    -> out: default(dtype, w) [*S]
"""
_TANGENTS = "Tensor? tangent_w, Tensor? tangent_scale, Tensor? tangent_zero_point"
FORWARD = define(
    "fake_quantize", f"{_CALL}, float grad_scale, ScalarType? dtype",
    f"""
    {WEIGHT}
    dtype: narrow(w)
    -> out: default(dtype, w) [*S]
    """,
    reference=_forward,
)  # fmt: skip
BACKWARD = define(
    "fake_quantize_backward", f"Tensor g, {_CALL}, float grad_scale",
    f"""
    {WEIGHT}
    g: narrow(w) [*S]
    -> dw: like(w) [*S]
    -> ds: like(scale) [*R]
    -> dz: like(scale) [*R] if zero_point else [0]
    """,
    reference=_backward,
)  # fmt: skip
JVP = define("fake_quantize_jvp", f"{_TANGENTS}, {_CALL}, float grad_scale, ScalarType? dtype", _DUAL, reference=_jvp)
DUAL = define(
    "fake_quantize_dual", f"{_TANGENTS}, {_CALL}, float grad_scale, ScalarType? dtype",
    f"{_DUAL} -> tangent: default(dtype, w) [*S]", reference=_dual,
)  # fmt: skip


_PRIMALS = ("w", "scale", "zero_point")
_TANGENT_NAMES = tuple(f"tangent_{name}" for name in _PRIMALS)


def _gradients_from(saved: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of w, scale and zero point from the gradient of y."""
    dw, ds, *dz = FakeQuantizeBackward.of(saved, g=g)
    return dw, ds, None if saved.zero_point is None else dz[0]


def _tangent_from(saved: Any, dtype: torch.dtype, *tangents: Tensor | None) -> Tensor:
    """Return the tangent of y from those of w, scale and zero point.

    Without tangents it is zeros, not None, because forward mode inside forward mode does not accept None.
    """
    if all(t is None for t in tangents):
        return torch.zeros_like(saved.w, dtype=dtype)
    tangent: Tensor = FakeQuantizeJvp.of(saved, **dict(zip(_TANGENT_NAMES, tangents, strict=True)), dtype=dtype)
    return tangent


class FakeQuantize(OpFunction):
    """y = Q(w; scale, zero_point)."""

    op = FORWARD

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep the dtype of y."""
        ctx.dtype = output.dtype

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward."""
        return dict(zip(_PRIMALS, _gradients_from(saved, gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Tensor:
        """Return the jvp."""
        return _tangent_from(saved, ctx.dtype, tangents.w, tangents.scale, tangents.zero_point)


class FakeQuantizeBackward(OpFunction):
    """(dw, ds[, dz]) from g. It is linear in g, so its transpose is the jvp, and its tangent is itself."""

    op = BACKWARD
    saves = (*_PRIMALS, "seed")

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call the op; drop dz if there is no zero point."""
        outputs = super().run(*args)
        return outputs if args[cls._names.index("zero_point")] is not None else outputs[:2]

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: Any) -> None:
        """Keep the dtype of g."""
        ctx.dtype = call.g.dtype

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the jvp: the transpose of this op."""
        tw, ts, *tz = gs
        tangents = (tw, ts, None if saved.zero_point is None else tz[0])
        return {} if all(t is None for t in tangents) else {"g": _tangent_from(saved, ctx.dtype, *tangents)}

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the backward of the tangent of g."""
        if tangents.g is None:
            primals = (saved.w, saved.scale, saved.zero_point)
            return tuple(torch.zeros_like(t) for t in primals if t is not None)
        return FakeQuantizeBackward.of(saved, g=tangents.g)


def _differentiable_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return dw, ds and dz with derivatives of every kind."""
    dw, ds, *dz = FakeQuantizeBackward.call(*args)
    return dw, ds, dz[0] if dz else ds.new_empty(0)


# For the backward in C++ (csrc/bindings/trained.cpp), which calls it where its own derivatives may be needed.
LIBRARY.define(f"fake_quantize_backward_differentiable({BACKWARD.arguments}) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl("fake_quantize_backward_differentiable", _differentiable_backward, "CompositeImplicitAutograd")


class FakeQuantizeJvp(OpFunction):
    """dy from (dw, ds, dz). It is linear in them, so its transpose is the backward, and its tangent is itself."""

    op = JVP
    saves = (*_PRIMALS, "seed")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep the dtype of dy."""
        ctx.dtype = output.dtype

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward: the transpose of this op."""
        return dict(zip(_TANGENT_NAMES, _gradients_from(saved, gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Tensor:
        """Return the jvp of the tangents of dw, ds and dz."""
        return _tangent_from(saved, ctx.dtype, *(getattr(tangents, name) for name in _TANGENT_NAMES))


class FakeQuantizeDual(OpFunction):
    """(y, dy) in one op: the forward and the jvp."""

    op = DUAL
    saves = (*_PRIMALS, "seed")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the dtype of y."""
        ctx.dtype = output[0].dtype

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the backward of each output."""
        grads: dict[str, Tensor | None] = {}
        for names, g in zip((_PRIMALS, _TANGENT_NAMES), gs, strict=True):
            if g is not None and cls.needs(ctx, *names):
                grads.update(zip(names, _gradients_from(saved, g), strict=True))
        return grads

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> tuple[Tensor, Tensor]:
        """Return the jvp of each output."""
        of_primals, of_tangents = ([getattr(tangents, name) for name in names] for names in (_PRIMALS, _TANGENT_NAMES))
        return _tangent_from(saved, ctx.dtype, *of_primals), _tangent_from(saved, ctx.dtype, *of_tangents)


def fake_quantize(
    w: Tensor,
    scale: Tensor,
    grid: Grid,
    *,
    group_size: int | None = None,
    zero_point: Tensor | None = None,
    noise_std: float = 0.0,
    scale_noise_std: float = 0.0,
    seed: int | Tensor | None = None,
    grad_scale: float | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize ``w``, with straight-through gradients to ``w``, ``scale`` and ``zero_point``.

    Args:
        w: weight of any shape ``[..., K]``, float32, bfloat16, float16 or float64.
        scale: step sizes, float32 (or float64 for a float64 ``w``). Without ``group_size`` its shape is a prefix of
            ``w.shape``, optionally followed by ones: ``[]`` for one scale, ``[N]`` or ``[N, 1]`` for one per row. With
            ``group_size`` its shape is ``[..., K / group_size]``. Scales below 1e-5, also negative ones, act as 1e-5.
        grid: the quantization grid.
        group_size: number of consecutive inputs that share a scale; must divide ``K``.
        zero_point: zero points of affine grids, with the shape of ``scale``; they need not be integral.
        noise_std: standard deviation of Gaussian noise that is added to ``w`` before quantizing (WinQ). If negative,
            the noise is the mirror image of that with the same seed.
        scale_noise_std: the same for ``scale``.
        seed: an int, taken modulo 2**64; or an int64 tensor with one element on the device of ``w``, which a CUDA graph
            may update in place. If None, it is drawn from torch's generator. Equal seeds give equal bits on every
            backend.
        grad_scale: factor on the gradients of ``scale`` and ``zero_point``; ``grid.grad_scale(w.numel())`` if None.
        dtype: dtype of the result: that of ``w`` if None; for a float32 ``w`` also bfloat16 or float16.
        out: contiguous tensor to write into; then the call is not differentiable, as for all ops of torch.

    Returns:
        Tensor of the shape of ``w`` with values ``scale / grid.steps * (code + grid.offset - zero_point)``.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if shapes, ``group_size``, ``out``, noise or ``zero_point`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit, or ``out`` is given and an input requires grad.

    The straight-through rule is that of ParetoQ (Liu et al., 2025), the noise that of WinQ; see docs/algorithms.md.
    """
    check_layout(w, scale, grid, group_size, zero_point)
    check_noise(noise_std, scale_noise_std)
    check_optional_reals(grad_scale=grad_scale)
    check_optional_tensors(out=out)
    if dtype is not None:
        check_dtype(dtype)
    noise.check_seed(seed)
    seed = noise.make_seed(seed, w.device) if noise_std or scale_noise_std else None
    grad_scale = grid.grad_scale(w.numel()) if grad_scale is None else float(grad_scale)
    args = (w, scale, zero_point, seed, list(grid.constants), noise_std, scale_noise_std, grad_scale, dtype)
    if out is not None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (w, scale, zero_point, out)):
            raise RuntimeError(
                "fake_quantize with out= does not support automatic differentiation, use torch.no_grad()"
            )
        check_out("out", out, w.shape, dtype or w.dtype, w.device)
        torch.ops.qatkernels.fake_quantize_out(*args, out)
        return out
    y: Tensor = FORWARD.call(*args)
    return y


def check_noise(noise_std: float, scale_noise_std: float) -> None:
    """Raise TypeError or ValueError unless these are finite numbers."""
    check_reals(noise_std=noise_std, scale_noise_std=scale_noise_std)
    if not (abs(noise_std) < math.inf and abs(scale_noise_std) < math.inf):  # torch.compile cannot trace math.isfinite
        raise ValueError(f"noise_std is {noise_std} and scale_noise_std is {scale_noise_std}, must be finite")


def check_layout(w: Tensor, scale: Tensor, grid: Grid, group_size: int | None, zero_point: Tensor | None) -> None:
    """Raise TypeError or ValueError unless ``scale`` and ``zero_point`` fit ``w`` at this granularity."""
    check_tensors(w=w, scale=scale)
    check_grid(grid)
    check_optional_tensors(zero_point=zero_point)
    is_dtensor(w)  # gives torch the rules for sharded calls
    check_fit(w, scale, grid, group_size, zero_point)


def check_fit(w: Tensor, scale: Tensor, grid: Grid, group_size: int | None, zero_point: Tensor | None) -> None:
    """Check the same of arguments whose types are known.

    The contract of the op cannot tell whether a scale is one for each group or for each row: it knows of rows only how
    many there are.
    """
    if group_size is not None:
        if w.ndim == 0:
            raise ValueError("w has no dimension to divide into groups, group_size must be None")
        check_group_size(group_size, w.shape[-1])
        expected = (*w.shape[:-1], w.shape[-1] // group_size)
        if scale.shape != expected:
            raise ValueError(f"scale has shape {tuple(scale.shape)}, must be {expected} for group_size {group_size}")
    else:
        prefix = tuple(scale.shape)
        while prefix and prefix[-1] == 1 and prefix != tuple(w.shape[: len(prefix)]):
            prefix = prefix[:-1]
        if prefix != tuple(w.shape[: len(prefix)]):
            raise ValueError(
                f"scale has shape {tuple(scale.shape)}, must be [], [1] or leading dimensions of w's {tuple(w.shape)} "
                "(for scales per group give group_size)"
            )
    if zero_point is not None:
        if not grid.has_zero_point:
            raise ValueError(f"zero_point is given, but scheme {grid.scheme!r} has none, only 'affine' has")
        if zero_point.shape != scale.shape:
            raise ValueError(f"zero_point has shape {tuple(zero_point.shape)}, must be {tuple(scale.shape)} like scale")
