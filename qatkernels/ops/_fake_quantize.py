"""Fake quantization: quantize and dequantize in one pass, with the straight-through gradients of its grid.

Three ops, closed under differentiation of any order. With the pass-through mask M and the scale derivative D of the
grid, both held constant (that is the straight-through rule), and the gradient scale gamma,

    forward   y  = Q(w; s, z)
    jvp       dy = M * dw + gamma * (D * ds + Z * dz)                        linear in the tangents
    backward  dw = M * g,   ds = gamma * sum(D * g),   dz = gamma * sum(Z * g)     its transpose

so the backward's derivative is the jvp, the jvp's is the backward, and nothing else is ever needed. Z, the derivative
with respect to the zero point, is 0 where the gradient passes and -s elsewhere. A fourth op, the dual, gives y and dy
together and reads w once for both.

A weight is seen as rows that share a scale: the whole weight, an output channel, or a group of inputs. All arithmetic
is in float32 (float64 for float64 weights); only w, the scales and the seed are kept for the backward, and the noise is
drawn again there.

NaN in w or in a scale gives NaN in y (the whole row for a scale) and in the gradient of the scale; it counts as inside
the mask, so the gradient of that weight is the upstream one. Infinite weights saturate. An infinite scale gives what
the formula gives: 0 * inf is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dtype, check_optional_reals, check_optional_tensors, check_reals, check_tensors
from ..grids import MIN_SCALE, Grid, GridConstants, check_grid, check_group_size
from . import noise
from ._autograd import OpFunction
from ._op import define
from .contract import check_out


class Rows:
    """One call in row form: r = w / s as ``[rows, cols]``, and the grid shifted by the zero point."""

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
            drawn = noise.normal(seed, w.numel(), noise.WEIGHT_STREAM)
            self.w = self.w + (drawn * noise_std).view(self.w.shape).to(self.dtype)
        if seed is not None and scale_noise_std:
            drawn = noise.normal(seed, scale.numel(), noise.SCALE_STREAM)
            scale = scale + (drawn * scale_noise_std).view(-1, 1).to(self.dtype)
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
        """Integer codes, as floating point numbers."""
        if self.grid.by_sign:
            return torch.where(self.w.isnan(), self.w, -(self.w < 0).to(self.dtype))
        r = torch.minimum(torch.maximum(self.r, self.low), self.high)
        return torch.round(r * self.grid.steps - self.offset)

    def values(self) -> Tensor:
        """Dequantized weights."""
        return (self.codes() + self.offset) * (self.scale / self.grid.steps)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Where r lies below and above the range in which the gradient passes."""
        return self.r < self.pass_low, self.r > self.pass_high

    def scale_derivative(self) -> Tensor:
        """D of the module's docstring."""
        below, above = self.masks()
        inside = (self.codes() + self.offset) / self.grid.steps - self.grid.residual * self.r
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
#: Parts of contracts that several ops have: scales and grid of a weight; a weight; tangents of both.
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


def _pulled(kept: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of w, scale and zero point."""
    dw, ds, *dz = FakeQuantizeBackward.of(kept, g=g)
    return dw, ds, None if kept.zero_point is None else dz[0]


def _pushed(kept: Any, dtype: torch.dtype, *tangents: Tensor | None) -> Tensor:
    """Return the tangent of y; zeros and not None, which forward mode inside forward mode does not take."""
    if all(t is None for t in tangents):
        return torch.zeros_like(kept.w, dtype=dtype)
    tangent: Tensor = FakeQuantizeJvp.of(kept, **dict(zip(_TANGENT_NAMES, tangents, strict=True)), dtype=dtype)
    return tangent


class FakeQuantize(OpFunction):
    """y = Q(w; scale, zero_point)."""

    op = FORWARD

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep the dtype of y."""
        ctx.dtype = output.dtype

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The backward."""
        return dict(zip(_PRIMALS, _pulled(kept, gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Tensor:
        """The jvp."""
        return _pushed(kept, ctx.dtype, tangents.w, tangents.scale, tangents.zero_point)


class FakeQuantizeBackward(OpFunction):
    """(dw, ds[, dz]) from g: linear in g, so its transpose is the jvp and its own jvp is itself."""

    op = BACKWARD
    saves = (*_PRIMALS, "seed")

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call the op; without a zero point there is no dz."""
        found = super().run(*args)
        return found if args[cls._names.index("zero_point")] is not None else found[:2]

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: Any) -> None:
        """Keep the dtype of g."""
        ctx.dtype = call.g.dtype

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The jvp, as its own transpose."""
        tw, ts, *tz = gs
        tangents = (tw, ts, None if kept.zero_point is None else tz[0])
        return {} if all(t is None for t in tangents) else {"g": _pushed(kept, ctx.dtype, *tangents)}

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """The backward of the tangent."""
        if tangents.g is None:
            held = (kept.w, kept.scale, kept.zero_point)
            return tuple(torch.zeros_like(t) for t in held if t is not None)
        return FakeQuantizeBackward.of(kept, g=tangents.g)


class FakeQuantizeJvp(OpFunction):
    """dy from (dw, ds, dz): linear in them, so its transpose is the backward and its own jvp is itself."""

    op = JVP
    saves = (*_PRIMALS, "seed")

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: Tensor) -> None:
        """Keep the dtype of dy."""
        ctx.dtype = output.dtype

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The backward, as its own transpose."""
        return dict(zip(_TANGENT_NAMES, _pulled(kept, gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Tensor:
        """The jvp of the tangents."""
        return _pushed(kept, ctx.dtype, *(getattr(tangents, name) for name in _TANGENT_NAMES))


class FakeQuantizeDual(OpFunction):
    """(y, dy) from the tangents and the point: both rules at once."""

    op = DUAL
    saves = (*_PRIMALS, "seed")

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the dtype of y."""
        ctx.dtype = output[0].dtype

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """The backward of either output."""
        found: dict[str, Tensor | None] = {}
        for names, g in zip((_PRIMALS, _TANGENT_NAMES), gs, strict=True):
            if g is not None and cls.needs(ctx, *names):
                found.update(zip(names, _pulled(kept, g), strict=True))
        return found

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> tuple[Tensor, Tensor]:
        """The jvp of either output."""
        first, second = ([getattr(tangents, name) for name in names] for names in (_PRIMALS, _TANGENT_NAMES))
        return _pushed(kept, ctx.dtype, *first), _pushed(kept, ctx.dtype, *second)


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
        scale: step sizes, float32 (or float64 for a float64 ``w``). Without ``group_size`` its shape, trailing ones
            aside, is a prefix of ``w.shape``: ``[]`` for one scale, ``[N]`` or ``[N, 1]`` for one per row. With it,
            ``[..., K / group_size]``. Scales below 1e-5, negative ones included, act as 1e-5.
        grid: the quantization grid.
        group_size: number of consecutive inputs that share a scale; divides ``K``.
        zero_point: for affine grids, like ``scale``; need not be integral.
        noise_std: standard deviation of Gaussian noise added to ``w`` before quantizing (WinQ); a negative one
            gives the mirrored noise of the same seed.
        scale_noise_std: the same for ``scale``.
        seed: any int, of which the lower 64 bits count, or an int64 tensor with one element on ``w``'s device, which a
            captured graph may update in place. Drawn from torch's generator if None. Equal seeds give equal bits on
            every backend.
        grad_scale: factor on the gradients of ``scale`` and ``zero_point``; ``grid.grad_scale(w.numel())`` if None.
        dtype: dtype of the result, ``w.dtype`` if None; a float32 ``w`` may give bfloat16 or float16.
        out: contiguous tensor to write into; not differentiable, as everywhere in torch.

    Returns:
        Tensor of the shape of ``w`` with values ``scale / grid.steps * (code + grid.offset - zero_point)``.

    Raises:
        TypeError: if an argument is of another type, naming it.
        ValueError: if shapes, ``group_size``, ``out``, noise or ``zero_point`` do not fit, naming the argument.
        RuntimeError: if a dtype or device does not fit, or ``out`` is given for inputs that require grad.

    The straight-through rule is ParetoQ's (Liu et al., 2025), the noise WinQ's; see docs/algorithms.md.
    """
    check_layout(w, scale, grid, group_size, zero_point)
    check_reals(noise_std=noise_std, scale_noise_std=scale_noise_std)
    check_optional_reals(grad_scale=grad_scale)
    check_optional_tensors(out=out)
    if dtype is not None:
        check_dtype(dtype)
    if not (abs(noise_std) < math.inf and abs(scale_noise_std) < math.inf):  # torch.compile knows no math.isfinite
        raise ValueError(f"noise_std is {noise_std} and scale_noise_std is {scale_noise_std}, must be finite")
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


def check_layout(w: Tensor, scale: Tensor, grid: Grid, group_size: int | None, zero_point: Tensor | None) -> None:
    """Raise TypeError or ValueError unless ``scale`` and ``zero_point`` fit ``w`` at this granularity."""
    check_tensors(w=w, scale=scale)
    check_grid(grid)
    check_optional_tensors(zero_point=zero_point)
    if group_size is not None:
        if w.ndim == 0:
            raise ValueError("w has no dimension to divide into groups, group_size must be None")
        check_group_size(group_size, w.shape[-1])
        wanted = (*w.shape[:-1], w.shape[-1] // group_size)
        if scale.shape != wanted:
            raise ValueError(f"scale has shape {tuple(scale.shape)}, must be {wanted} for group_size {group_size}")
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
