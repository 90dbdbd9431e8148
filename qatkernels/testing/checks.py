"""Every op that has kernels, at an aligned and at an odd shape, in float32 and in bfloat16: a smoke test of a backend.

Small enough to run first on a new machine, and under a sanitizer. The full tests are in tests/ops and tests/cuda.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

import qatkernels as qk
from qatkernels.ops._op import OPS
from qatkernels.ops.samples import draw, logits_calls, make, weights
from tests import compare, lowbit
from tests.cuda import lowbit as decoding
from tests.implementations import moved

DTYPES = (torch.float32, torch.bfloat16)
ALIGNED, ODD = (64, 1024), (37, 1003)
SHAPES = {"aligned": ALIGNED, "odd": ODD}
FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize")
#: Tokens up to which the CUDA kernel of lowbit_linear serves.
DECODED = 8


@dataclass(frozen=True)
class Check:
    """One call of one op.

    Attributes:
        op: the op.
        name: dtype, shape and what else tells it from its neighbours.
        run: takes an implementation, calls it, and raises AssertionError unless the result is right.
        refused_by: backends that do not serve it.
    """

    op: str
    name: str
    run: Callable[[Any], None]
    refused_by: tuple[str, ...] = ()


def checks(device: torch.device) -> Iterator[Check]:
    """Yield every check; nothing is drawn before it runs."""
    for dtype in DTYPES:
        for form, shape in SHAPES.items():
            name = f"{str(dtype)[6:]} {form}"
            for part in (family, of_rows, in_place, products, experts):
                yield from part(device, dtype, shape, name)
    for form, shape in SHAPES.items():
        yield Check("normal", form, partial(_exact, "normal", (torch.tensor(-5), shape[0] * shape[1], 0), device))
        for grid in (qk.grids.lsq(4), qk.grids.lsq(3)):
            kind = f"{grid.scheme}{grid.bits} {form}"
            codes = partial(_codes, grid, shape)
            layout = (grid.code_min, grid.storage_bits)
            yield Check("pack", kind, lambda f, c=codes, k=layout: _exact("pack", (c(), *k), device, f))
            yield Check("unpack", kind, lambda f, c=codes, k=layout: _unpacks(c(), k, device, f))


@cache
def checks_on(device: torch.device) -> tuple[Check, ...]:
    """Return every check on a device, made once."""
    return tuple(checks(device))


def family(device, dtype, shape, name):
    """Fake quantization with zero points and without, with noise and without."""
    for op in FAMILY:
        for grid, noise in ((qk.grids.affine(4), False), (qk.grids.seq(2), op != "quantize")):
            sample = partial(make, grid, shape, dtype, device=device, noise=noise)
            yield Check(
                op, f"{name} {grid.scheme}{grid.bits}", lambda f, o=op, s=sample: compare.check_sample(o, f, s())
            )

    def dequantize(impl):
        sample = make(qk.grids.affine(4), shape, dtype)
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        _exact("dequantize", (codes, sample.scale, sample.zero_point, list(sample.grid.constants), dtype), device, impl)

    yield Check("dequantize", name, dequantize)
    yield Check(
        "fake_quantize_dynamic", name, partial(_exact, "fake_quantize_dynamic", (weights(shape, dtype), 8), device)
    )


def of_rows(device, dtype, shape, name):
    """Cross-entropy and Gram-Schmidt."""
    size = "3x4096" if shape is ALIGNED else "4x1500"
    for kind, op, args in logits_calls(dtype):
        if kind.startswith(size):
            absent = ", ".join(str(i) for i, a in enumerate(args) if a is None)
            run = partial(_moved_rows, op, args, device)
            yield Check(op, f"{name}{' without ' + absent if absent else ''}", run)

    def gram_schmidt(impl, update):
        rows, cols = shape
        h = draw((rows,), torch.float64, device, seed=2) if update else None
        compare.check_gram_schmidt(impl, (draw((rows, cols), dtype, device), draw((cols,), device=device, seed=1), h))

    for update in (False, True):
        yield Check("gram_schmidt", f"{name}{' update' if update else ''}", partial(gram_schmidt, update=update))


def in_place(device, dtype, shape, name):
    """Resets and perturbations."""

    def reset(impl):
        compare.check_in_place("reset_", impl, make(qk.grids.affine(4), shape, dtype, device=device).args("reset_"))

    yield Check("reset_", name, reset)
    w, g = partial(weights, shape, dtype, device), partial(weights, shape, dtype, device, seed=1)
    factor = torch.tensor(3.7)
    for op in ("perturb_", "perturb_swap_"):
        yield Check(op, name, lambda f, o=op: compare.check_in_place(o, f, (w(), g(), factor.to(device), 0.01)))
    yield Check("perturbation_norms", name, lambda f: compare.check_norms(f, g(), w(), 0.01))


def products(device, dtype, shape, name):
    """Products with a packed weight, forward and transposed, and a layer with its tangent."""
    rows, cols = shape
    for grid, group in (
        (qk.grids.binary(), None),
        (qk.grids.lsq(3), None),
        (qk.grids.affine(4), 128 if shape is ALIGNED else None),
    ):
        kind = f"{name} {grid.scheme}{grid.bits}"
        for tokens in (1, DECODED):
            call = partial(decoding.make, grid, tokens, rows, cols, group, dtype, device)
            yield Check("lowbit_linear", f"{kind} {tokens} tokens", partial(_decodes, call))
        for op, tokens, act in (
            ("lowbit_linear", 130, None),
            ("lowbit_linear", 130, 8),
            ("lowbit_linear_transposed", 33, None),
        ):
            run = partial(_multiplies, op, grid, shape, group, dtype, tokens, act, device)
            yield Check(op, f"{kind} {tokens} tokens act {act}", run, ("cuda",))
    for transposed in (False, True):

        def dual(impl, transposed=transposed):
            compare.check_linear_dual(impl, make(qk.grids.affine(4), shape, dtype, device=device), 33, transposed)

        yield Check("quant_linear_dual", f"{name}{' transposed' if transposed else ''}", dual)


def experts(device, dtype, shape, name):
    """Products of tokens with the weights of their experts, one of whom has none."""
    rows, cols = shape
    for op in ("grouped_linear", "grouped_linear_transposed", "grouped_outer"):
        x, g = draw((40, cols), dtype), draw((40, rows), dtype, seed=1)
        w = draw((3, rows, cols), dtype, seed=2)
        args = {"grouped_linear": (x, w), "grouped_linear_transposed": (g, w), "grouped_outer": (g, x)}[op]
        yield Check(op, name, partial(compare.check_grouped, op, args=args, ends=(7, 7, 33), device=device))


def _exact(op, args, device, impl):
    (actual,) = compare.run_out(op, impl, moved(args, device))
    compare.assert_same_bits(actual.cpu(), OPS[op].reference(*args), op)


def _codes(grid, shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(grid.code_min, grid.code_max + 1, shape, generator=generator).to(grid.code_dtype)


def _unpacks(codes, layout, device, impl):
    packed = OPS["pack"].reference(codes, *layout)
    _exact("unpack", (packed, *layout, codes.shape[-1]), device, impl)


def _moved_rows(op, args, device, impl):
    compare.check_rows(op, impl, moved(args, device))


def _decodes(call, impl):
    args = call()
    (y,) = compare.run_out("lowbit_linear", impl, args)
    compare.assert_within(y, *decoding.reference(args))


def _multiplies(op, grid, shape, group, dtype, tokens, act_bits, device, impl):
    weight = lowbit.scaled_weight(grid, shape, group, torch.float32, "any" if grid.has_zero_point else None)
    case = lowbit.Case("", weight, lowbit.activations((tokens, shape[1]), dtype), act_bits=act_bits)
    args, expected, bound = case.call(op)
    (actual,) = compare.run_out(op, impl, moved(args, device))
    compare.assert_within(actual.cpu(), expected, bound)
