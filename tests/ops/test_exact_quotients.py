"""References divide in a way that every device rounds correctly: by tensors, or by numbers with an exact reciprocal."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qatkernels as qk
from qatkernels.arithmetic import quotient
from qatkernels.formats.integers import IntegerWeight
from qatkernels.nn.quantizer import stored_scale
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.testing.checks import every_check
from qatkernels.testing.samples import GRIDS, SEVENTH, make, weights

DIVISIONS = {torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.reciprocal, torch.ops.aten.reciprocal_}


class AsOnCuda(TorchDispatchMode):
    """Refuses what CUDA would not round as a CPU does: it multiplies by the reciprocal of a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in DIVISIONS:
            by = args[1] if len(args) > 1 else None
            exact = isinstance(by, torch.Tensor) or (by is not None and abs(math.frexp(by)[0]) == 0.5)
            assert exact, f"a division by {by}, which CUDA turns into a product"
        return func(*args, **(kwargs or {}))


def reference_of(op):
    """The reference of an op, called like a kernel."""

    def run(*args):
        count = len(OPS[op].outputs)
        inputs, outputs = args[: len(args) - count], args[len(args) - count :]
        with AsOnCuda():
            found = as_tuple(OPS[op].run_reference(*inputs))
        for output, y in zip(outputs, found, strict=False):
            output.copy_(y)

    return run


def test_the_mode_sees_numbers():
    with pytest.raises(AssertionError, match="a division by 3"), AsOnCuda():
        torch.ones(2) / 3.0
    with AsOnCuda():
        assert torch.equal(quotient(torch.ones(2), 3.0), torch.tensor([1 / 3, 1 / 3]))
        assert torch.equal(quotient(torch.ones(2), 4.0), torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("op", sorted({check.op for check in every_check(torch.device("cpu"))}))
def test_references(op):
    checks = [c for c in every_check(torch.device("cpu")) if c.op == op and not c.name.startswith(("bf", "float16"))]
    assert checks
    for check in checks[:6]:
        check.run(reference_of(op))


@pytest.mark.parametrize("grid", [*GRIDS, SEVENTH], ids=lambda g: f"{g.scheme}{g.bits}")
def test_grids(grid):
    """Everything that a grid's steps divide. Some have no exact reciprocal."""
    sample = make(grid, (6, 48), torch.float32)
    for op in ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "reset_"):
        with AsOnCuda():
            OPS[op].run_reference(*sample.args(op))
    codes = OPS["quantize"].reference(*sample.args("quantize"))
    with AsOnCuda():
        OPS["dequantize"].reference(codes, sample.scale, sample.zero_point, list(grid.constants), torch.float32)
        for method in ("max", "mean", "lsq", "range"):
            grid.init_scale(sample.w, method=method)
        stored_scale(sample.scale, torch.bfloat16, grid)
        if float(2 * grid.offset).is_integer():
            IntegerWeight.from_codes(codes, sample.scale.view(-1, 1), None, grid)


def test_gradients_of_dequantize():
    scale = torch.full((3,), 0.3, requires_grad=True)
    y = qk.dequantize(torch.ones(3, 4, dtype=torch.int8), scale, qk.grids.ternary())
    with AsOnCuda():
        (ds,) = torch.autograd.grad(y.sum(), scale)
    assert torch.equal(ds, torch.full((3,), 4 * (torch.tensor(1.0) / 1.5).item()))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_dynamic(bits):
    with AsOnCuda():
        OPS["fake_quantize_dynamic"].reference(weights((3, 7), torch.float32), bits)
