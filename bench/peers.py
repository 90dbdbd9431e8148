"""The peers: torch's own ops, the formulas in plain PyTorch that QAT code uses, and other libraries.

For every granularity a weight is viewed as ``[rows, cols]`` with one scale for each row. A peer with another
straight-through rule is compared with its own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qatkernels.grids import MIN_SCALE, Grid
from qatkernels.ops._op import as_tuple
from qatkernels.testing.samples import Sample

from .case import Call, Expected, Missing, attempt
from .exact import noise_of

aten = torch.ops.aten


def _values(w: Tensor, s: Tensor, grid: Grid) -> Tensor:
    if grid.by_sign:
        return torch.where(w < 0, -s, s)
    return (torch.round(torch.clamp(w / s, *grid.clamp) * grid.steps - grid.offset) + grid.offset) / grid.steps * s


def eager_forward(w: Tensor, scale: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Tensor:
    """Fake-quantize in plain PyTorch, with about six passes over memory."""
    return _values(w, scale.clamp_min(MIN_SCALE)[:, None], grid).to(dtype or w.dtype)


def _derivatives(w: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    s = scale.clamp_min(MIN_SCALE)[:, None]
    r = w / s
    below, above = (r < grid.passes[0]).float(), (r > grid.passes[1]).float()
    inside = 1.0 - below - above
    residual = r if grid.residual else 0.0
    return inside, below * grid.saturated[0] + above * grid.saturated[1] + inside * (_values(w, s, grid) / s - residual)


def eager_backward(g: Tensor, w: Tensor, scale: Tensor, grid: Grid, grad_scale: float) -> tuple[Tensor, Tensor]:
    """Return the straight-through gradients of the weight and of the scale."""
    inside, slope = _derivatives(w, scale, grid)
    return (inside * g).to(w.dtype), (slope * g * grad_scale).sum(-1)


def eager_jvp(tw: Tensor, ts: Tensor, w: Tensor, scale: Tensor, grid: Grid, grad_scale: float) -> Tensor:
    """Return the tangent (forward mode) by the same rule."""
    inside, slope = _derivatives(w, scale, grid)
    return (inside * tw + slope * ts[:, None] * grad_scale).to(w.dtype)


def eager_quantize(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return integer codes."""
    s = scale.clamp_min(MIN_SCALE)[:, None]
    return torch.round(torch.clamp(w / s, *grid.clamp) * grid.steps - grid.offset).to(grid.code_dtype)


class EagerFakeQuantize(torch.autograd.Function):
    """The formulas above as an autograd function, as QAT code writes it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, grid: Grid, grad_scale: float) -> Tensor:
        """Save the inputs."""
        ctx.save_for_backward(w, scale)
        ctx.rest = grid, grad_scale
        return eager_forward(w, scale, grid)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Apply the straight-through rule."""
        return *eager_backward(g, *ctx.saved_tensors, *ctx.rest), None, None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for one shape. With fullgraph a graph break is an error; otherwise it would be timed unnoticed."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def of_op(op: str, sample: Sample, args: tuple[Any, ...]) -> Iterator[Call | Missing]:
    """Yield the peers of an op of the fake-quantize family.

    Args:
        op: name of the op.
        sample: the sample, without zero point.
        args: the op's arguments.
    """
    torch.compiler.reset()
    w, scale = _row_form(op, sample)
    of_w = [a.view(w.shape) for a in args if isinstance(a, Tensor) and a.shape == sample.w.shape and a is not sample.w]
    grid, grad_scale = sample.grid, sample.point[-1]
    if sample.noise_std and op == "fake_quantize":
        yield _noisy(w, scale, sample)
        return
    eager: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "fake_quantize": (eager_forward, (w, scale, grid, sample.dtype)),
        "fake_quantize_backward": (eager_backward, (*of_w, w, scale, grid, grad_scale)),
        "fake_quantize_jvp": (eager_jvp, (*of_w, *_scale_tangent(args), w, scale, grid, grad_scale)),
        "quantize": (eager_quantize, (w, scale, grid)),
    }
    formula, inputs = eager[op]
    note = "on noisy weights that the forward stored" if sample.noise_std else ""
    for name, function in (("eager formula", formula), ("torch.compile", compiled(formula))):
        yield Call(name, lambda f=function: _shaped(f(*inputs), op, sample), "peer", note=note)  # type: ignore[misc]
    if sample.noise_std or sample.dtype:
        return
    if grid.scheme == "lsq":
        yield from _torch(op, of_w, w, scale, sample)
    if op == "fake_quantize" and grid.scheme == "lsq" and sample.group_size:
        yield attempt("torchao IntxFakeQuantizer", lambda: _torchao(sample))
    elif op == "fake_quantize" and grid.scheme == "lsq" and sample.scale.ndim:
        yield attempt("brevitas QuantLinear", lambda: _brevitas(sample))


def _row_form(op: str, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the weight and its scales as rows; for the backward, with the noise that the forward stored."""
    on_weight, on_scale = noise_of(sample) if op == "fake_quantize_backward" else (None, None)
    w = sample.w if on_weight is None else sample.w.float() + on_weight
    scale = sample.scale if on_scale is None else sample.scale + on_scale
    return w.view(scale.numel(), -1), scale.view(-1)


def _scale_tangent(args: tuple[Any, ...]) -> list[Tensor]:
    return [args[1].view(-1)] if isinstance(args[1], Tensor) else []


def _shaped(outputs: Any, op: str, sample: Sample) -> tuple[Tensor, ...]:
    """Return outputs in the op's shapes, with an empty gradient of the zero point."""
    given = as_tuple(outputs)
    if op == "fake_quantize_backward":
        return given[0].view(sample.w.shape), given[1].view(sample.scale.shape), given[1].new_empty(0)
    return (given[0].view(sample.w.shape),)


def _noisy(w: Tensor, scale: Tensor, sample: Sample) -> Call:
    def run() -> Tensor:
        noisy = w + torch.randn_like(w) * sample.noise_std
        return eager_forward(noisy, scale + torch.randn_like(scale) * sample.scale_noise_std, sample.grid)

    return Call("eager formula, randn", run, "peer", unchecked="its own noise")


def _torch(op: str, of_w: list[Tensor], w: Tensor, scale: Tensor, sample: Sample) -> Iterator[Call]:
    """Yield torch's fake-quantize ops, per channel or per tensor. Their gradient mask is computed after rounding."""
    whole = scale.numel() == 1
    where = (sample.grid.code_min, sample.grid.code_max) if whole else (0, sample.grid.code_min, sample.grid.code_max)
    shape, zero, real_zero = sample.w.shape, torch.zeros_like(scale, dtype=torch.int32), torch.zeros_like(scale)
    kind = "tensor" if whole else "channel"
    if op == "fake_quantize":
        plain = torch.fake_quantize_per_tensor_affine if whole else torch.fake_quantize_per_channel_affine
        learnable = getattr(torch, f"_fake_quantize_learnable_per_{kind}_affine")
        yield Call(f"torch per {kind}", lambda: plain(w, scale, zero, *where).view(shape), "peer", graph=False)
        yield Call(
            "torch learnable", lambda: learnable(w, scale, real_zero, *where, 1.0).view(shape), "peer", graph=False
        )
    if op == "fake_quantize_backward":
        (g,), grad_scale = of_w, sample.point[-1]
        if not whole:
            mask = aten.fake_quantize_per_channel_affine_cachemask(w, scale, zero, *where)[1]
            masked = aten.fake_quantize_per_channel_affine_cachemask_backward
            yield Call(
                "torch per channel, weight only", lambda: (masked(g, mask).view(shape), None, None), "peer",
                expected=lambda: (_torch_rule(g, w, scale, sample)[0], None, None),
                note="no gradient of the scale, and its mask was stored by the forward",
            )  # fmt: skip
        backward = getattr(aten, f"_fake_quantize_learnable_per_{kind}_affine_backward")

        def run() -> tuple[Tensor, Tensor, None]:
            dw, ds, _ = backward(g, w, scale, real_zero, *where, grad_scale)
            return dw.view(shape), ds.view(sample.scale.shape), None

        yield Call(
            "torch learnable", run, "peer", expected=lambda: _torch_rule(g, w, scale, sample),
            note="its own rule: the gradient passes up to high + 1/2",
        )  # fmt: skip


def _torch_rule(g: Tensor, w: Tensor, scale: Tensor, sample: Sample) -> Expected:
    """Return the result of torch's backward rule, in float64."""
    low, high = sample.grid.code_min, sample.grid.code_max
    r = w.double() / scale.double()[:, None]
    k = r.round()
    inside = (k >= low) & (k <= high)
    ds = (g.double() * torch.where(inside, k - r, k.clamp(low, high))).sum(-1) * sample.point[-1]
    return (g.double() * inside).view(sample.w.shape), ds.view(sample.scale.shape), None


def _torchao(sample: Sample) -> Call:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    dtype = getattr(torch, f"int{sample.grid.bits}")
    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, group_size=sample.group_size))
    return Call("torchao IntxFakeQuantizer", lambda: quantizer(sample.w), "peer", unchecked="scales of its own")


def _brevitas(sample: Sample) -> Call:
    from brevitas.nn import QuantLinear

    rows, cols = sample.w.shape
    layer = QuantLinear(cols, rows, bias=False, weight_bit_width=int(sample.grid.bits)).to(sample.w)
    layer.weight.data.copy_(sample.w)
    return Call(
        "brevitas QuantLinear", lambda: layer.quant_weight().value.detach(), "peer", unchecked="scales of its own"
    )
