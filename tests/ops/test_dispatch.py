"""A call goes to the first backend of its order that takes it, and to the reference at the end."""

import os
import subprocess
import sys

import pytest
import torch

from qatkernels import backends
from qatkernels.backends import Rule, by_call, order
from qatkernels.ops._op import OPS, Op


@pytest.fixture
def toy(monkeypatch):
    """An op on two backends of a GPU, one of which takes at most eight rows."""
    monkeypatch.delenv("QATKERNELS_BACKEND", raising=False)

    def answers(name):
        return lambda x, *out: out[0].fill_(ord(name[0])) if out else name

    op = Op("toy", "Tensor x", ("out",), answers("reference"), torch.empty_like)
    names = ("reference", "cuda", "triton")
    monkeypatch.setitem(backends.IMPLS, "toy", {name: answers(name) for name in names})
    monkeypatch.setitem(backends.CONDITIONS, "toy", {"cuda": lambda x: len(x) <= 8 and x.dtype != torch.float64})
    return op


def answers(op, device="CUDA"):
    """Return who answers to a few rows, to many, and to a few of float64."""
    run = by_call(op, [(backends.IMPLS[op.name][name], condition) for name, condition in order(op.name, device)])
    return [run(torch.zeros(8)), run(torch.zeros(9)), run(torch.zeros(1, dtype=torch.float64))]


def test_the_usual_order(toy):
    assert [name for name, _ in order("toy", "CUDA")] == ["triton"]
    assert answers(toy) == ["triton"] * 3
    assert answers(toy, "CPU") == ["reference"] * 3


def test_what_a_kernel_does_not_take_goes_on(toy, monkeypatch):
    monkeypatch.delitem(backends.IMPLS["toy"], "triton")
    assert answers(toy) == ["cuda", "reference", "reference"]
    assert backends.chosen("toy", "CUDA") == "cuda"


def test_a_forced_backend_is_the_first(toy, monkeypatch):
    monkeypatch.setattr(backends, "MISSING", {})
    monkeypatch.setenv("QATKERNELS_BACKEND", "cuda")
    assert answers(toy) == ["cuda", "triton", "triton"]
    monkeypatch.setenv("QATKERNELS_BACKEND", "reference")
    assert answers(toy) == ["reference"] * 3


def test_rules_come_before_the_usual_order(toy, monkeypatch):
    """A rule sends calls; the kernel may still pass them on."""
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cuda", lambda x: len(x) != 3),))
    assert answers(toy) == ["cuda", "triton", "triton"]
    run = by_call(toy, [(backends.IMPLS["toy"][name], condition) for name, condition in order("toy", "CUDA")])
    assert run(torch.zeros(3)) == "triton"
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("reference"),))
    assert answers(toy) == ["reference"] * 3
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cpp"),))
    with pytest.raises(RuntimeError, match="a rule for toy on CUDA names 'cpp'"):
        order("toy", "CUDA")


def test_conditions_do_not_see_outputs(toy):
    out = torch.zeros(9)
    fills = {name: lambda x, out, value=value: out.fill_(value) for value, name in enumerate(("cuda", "reference"), 1)}
    by_call(toy, [(fills["cuda"], lambda x: len(x) <= 8), (fills["reference"], None)])(torch.zeros(9), out)
    assert out.tolist() == [2.0] * 9


def test_on_a_cpu_no_call_is_looked_at():
    """There the cost of a choice would be paid by every call."""
    for op in OPS:
        for _, condition in order(op, "CPU"):
            assert condition is None, op


_SCRIPT = """
import torch
import qatkernels as qk
from qatkernels import backends
from qatkernels.ops._op import OPS

def few(x, packed, scale, zero_point, bias, offsets, *rest):
    asked.append(x.shape[0])
    return x.shape[0] <= 8 and x.dtype != torch.float64 and offsets is None

def counted(x, *rest):
    taken.append(x.shape[0])
    return kernel(x, *rest)

asked, taken = [], []
kernel = backends.IMPLS["lowbit_linear"]["cpp"]
backends.IMPLS["lowbit_linear"]["cpp"] = counted
backends.CONDITIONS["lowbit_linear"] = {"cpp": few}
del backends.os.environ["QATKERNELS_BACKEND"]
backends.register()  # so far the reference served every op
grid = qk.grids.lsq(4)
dense = qk.PackedWeight.from_float(torch.randn(16, 32), torch.full((16,), 0.3), grid)
stack = qk.PackedWeight.from_float(torch.randn(2, 16, 32), torch.full((2, 16), 0.3), grid)
for x in (torch.randn(8, 32), torch.randn(9, 32), torch.randn(3, 32, dtype=torch.float64)):
    expected = x.double() @ dense.dequantize().double().T
    torch.testing.assert_close(qk.lowbit_linear(x, dense).double(), expected, rtol=1e-4, atol=1e-4)
offsets = torch.tensor([1, 3], dtype=torch.int32)
assert qk.grouped_lowbit_linear(x.float(), stack, offsets).shape == (3, 16)
out = torch.full((9, 16), torch.nan)
constants = (list(grid.constants), grid.code_min, 4, None)
torch.ops.qatkernels.lowbit_linear_out(torch.ones(9, 32), dense.packed, dense.scale, None, None, None, *constants, out)
assert out.isfinite().all()
try:
    qk.lowbit_linear(torch.ones(9, 32), dense, torch.ones(3))
except RuntimeError as error:
    assert "bias is torch.float32 of shape (3,)" in str(error), error
else:
    raise AssertionError("a bias that does not fit was taken")
print(asked, taken)
"""


@pytest.mark.skipif("cpp" not in backends.IMPLS["lowbit_linear"], reason="needs the compiled kernels")
def test_the_dispatcher_asks_at_every_call():
    environment = {**os.environ, "QATKERNELS_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[8, 9, 3, 3, 9, 9] [8]"
