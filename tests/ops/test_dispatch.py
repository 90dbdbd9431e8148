"""A call goes to the first backend of its order that takes it, and to the reference at the end."""

import os
import subprocess
import sys

import pytest
import torch

from qatkernels import backends
from qatkernels.backends import Rule, Stage, order
from qatkernels.ops._op import OPS, Op
from qatkernels.ops.contract import Contract
from tests.choices import choice

NAMES = ("reference", "cuda", "triton")
#: Where the extension's own kernels are; here are two that it does not have.
COMPILED = torch.library.Library("qatkernels_cpp", "FRAGMENT")
COMPILED.define("toy(Tensor x, float[] grid) -> Tensor")
COMPILED.define("toy_out(Tensor x, float[] grid, Tensor(a!) out) -> ()")
COMPILED.define("toy_serves(Tensor x, float[] grid) -> bool")

needs_extension = pytest.mark.skipif("cpp" in backends.MISSING, reason="the extension makes the choice")


def answer(name):
    """Return an implementation, in both forms, that says whose it is by a number."""
    number = float(NAMES.index(name))

    def run(x, grid, *out):
        if not out:
            return torch.full((), number)
        out[0].fill_(number)
        return None

    return run


def few(x, grid):
    return len(x) <= 8 and x.dtype != torch.float64


COMPILED.impl("toy", answer("cuda"), "CPU")
COMPILED.impl("toy_out", answer("cuda"), "CPU")
COMPILED.impl("toy_serves", few, "CPU")


@pytest.fixture
def toy(monkeypatch):
    """An op on two backends of a GPU, one of which takes at most eight rows."""
    monkeypatch.delenv("QATKERNELS_BACKEND", raising=False)
    contract = Contract("x: float\n-> out: float32 []", {"x": "Tensor", "grid": "float[]"})
    op = Op("toy", "Tensor x, float[] grid", contract, answer("reference"))
    monkeypatch.setitem(backends.IMPLS, "toy", {name: answer(name) for name in NAMES})
    monkeypatch.setitem(backends.IMPLS, "toy_out", {name: answer(name) for name in NAMES})
    monkeypatch.setitem(backends.CONDITIONS, "toy", {"cuda": few})
    return op


def choice_of(op, op_name="toy", device="CUDA"):
    """Return an op that passes calls on as the order of a device says, for tensors of a CPU."""
    return choice(op, op_name, order("toy", device))


def answers(op, device="CUDA"):
    """Return who answers to eight rows, to three, to many, and to one of float64."""
    run = choice_of(op, device=device)
    calls = (torch.zeros(8, 1), torch.zeros(3, 2, 1)[:, 0], torch.zeros(9, 1), torch.zeros(1, 1, dtype=torch.float64))
    return [NAMES[int(run(x, [1.0, 2.0]))] for x in calls]


@needs_extension
def test_the_usual_order(toy):
    assert order("toy", "CUDA") == [Stage("triton")]
    assert answers(toy) == ["triton"] * 4
    assert answers(toy, "CPU") == ["reference"] * 4


@needs_extension
def test_what_a_kernel_does_not_take_goes_on(toy, monkeypatch):
    monkeypatch.delitem(backends.IMPLS["toy"], "triton")
    assert answers(toy) == ["cuda", "cuda", "reference", "reference"]
    assert backends.chosen("toy", "CUDA") == "cuda"


@needs_extension
def test_a_forced_backend_is_the_first(toy, monkeypatch):
    monkeypatch.setattr(backends, "MISSING", {})
    monkeypatch.setenv("QATKERNELS_BACKEND", "cuda")
    assert answers(toy) == ["cuda", "cuda", "triton", "triton"]
    monkeypatch.setenv("QATKERNELS_BACKEND", "reference")
    assert answers(toy) == ["reference"] * 4


@needs_extension
def test_rules_come_before_the_usual_order(toy, monkeypatch):
    """A rule sends calls; the kernel may still pass them on."""
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cuda", rows=3),))
    assert order("toy", "CUDA") == [Stage("cuda", 3, True), Stage("triton")]
    assert answers(toy) == ["triton", "cuda", "triton", "triton"]
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cuda"),))
    assert answers(toy) == ["cuda", "cuda", "triton", "triton"]
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("triton", rows=1), Rule("cuda"), Rule("reference")))
    assert answers(toy) == ["cuda", "cuda", "reference", "triton"]
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("reference"),))
    assert answers(toy) == ["reference"] * 4
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cpp"),))
    with pytest.raises(RuntimeError, match="a rule for toy on CUDA names 'cpp'"):
        order("toy", "CUDA")


@needs_extension
def test_a_backend_in_python_may_take_some_calls_too(toy, monkeypatch):
    monkeypatch.setitem(backends.CONDITIONS, "toy", {"triton": lambda x, grid: grid[1] == 2.0})
    run = choice_of(toy)
    assert [NAMES[int(run(torch.zeros(1, 1), [1.0, last]))] for last in (2.0, 3.0)] == ["triton", "cuda"]


@needs_extension
def test_rows_are_those_of_all_leading_dimensions(toy, monkeypatch):
    monkeypatch.setitem(backends.CONDITIONS, "toy", {})
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cuda", rows=6),))
    run = choice_of(toy)
    shapes = ((7,), (2, 3, 9), (7, 1), (2, 4, 0), (0, 9, 2), ())
    assert [NAMES[int(run(torch.zeros(s), []))] for s in shapes] == ["cuda", "cuda", "triton", "triton", "cuda", "cuda"]


@needs_extension
def test_conditions_do_not_see_outputs(toy, monkeypatch):
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("cuda"),))
    run = choice_of(toy, "toy_out")
    for rows, name in ((8, "cuda"), (9, "triton")):
        out = torch.full((2,), torch.nan)
        run(torch.zeros(rows, 1), [], out)
        assert out.tolist() == [NAMES.index(name)] * 2


@needs_extension
def test_a_choice_ends(toy):
    with pytest.raises(RuntimeError, match="no backend takes this call of qatkernels_choices::"):
        choice(toy, "toy", [Stage("cuda", None, True)])(torch.zeros(9, 1), [])
    with pytest.raises(RuntimeError, match="qatkernels_cpp::absent"):
        choice(
            Op("absent", "Tensor x", Contract("-> out: like(x) []", {"x": "Tensor"}), None), "absent", [Stage("cuda")]
        )


@pytest.mark.parametrize("present", [("cuda", "triton"), ("cuda",), ("triton",), ()], ids="+".join)
def test_decoding_goes_to_the_cuda_kernel(present, monkeypatch):
    """Up to eight tokens; what it does not take of those, and all else, to Triton, or to the reference."""
    monkeypatch.delenv("QATKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "MISSING", {})
    monkeypatch.setitem(backends.IMPLS, "lowbit_linear", dict.fromkeys((*present, "reference")))
    monkeypatch.setitem(backends.CONDITIONS, "lowbit_linear", {"cuda": few})
    first = [Stage("cuda", 8, True)] if "cuda" in present else []
    rest = [Stage("triton")] if "triton" in present else [Stage("cuda", None, True)] * len(first) + [Stage("reference")]
    assert order("lowbit_linear", "CUDA") == first + rest


def test_without_an_extension_nobody_counts_rows(toy, monkeypatch):
    monkeypatch.setattr(backends, "MISSING", {"cpp": "not built"})
    monkeypatch.setitem(backends.RULES, ("toy", "CUDA"), (Rule("reference", rows=1),))
    assert order("toy", "CUDA") == [Stage("triton")]


def test_on_a_cpu_no_call_is_looked_at():
    """There the cost of a choice would be paid by every call."""
    for op in OPS:
        assert all(stage.takes_all for stage in order(op, "CPU")), op


_SCRIPT = """
import sys
import torch
import qatkernels as qk
from qatkernels import backends
from qatkernels.ops._op import OPS

def counted(*args):
    taken.append(args[0].shape[0])
    return meaning(*args)

taken, op = [], OPS["lowbit_linear"]
meaning = op.reference
object.__setattr__(op, "reference", counted)
backends.PREFERENCE["CPU"] = ("reference", "cpp")
backends.RULES["lowbit_linear", "CPU"] = (backends.Rule("cpp", rows=8),)
del backends.os.environ["QATKERNELS_BACKEND"]
backends.register()  # so far the reference served every op
grid = qk.grids.lsq(4)
dense = qk.PackedWeight.from_float(torch.randn(16, 32), torch.full((16,), 0.3), grid)
stack = qk.PackedWeight.from_float(torch.randn(2, 16, 32), torch.full((2, 16), 0.3), grid)
for x in (torch.randn(8, 32), torch.randn(9, 32), torch.randn(2, 4, 32, dtype=torch.float64), torch.randn(0, 32)):
    expected = x.double() @ dense.dequantize().double().T
    torch.testing.assert_close(qk.lowbit_linear(x, dense).double(), expected, rtol=1e-4, atol=1e-4)
offsets = torch.tensor([1, 10], dtype=torch.int32)
assert qk.grouped_lowbit_linear(torch.ones(10, 32), stack, offsets).shape == (10, 16)
out = torch.full((9, 16), torch.nan)
constants = (list(grid.constants), grid.code_min, 4, None)
torch.ops.qatkernels.lowbit_linear_out(torch.ones(9, 32), dense.packed, dense.scale, None, None, None, *constants, out)
assert out.isfinite().all()
for rows in (8, 9):
    try:
        qk.lowbit_linear(torch.ones(rows, 32), dense, torch.ones(3))
    except RuntimeError as error:
        assert "bias has shape (3,), must be (16,)" in str(error), error
    else:
        raise AssertionError("a bias that does not fit was taken")
x = torch.randn(8, 32, requires_grad=True)
torch.autograd.gradcheck(lambda x: qk.lowbit_linear(x, dense), x.double().detach().requires_grad_())
y = torch.compile(lambda x: qk.lowbit_linear(x, dense), backend="eager", fullgraph=True)(x)
assert torch.equal(y, qk.lowbit_linear(x, dense))
entered = []
sys.setprofile(lambda frame, event, arg: entered.append(frame.f_code) if event == "call" else None)
torch.ops.qatkernels.lowbit_linear.default  # what follows is looked up by now
before = len(entered)
with torch.no_grad():
    qk.lowbit_linear(x, dense)
sys.setprofile(None)
inside = [code for code in entered[before:] if code.co_filename.endswith(("backends.py", "ops/_op.py", "contract.py"))]
assert {code.co_name for code in inside} <= {"call"}, inside
print(taken)
"""


@pytest.mark.skipif("cpp" not in backends.IMPLS["lowbit_linear"], reason="needs the compiled kernels")
def test_the_dispatcher_chooses_at_every_call():
    """A C++ kernel for few tokens and a backend in Python behind it; the first is reached without Python."""
    environment = {**os.environ, "QATKERNELS_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[9, 10, 9]"
