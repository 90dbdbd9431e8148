"""Compares an implementation of an op with its reference: bit for bit if the op is exact, else within an error bound.

A bound follows from the arithmetic: the number of roundings times magnitudes. It is not a tolerance to tune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..grids import Grid
from ..ops._fake_quantize import Rows
from ..ops._op import OPS, as_tuple
from .samples import Sample

#: An implementation of an op. It takes the arguments of the op, followed by the outputs to write, if there are any.
Implementation = Callable[..., Any]
#: Arguments of an op.
Arguments = tuple[Any, ...]

#: Number of sequential float32 additions that a kernel may make before it continues in float64 or by a tree. The error
#: of a sum is at most this, times the unit roundoff, times the sum of magnitudes.
SEQUENTIAL_ADDITIONS = 128


def meaning(op: str, *args: Any) -> tuple[Tensor, ...]:
    """Return the outputs of an op's reference as a tuple."""
    return as_tuple(OPS[op].reference(*args))


def poisoned(outputs: Any) -> Any:
    """Fill outputs with NaN, or the largest integer, so that elements that a kernel does not write are noticed."""
    for out in as_tuple(outputs):
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
    return outputs


def run_out(op: str, impl_out: Implementation, args: Arguments) -> tuple[Tensor, ...]:
    """Run an implementation with outputs that are filled with NaN, and return the outputs.

    Args:
        op: name of an op that has outputs.
        impl_out: called with the op's arguments and its outputs.
        args: arguments of the op.

    >>> def wrong(x, bits, out):
    ...     out[0] = x[0]
    >>> run_out("fake_quantize_dynamic", wrong, (torch.ones(2, 1), 8))
    (tensor([[1.],
            [nan]]),)
    """
    outputs = poisoned(OPS[op].meta(*args))
    impl_out(*args, *as_tuple(outputs))
    return as_tuple(outputs)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Raise AssertionError unless tensors are equal bit for bit. All NaNs count as equal.

    >>> assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]), "y")
    Traceback (most recent call last):
    AssertionError: y: signs differ
    """
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in different places"
        actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
        assert torch.equal(actual.signbit(), expected.signbit()), f"{what}: signs differ"
    different = actual != expected
    assert not different.any(), (
        f"{what}: {int(different.sum())} of {actual.numel()} differ, "
        f"first {actual[different][0].item()!r} for {expected[different][0].item()!r}"
    )


def run_in_place(impl: Implementation, args: Arguments) -> list[Tensor]:
    """Run an op that works in place on copies of its tensors, and return the copies."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    impl(*copies)
    return [a for a in copies if isinstance(a, Tensor)]


def check_in_place(op: str, impl: Implementation, args: Arguments, what: str = "") -> None:
    """Compare an implementation of an op that works in place with the reference: all tensors, bit for bit."""
    references = run_in_place(OPS[op].reference, _on_cpu(args))
    for actual, expected in zip(run_in_place(impl, args), references, strict=True):
        assert_same_bits(actual.cpu(), expected, f"{op} {what}")


def check_error(impl_out: Implementation, args: Arguments, what: str = "") -> None:
    """Compare an implementation of quantization_error with the reference. Only the order of float64 sums is free."""
    (actual,) = run_out("quantization_error", impl_out, args)
    (expected,) = meaning("quantization_error", *_on_cpu(args))
    terms = args[0].numel() // max(expected.numel(), 1) + 2
    kept = expected.isfinite()
    assert_same_bits(actual.cpu()[~kept], expected[~kept], f"quantization_error {what}")
    bound = terms * torch.finfo(torch.float64).eps * expected
    assert_within(actual.cpu()[kept], expected[kept], bound[kept], f"quantization_error {what}")


def check_norms(impl_out: Implementation, g: Tensor, w: Tensor | None, eta: float) -> None:
    """Compare sums of squares with the reference. The bound allows for the rounding of additions and squares."""
    (actual,) = run_out("perturbation_norms", impl_out, (g, w, eta))
    (expected,) = meaning("perturbation_norms", *_on_cpu((g, w, eta)))
    bound = (SEQUENTIAL_ADDITIONS + 8) * torch.finfo(torch.float64 if g.dtype == torch.float64 else torch.float32).eps
    assert_within(actual.cpu(), expected, bound * expected + 1e-300, "perturbation_norms")


def scale_gradients(sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (ds, its error bound, dz, its error bound) with exact summands, summed in float64."""
    return _scale_gradients(sample, sample.upstream().double(), 0.0)


def _scale_gradients(sample: Sample, g: Tensor, rounded: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same for gradients g of the values, that may be rounded by this fraction."""
    w, scale, zero_point, seed, grid, noise, scale_noise, grad_scale = sample.point
    rows = Rows(w, scale, zero_point, seed, tuple(grid), noise, scale_noise)
    g = g.reshape(rows.r.shape)
    below, above = rows.masks()
    unit = torch.finfo(rows.dtype).eps / 2

    def total(summand: Tensor) -> tuple[Tensor, Tensor]:
        products = g * summand.double()
        bound = (SEQUENTIAL_ADDITIONS * unit + rounded) * products.abs().sum(-1) + 2 * torch.finfo(
            scale.dtype
        ).eps * products.sum(-1).abs()
        return (products.sum(-1) * grad_scale).view(scale.shape), (bound * grad_scale).view(scale.shape)

    return *total(rows.scale_derivative()), *total(torch.where(below | above, -rows.scale, 0.0))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "") -> None:
    """Raise AssertionError unless every element is finite, and its error is at most its bound.

    Args:
        actual: the result, of any floating-point dtype.
        expected: the exact result in float64.
        bound: largest error in float64; broadcasts.
        what: start of the message.
    """
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"{what}: error {error.max().item():.3g} beyond {bound.max().item():.3g}"


def check_sample(op: str, impl_out: Implementation, sample: Sample) -> None:
    """Compare an implementation of an op of the fake-quantize family with the reference on one sample.

    >>> from qatkernels.testing import make
    >>> from qatkernels.grids import lsq
    >>> check_sample("fake_quantize", torch.ops.qatkernels.fake_quantize_out, make(lsq(4), (5, 37)))
    """
    args = sample.args(op)
    actual = run_out(op, impl_out, args)
    expected = meaning(op, *args)
    assert_same_bits(actual[0], expected[0], f"{op} {sample.name} {OPS[op].outputs[0]}")
    if op == "fake_quantize_dual":
        assert_same_bits(actual[1], expected[1], f"{op} {sample.name} {OPS[op].outputs[1]}")
    if op == "fake_quantize_backward":
        ds, ds_bound, dz, dz_bound = scale_gradients(sample)
        assert_within(actual[1], ds, ds_bound, f"{op} {sample.name} ds")
        if sample.zero_point is not None:
            assert_within(actual[2], dz, dz_bound, f"{op} {sample.name} dz")


def special_calls(grid: Grid, dtype: torch.dtype) -> dict[str, Arguments]:
    """Return calls by op with special weights: ties between levels, both zeros, subnormals, largest numbers, inf, NaN.

    Each row has one scale. Scales range from below the floor to infinity.
    """
    ties = [(k + 0.5 + grid.offset) / grid.steps for k in range(grid.code_min - 2, grid.code_max + 2)]
    edges = [*grid.clamp, *grid.passes, *grid.values[:4]]
    info = torch.finfo(dtype)
    extremes = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 4, info.max, -info.max, torch.inf, -torch.inf, torch.nan]
    unit = torch.tensor(ties + edges, dtype=torch.float64)
    near = torch.cat([unit, unit * (1 + info.eps), unit * (1 - info.eps)])
    scale = torch.tensor([1.0, 0.5, 3.0, 0.01, 1e-5, 1e-7, 0.0, -2.0, 1e30, torch.inf, torch.nan], dtype=torch.float32)
    rows = [torch.cat([near * max(s, 1e-5), torch.tensor(extremes, dtype=torch.float64)]) for s in scale.tolist()]
    w = torch.stack(rows).to(dtype)
    zero_point = torch.full_like(scale, 3.0 if grid.bits < 8 else 100.0) if grid.has_zero_point else None
    constants = list(grid.constants)
    point = (w, scale, zero_point, None, constants, 0.0, 0.0, 1.0)
    return {
        "fake_quantize": (*point, None),
        "fake_quantize_backward": (torch.ones_like(w), *point),
        "quantize": (w, scale, zero_point, constants, grid.code_min, grid.code_max),
    }


def check_first_output(op: str, impl_out: Implementation, args: Arguments) -> None:
    """Compare the first output (that of the weight's size) with the reference, bit for bit."""
    expected = meaning(op, *_on_cpu(args))[0]
    assert_same_bits(run_out(op, impl_out, args)[0].cpu(), expected, op)


def _on_cpu(args: Arguments) -> Arguments:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def _bound_of_rows(op: str, args: Arguments, number: torch.dtype) -> tuple[Tensor, ...]:
    """Return error bounds of the outputs of an op of _cross_entropy.py, divided by the unit roundoff.

    The relative error of an exponential is the error of its argument plus a few roundings of its own. If its value is
    below the smallest normal number of the computing dtype ``number``, kernels return 0 (csrc/cpu/simd.h).

    Args:
        op: the op.
        args: its arguments, tensors in float64.
        number: the dtype that the op computes in.
    """
    info = torch.finfo(number)
    *before, logits, lse, _, _ = args if op != "cross_entropy" else (args[0], torch.logsumexp(args[0], 1), *args[1:])
    x = logits - lse[:, None]
    p = x.exp()
    p_error = (p * (x.abs() + 8) * 4).nan_to_num(nan=0.0) + torch.where(p < 2 * info.smallest_normal, p / info.eps, 0.0)

    def sum_error(v: Tensor) -> Tensor:
        return ((p_error + SEQUENTIAL_ADDITIONS * p) * v.abs()).sum(1)

    if op == "cross_entropy":
        lse_error = sum_error(torch.ones_like(x)) + 4 * lse.abs()
        return lse_error + 8 * logits.nan_to_num(neginf=0.0).abs().amax(1), lse_error
    if op == "cross_entropy_backward":
        return (before[0].abs()[:, None] * (p_error + 4),)
    v = before[0]
    mean, mean_error = (p * v).sum(1), sum_error(v) + 2 * (p * v).sum(1).abs()
    loss_error = mean_error + 4 * v.abs().amax(1)
    if op == "cross_entropy_jvp":
        return (loss_error,)
    tangent_g, g = before[1:]
    second = g.abs()[:, None] * (
        (p_error + 8 * p) * (v.abs() + mean.abs()[:, None]) + (p + p_error) * mean_error[:, None]
    )
    if tangent_g is not None:
        second = second + tangent_g.abs()[:, None] * (p_error + 8)
    first = (g.abs()[:, None] * (p_error + 4),) if op == "cross_entropy_dual" else ()
    return (*first, second, loss_error)


def check_rows(op: str, impl_out: Implementation, args: Arguments, what: str = "") -> None:
    """Compare an implementation of an op of _cross_entropy.py with the formula in float64."""
    actual = run_out(op, impl_out, args)
    wide = tuple(a.double() if _real(a) else a for a in _on_cpu(args))
    number = torch.float64 if any(_real(a) and a.dtype == torch.float64 for a in args) else torch.float32
    expected, bounds, unit = (
        meaning(op, *wide),
        _bound_of_rows(op, wide, number),
        torch.finfo(number).eps,
    )
    for name, a, e, bound in zip(OPS[op].outputs, actual, expected, bounds, strict=True):
        info = torch.finfo(a.dtype)
        bound = unit * bound + info.eps * (e.abs() + info.smallest_normal)
        assert torch.equal(a.isnan().cpu(), e.isnan()), f"{op} {what} {name}: NaN in different places"
        # The outputs of an ignored row are exactly 0, even if its bound is NaN.
        bound = bound.nan_to_num(nan=0.0)
        kept = ~e.isnan()
        assert_within(a.cpu()[kept], e[kept], bound.expand_as(e)[kept], f"{op} {what} {name}")


def _real(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def check_gram_schmidt(impl_out: Implementation, args: Arguments, what: str = "") -> None:
    """Compare an implementation of gram_schmidt with float64. It may round w once, and sums in float64."""
    basis, w, h = _on_cpu(args)
    w_new, dots, sq = (t.cpu() for t in run_out("gram_schmidt", impl_out, args))
    rows, eps = basis.double(), torch.finfo(torch.float64).eps
    unit = torch.finfo(w.dtype).eps
    if h is None:
        assert_same_bits(w_new, w, what)
    else:
        magnitude = w.double().abs() + h.abs() @ rows.abs()
        assert_within(w_new, w.double() - h @ rows, unit * w_new.double().abs() + (len(h) + 2) * eps * magnitude, what)
    x = w_new.double()
    terms = max(x.numel(), 1)
    assert_within(dots, rows @ x, terms * eps * (rows.abs() @ x.abs()), what)
    assert_within(sq, x @ x, terms * eps * (x @ x), what)


def check_linear_dual(impl_out: Implementation, sample: Sample, tokens: int, transposed: bool) -> None:
    """Compare an implementation of quant_linear_dual with products of the reference's weight in float64."""
    dtype = sample.dtype or sample.w.dtype
    generator = torch.Generator().manual_seed(3)
    shape = tokens, sample.w.shape[0 if transposed else 1]
    x, u = (torch.randn(shape, generator=generator).to(sample.w.device, dtype) for _ in range(2))
    for tangent_x, tangents in ((u, sample.tangents()), (None, sample.tangents()), (u, (None,) * 3)):
        outputs = run_out("quant_linear_dual", impl_out, (x, tangent_x, *tangents, *sample.point, transposed))
        q, v = (t.double() for t in meaning("fake_quantize_dual", *tangents, *sample.point, dtype))
        q, v = (q, v) if transposed else (q.t(), v.t())
        wide, along = x.double(), torch.zeros_like(x).double() if tangent_x is None else u.double()
        eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for actual, exact, size in (
            (outputs[0], wide @ q, wide.abs() @ q.abs()),
            (outputs[1], wide @ v + along @ q, wide.abs() @ v.abs() + along.abs() @ q.abs()),
        ):
            # Sums are in float32, in any order. Then there are two roundings to the dtype of x, where neighbouring
            # numbers are at least ``least`` apart.
            bound = 2 * eps * exact.abs() + len(q) ** 0.5 * 8 * min(eps, 2**-23) * size + eps * size / 4 + 2 * least
            assert ((actual.double() - exact).abs() <= bound).all(), sample.name


def check_linear_backward(impl_out: Implementation, sample: Sample, tokens: int) -> None:
    """Compare an implementation of quant_linear_backward with the straight-through rule at an exact product."""
    dtype = sample.dtype or sample.w.dtype
    generator, (rows, cols) = torch.Generator().manual_seed(3), sample.w.shape
    # Small multiples of 1/4, whose products add up without rounding.
    g, x = (
        (torch.randint(-8, 9, (tokens, n), generator=generator) / 4).to(sample.w.device, dtype) for n in (rows, cols)
    )
    dw, ds, dz = (t.cpu() for t in run_out("quant_linear_backward", impl_out, (g, x, *sample.point)))
    product = (g.double().t() @ x.double()).cpu()
    w, scale, zero_point, seed, grid, noise, scale_noise, _ = _on_cpu(sample.point)
    below, above = Rows(w, scale, zero_point, seed, tuple(grid), noise, scale_noise).masks()
    passed = torch.where((below | above).view(w.shape), 0.0, product)
    eps = torch.finfo(dtype).eps
    assert_within(dw, passed, eps * passed.abs(), f"{sample.name} dw")
    expected = (t.cpu() for t in _scale_gradients(sample, product.to(sample.w.device), eps))
    of_scale, bound, of_zero, bound_of_zero = expected
    assert_within(ds, of_scale, bound, f"{sample.name} ds")
    if zero_point is not None:
        assert_within(dz, of_zero, bound_of_zero, f"{sample.name} dz")


def grouped_meaning(op: str, a: Tensor, b: Tensor, ends: Sequence[int]) -> Tensor:
    """Return a product by expert from its definition, one expert at a time.

    Args:
        op: name of the op.
        a: its first argument.
        b: its second argument.
        ends: end of each expert's tokens.
    """
    parts = [slice(s, e) for s, e in zip((0, *ends), ends, strict=False)]
    if op == "grouped_outer":
        return torch.stack([a[p].T @ b[p] for p in parts]) if parts else a.new_zeros(0, a.shape[1], b.shape[1])
    w = b.mT if op == "grouped_linear" else b
    y = a.new_zeros(a.shape[0], w.shape[-1])
    for e, part in enumerate(parts):
        y[part] = a[part] @ w[e]
    return y


def check_grouped(
    op: str,
    impl_out: Implementation,
    args: Arguments,
    ends: Sequence[int],
    device: torch.device | str,
    what: str = "",
) -> None:
    """Compare an implementation of a grouped product with float64.

    The error of a sum of n products is at most n roundings of the sum of their magnitudes, plus the rounding to the
    dtype.
    """
    a, b = args
    expected = grouped_meaning(op, a.double(), b.double(), ends)
    terms = {"grouped_linear": a.shape[1], "grouped_linear_transposed": a.shape[1], "grouped_outer": a.shape[0]}[op]
    unit = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
    sums = max(terms, 16) * unit * grouped_meaning(op, a.double().abs(), b.double().abs(), ends)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    (actual,) = run_out(op, impl_out, (a.to(device), b.to(device), offsets))
    assert_within(actual.cpu(), expected, sums + torch.finfo(a.dtype).eps * expected.abs(), f"{op} {ends} {what}")
