"""A first test of a backend: every op that has kernels, at an aligned and an odd shape, in float32 and bfloat16.

It is small enough to run first on a new machine, and under a sanitizer. The full tests are in tests/ops and tests/cuda.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from .. import grids
from ..dtypes import dtype_name
from ..grids import Grid
from . import compare, decode
from . import products as packed
from .compare import Arguments, Implementation
from .samples import Sample, draw, logits_calls, make, weights

DTYPES = (torch.float32, torch.bfloat16)
ALIGNED, ODD = (64, 1024), (37, 1003)
SHAPES = {"aligned": ALIGNED, "odd": ODD}
FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize")
#: Largest number of tokens that the CUDA kernel of lowbit_linear serves.
DECODED = 8


@dataclass(frozen=True)
class Check:
    """A check of one call of one op.

    Attributes:
        op: the op.
        name: dtype, shape and whatever else distinguishes the call.
        run: calls an implementation, and raises AssertionError unless the result is right.
        refused_by: backends that do not serve the call.
    """

    op: str
    name: str
    run: Callable[[Implementation], None]
    refused_by: tuple[str, ...] = ()


def check_op(op: str, implementation: Implementation, device: torch.device | str = "cpu") -> int:
    """Compare an implementation of an op with the reference, on calls of several shapes and dtypes.

    Args:
        op: name of an op in ``torch.ops.qatkernels`` that has kernels.
        implementation: called like ``torch.ops.qatkernels.<op>_out``: with the op's arguments, contiguous and on
            ``device``, followed by the outputs to write. An op that works in place (``reset_``, ``perturb_``,
            ``perturb_swap_``) has no outputs.
        device: device of the arguments.

    Returns:
        The number of calls that were compared.

    Raises:
        ValueError: if there are no calls of the op.
        AssertionError: if a result is wrong; the message names the call and the error.

    >>> def mine(codes, code_min, bits, out):
    ...     out.copy_(torch.ops.qatkernels.pack(codes, code_min, bits))
    >>> check_op("pack", mine)
    4
    """
    checks = [check for check in checks_on(torch.device(device)) if check.op == op]
    if not checks:
        known = sorted({check.op for check in checks_on(torch.device(device))})
        raise ValueError(f"op is {op!r}, must be one of {', '.join(known)}")
    for check in checks:
        try:
            check.run(implementation)
        except AssertionError as error:
            raise AssertionError(f"{op}, {check.name}: {error}") from error
    return len(checks)


def every_check(device: torch.device) -> Iterator[Check]:
    """Yield every check. Most checks make their tensors only when they run.

    >>> sorted({check.op for check in every_check(torch.device("cpu"))})[:3]
    ['cross_entropy', 'cross_entropy_backward', 'cross_entropy_dual']
    """
    for dtype in DTYPES:
        for form, shape in SHAPES.items():
            name = f"{dtype_name(dtype)} {form}"
            for part in (family, of_rows, in_place, products, experts):
                yield from part(device, dtype, shape, name)
    for form, shape in SHAPES.items():
        yield Check("normal", form, partial(_exact, "normal", (torch.tensor(-5), shape[0] * shape[1], 0), device))
        for grid in (grids.lsq(4), grids.lsq(3)):
            kind = f"{grid.scheme}{grid.bits} {form}"
            codes = partial(_codes, grid, shape)
            layout = (grid.code_min, grid.storage_bits)
            yield Check("pack", kind, partial(_packs, codes, layout, device))
            yield Check("unpack", kind, partial(_unpacks, codes, layout, device))


@cache
def checks_on(device: torch.device) -> tuple[Check, ...]:
    """Return every check on a device; the result is cached."""
    return tuple(every_check(device))


def family(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], name: str) -> Iterator[Check]:
    """Yield checks of fake quantization, with and without zero points, with and without noise."""
    for op in FAMILY:
        for grid, noise in ((grids.affine(4), False), (grids.seq(2), op != "quantize")):
            sample = partial(make, grid, shape, dtype, device=device, noise=noise)
            yield Check(op, f"{name} {grid.scheme}{grid.bits}", partial(_quantizes, op, sample))

    for grid in (grids.affine(4), grids.seq(2)):
        for weighted in (False, True):
            kind = f"{name} {grid.scheme}{grid.bits}{' moments' if weighted else ''}"
            sample = partial(make, grid, shape, dtype, device=device)
            yield Check("quantization_error", kind, partial(_sums_errors, sample, weighted))

    def dequantize(impl: Implementation) -> None:
        sample = make(grids.affine(4), shape, dtype)
        (codes,) = compare.meaning("quantize", *sample.args("quantize"))
        _exact("dequantize", (codes, sample.scale, sample.zero_point, list(sample.grid.constants), dtype), device, impl)

    yield Check("dequantize", name, dequantize)
    yield Check(
        "fake_quantize_dynamic", name, partial(_exact, "fake_quantize_dynamic", (weights(shape, dtype), 8), device)
    )


def of_rows(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], name: str) -> Iterator[Check]:
    """Yield checks of cross-entropy and Gram-Schmidt."""
    size = "3x4096" if shape is ALIGNED else "4x1500"
    for kind, op, args in logits_calls(dtype):
        if kind.startswith(size):
            absent = ", ".join(str(i) for i, a in enumerate(args) if a is None)
            run = partial(_moved_rows, op, args, device)
            yield Check(op, f"{name}{' without ' + absent if absent else ''}", run)

    def gram_schmidt(impl: Implementation, update: bool) -> None:
        rows, cols = shape
        h = draw((rows,), torch.float64, device, seed=2) if update else None
        compare.check_gram_schmidt(impl, (draw((rows, cols), dtype, device), draw((cols,), device=device, seed=1), h))

    for update in (False, True):
        yield Check("gram_schmidt", f"{name}{' update' if update else ''}", partial(gram_schmidt, update=update))


def in_place(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], name: str) -> Iterator[Check]:
    """Yield checks of resets and perturbations."""

    def reset(impl: Implementation) -> None:
        compare.check_in_place("reset_", impl, make(grids.affine(4), shape, dtype, device=device).args("reset_"))

    yield Check("reset_", name, reset)
    w, g = partial(weights, shape, dtype, device), partial(weights, shape, dtype, device, seed=1)
    factor = torch.tensor(3.7)
    for op in ("perturb_", "perturb_swap_"):
        yield Check(op, name, partial(_perturbs, op, w, g, factor.to(device)))
    yield Check("perturbation_norms", name, lambda f: compare.check_norms(f, g(), w(), 0.01))


def products(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], name: str) -> Iterator[Check]:
    """Yield checks of products with a packed weight, forward and transposed, and of a layer with its tangent."""
    rows, cols = shape
    for grid, group in (
        (grids.binary(), None),
        (grids.lsq(3), None),
        (grids.affine(4), 128 if shape is ALIGNED else None),
    ):
        kind = f"{name} {grid.scheme}{grid.bits}"
        for tokens in (1, DECODED):
            call = partial(decode.make, grid, tokens, rows, cols, group, dtype, device)
            yield Check("lowbit_linear", f"{kind} {tokens} tokens", partial(_decodes, call))
        for op, tokens, act in (
            ("lowbit_linear", 130, None),
            ("lowbit_linear", 130, 8),
            ("lowbit_linear_transposed", 33, None),
        ):
            run = partial(_multiplies, op, grid, shape, group, dtype, tokens, act, device)
            yield Check(op, f"{kind} {tokens} tokens act {act}", run, ("cuda",))
    for transposed in (False, True):

        def dual(impl: Implementation, transposed: bool = transposed) -> None:
            compare.check_linear_dual(impl, make(grids.affine(4), shape, dtype, device=device), 33, transposed)

        yield Check("quant_linear_dual", f"{name}{' transposed' if transposed else ''}", dual)

    def backward(impl: Implementation) -> None:
        compare.check_linear_backward(impl, make(grids.affine(4), shape, dtype, device=device), 33)

    yield Check("quant_linear_backward", name, backward)


def experts(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], name: str) -> Iterator[Check]:
    """Yield checks of products by expert, where one expert has no tokens."""
    rows, cols = shape
    for op in ("grouped_linear", "grouped_linear_transposed", "grouped_outer"):
        x, g = draw((40, cols), dtype), draw((40, rows), dtype, seed=1)
        w = draw((3, rows, cols), dtype, seed=2)
        args = {"grouped_linear": (x, w), "grouped_linear_transposed": (g, w), "grouped_outer": (g, x)}[op]
        yield Check(op, name, partial(compare.check_grouped, op, args=args, ends=(7, 7, 33), device=device))


def moved(args: Arguments, device: torch.device | str) -> Arguments:
    """Return arguments with all tensors on a device."""
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def _quantizes(op: str, sample: Callable[[], Sample], impl: Implementation) -> None:
    compare.check_sample(op, impl, sample())


def _sums_errors(sample: Callable[[], Sample], weighted: bool, impl: Implementation) -> None:
    *tensors, moments, constants = sample().args("quantization_error")
    compare.check_error(impl, (*tensors, moments if weighted else None, constants))


def _perturbs(
    op: str,
    w: Callable[[], torch.Tensor],
    g: Callable[[], torch.Tensor],
    factor: torch.Tensor,
    impl: Implementation,
) -> None:
    compare.check_in_place(op, impl, (w(), g(), factor, 0.01))


def _exact(op: str, args: Arguments, device: torch.device, impl: Implementation) -> None:
    (actual,) = compare.run_out(op, impl, moved(args, device))
    compare.assert_same_bits(actual.cpu(), compare.meaning(op, *args)[0], op)


def _codes(grid: Grid, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(grid.code_min, grid.code_max + 1, shape, generator=generator).to(grid.code_dtype)


def _packs(
    codes: Callable[[], torch.Tensor], layout: tuple[int, int], device: torch.device, impl: Implementation
) -> None:
    _exact("pack", (codes(), *layout), device, impl)


def _unpacks(
    codes: Callable[[], torch.Tensor], layout: tuple[int, int], device: torch.device, impl: Implementation
) -> None:
    (packed_codes,) = compare.meaning("pack", codes(), *layout)
    _exact("unpack", (packed_codes, *layout, codes().shape[-1]), device, impl)


def _moved_rows(op: str, args: Arguments, device: torch.device, impl: Implementation) -> None:
    compare.check_rows(op, impl, moved(args, device))


def _decodes(call: Callable[[], Arguments], impl: Implementation) -> None:
    args = call()
    (y,) = compare.run_out("lowbit_linear", impl, args)
    compare.assert_within(y, *decode.reference(args))


def _multiplies(
    op: str,
    grid: Grid,
    shape: tuple[int, int],
    group: int | None,
    dtype: torch.dtype,
    tokens: int,
    act_bits: int | None,
    device: torch.device,
    impl: Implementation,
) -> None:
    weight = packed.scaled_weight(grid, shape, group, torch.float32, "any" if grid.has_zero_point else None)
    case = packed.Case("", weight, packed.activations((tokens, shape[1]), dtype), act_bits=act_bits)
    args, expected, bound = case.call(op)
    (actual,) = compare.run_out(op, impl, moved(args, device))
    compare.assert_within(actual.cpu(), expected, bound)
