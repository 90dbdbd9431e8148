"""A call goes to the first backend of its order that takes it, and to the reference at the end."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qatkernels import backends
from qatkernels.backends import Backend, Registry, Rule, Stage, order
from qatkernels.backends.dispatch import choice as in_python
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
def registry(monkeypatch):
    """An op on two backends of a GPU, one of which takes at most eight rows."""
    monkeypatch.delenv("QATKERNELS_BACKEND", raising=False)
    contract = Contract("x: float\n-> out: float32 []", {"x": "Tensor", "grid": "float[]"})
    found = Registry(ops={"toy": Op("toy", "Tensor x, float[] grid", contract, answer("reference"))})

    def load(registry, name):
        for form in ("toy", "toy_out"):
            registry.enter(name, form, answer(name))

    found.add(Backend("cpp", ("CPU",), lambda registry: None))
    found.add(Backend("cuda", ("CUDA",), partial(load, name="cuda"), priority=1, compiled=True))
    found.add(Backend("triton", ("CUDA",), partial(load, name="triton"), priority=2))
    found.load()
    found.enter("reference", "toy_out", answer("reference"))
    found.conditions["toy"] = {"cuda": few}
    return found


def choice_of(registry, op_name="toy", device="CUDA"):
    """Return an op that passes calls on as the order of a device says, for tensors of a CPU."""
    return choice(registry.ops["toy"], op_name, registry.order("toy", device), registry=registry)


def answers(registry, device="CUDA", run=None):
    """Return who answers to eight rows, to three, to many, and to one of float64."""
    run = run or choice_of(registry, device=device)
    calls = (torch.zeros(8, 1), torch.zeros(3, 2, 1)[:, 0], torch.zeros(9, 1), torch.zeros(1, 1, dtype=torch.float64))
    return [NAMES[int(run(x, [1.0, 2.0]))] for x in calls]


@needs_extension
def test_the_usual_order(registry):
    assert registry.order("toy", "CUDA") == [Stage("triton")]
    assert answers(registry) == ["triton"] * 4
    assert answers(registry, "CPU") == ["reference"] * 4


@needs_extension
def test_what_a_kernel_does_not_take_goes_on(registry):
    del registry.implementations["toy"]["triton"]
    assert answers(registry) == ["cuda", "cuda", "reference", "reference"]
    assert registry.chosen("toy", "CUDA") == "cuda"
    assert registry.report()["toy"] == {
        "CPU": ["reference"], "CUDA": ["cuda (some calls)", "reference"], "present": ["cuda", "reference"],
    }  # fmt: skip


@needs_extension
def test_a_forced_backend_is_the_first(registry, monkeypatch):
    monkeypatch.setenv("QATKERNELS_BACKEND", "cuda")
    assert answers(registry) == ["cuda", "cuda", "triton", "triton"]
    monkeypatch.setenv("QATKERNELS_BACKEND", "reference")
    assert answers(registry) == ["reference"] * 4


@needs_extension
def test_rules_come_before_the_usual_order(registry):
    """A rule sends calls; the kernel may still pass them on."""
    registry.rules["toy", "CUDA"] = (Rule("cuda", rows=3),)
    assert registry.order("toy", "CUDA") == [Stage("cuda", 3, True), Stage("triton")]
    assert answers(registry) == ["triton", "cuda", "triton", "triton"]
    registry.rules["toy", "CUDA"] = (Rule("cuda"),)
    assert answers(registry) == ["cuda", "cuda", "triton", "triton"]
    registry.rules["toy", "CUDA"] = (Rule("triton", rows=1), Rule("cuda"), Rule("reference"))
    assert answers(registry) == ["cuda", "cuda", "reference", "triton"]
    registry.rules["toy", "CUDA"] = (Rule("reference"),)
    assert answers(registry) == ["reference"] * 4
    registry.rules["toy", "CUDA"] = (Rule("cpp"),)
    with pytest.raises(RuntimeError, match="a rule for toy on CUDA names 'cpp'"):
        registry.order("toy", "CUDA")


def test_a_backend_that_no_call_reaches_is_loaded_on_demand():
    loaded = []
    found = Registry()
    found.add(Backend("far", ("CUDA",), lambda registry: loaded.append(registry), unreachable=lambda: "no GPU"))
    found.load()
    assert (loaded, found.missing) == ([], {"far": "no GPU"})
    found.load_backend("far")
    found.load_backend("far")
    assert (loaded, found.missing) == ([found], {})


def test_without_the_extension_the_choice_is_the_same(registry):
    op = registry.ops["toy"]
    for rules in ((), (Rule("cuda", rows=3),), (Rule("cuda"),), (Rule("triton", rows=1), Rule("cuda"))):
        registry.rules["toy", "CUDA"] = rules
        stages = registry.order("toy", "CUDA")
        found = answers(registry, run=in_python(op, "toy", stages, registry))
        if "cpp" not in backends.MISSING:
            assert found == answers(registry)
        out = torch.full((), torch.nan)
        in_python(op, "toy_out", stages, registry)(torch.zeros(9, 1), [], out)
        assert out == NAMES.index("triton")
    with pytest.raises(RuntimeError, match="no backend takes this call of toy"):
        in_python(op, "toy", [Stage("cuda", None, True)], registry)(torch.zeros(9, 1), [])


@needs_extension
def test_a_backend_in_python_may_take_some_calls_too(registry):
    registry.conditions["toy"] = {"triton": lambda x, grid: grid[1] == 2.0}
    run = choice_of(registry)
    assert [NAMES[int(run(torch.zeros(1, 1), [1.0, last]))] for last in (2.0, 3.0)] == ["triton", "cuda"]


@needs_extension
def test_rows_are_those_of_all_leading_dimensions(registry):
    registry.conditions["toy"] = {}
    registry.rules["toy", "CUDA"] = (Rule("cuda", rows=6),)
    run = choice_of(registry)
    shapes = ((7,), (2, 3, 9), (7, 1), (2, 4, 0), (0, 9, 2), ())
    assert [NAMES[int(run(torch.zeros(s), []))] for s in shapes] == ["cuda", "cuda", "triton", "triton", "cuda", "cuda"]


@needs_extension
def test_conditions_do_not_see_outputs(registry):
    registry.rules["toy", "CUDA"] = (Rule("cuda"),)
    run = choice_of(registry, "toy_out")
    for rows, name in ((8, "cuda"), (9, "triton")):
        out = torch.full((2,), torch.nan)
        run(torch.zeros(rows, 1), [], out)
        assert out.tolist() == [NAMES.index(name)] * 2


@needs_extension
def test_a_choice_ends(registry):
    with pytest.raises(RuntimeError, match="no backend takes this call of qatkernels_choices::"):
        choice(registry.ops["toy"], "toy", [Stage("cuda", None, True)], registry=registry)(torch.zeros(9, 1), [])
    absent = Op("absent", "Tensor x", Contract("x: float\n-> out: like(x) []", {"x": "Tensor"}), None)
    with pytest.raises(RuntimeError, match="qatkernels_cpp::absent"):
        choice(absent, "absent", [Stage("cuda")])


@pytest.mark.parametrize("present", [("cuda", "triton"), ("cuda",), ("triton",), ()], ids="+".join)
def test_decoding_goes_to_the_cuda_kernel(present, monkeypatch):
    """Up to eight tokens; what it does not take of those, and all else, to Triton, or to the reference."""
    monkeypatch.delenv("QATKERNELS_BACKEND", raising=False)
    here = replace(
        backends.REGISTRY, missing={}, implementations={"lowbit_linear": dict.fromkeys((*present, "reference"))},
        conditions={"lowbit_linear": {"cuda": few}},
    )  # fmt: skip
    first = [Stage("cuda", 8, True)] if "cuda" in present else []
    rest = [Stage("triton")] if "triton" in present else [Stage("cuda", None, True)] * len(first) + [Stage("reference")]
    assert here.order("lowbit_linear", "CUDA") == first + rest


def test_choices_say_what_they_rest_on():
    """A choice is measured, and names its results, or says that it is estimated."""
    root = Path(backends.__file__).parent
    for entry in json.loads((root / "choices.json").read_text()):
        assert entry["op"] in OPS
        if entry["measured"] is None:
            assert entry["why"].startswith("Estimated")
        else:
            assert (root.parents[1] / "bench/results" / entry["measured"]).is_file(), entry


def test_a_backend_is_declared_once_and_for_known_devices(registry):
    with pytest.raises(ValueError, match="'triton' is declared twice"):
        registry.add(Backend("triton", ("CUDA",), lambda registry: None))
    with pytest.raises(ValueError, match=r"devices of backend 'toy' are \('TPU',\), must be of \('CPU', 'CUDA'\)"):
        registry.add(Backend("toy", ("TPU",), lambda registry: None))


def test_a_backend_that_is_not_here_says_why(registry):
    def absent(registry):
        raise ImportError("no such library")

    registry.add(Backend("toy", ("CPU",), absent, priority=9))
    registry.load()
    assert registry.missing == {"toy": "no such library"}
    assert registry.chosen("toy", "CPU") == "reference"


def test_a_backend_that_stops_half_way_serves_nothing(registry):
    def half(registry):
        registry.enter("half", "toy", answer("cuda"))
        raise ImportError("half way")

    registry.add(Backend("half", ("CPU",), half, priority=9))
    registry.load()
    assert registry.missing["half"] == "half way"
    assert registry.chosen("toy", "CPU") == "reference"


def test_on_a_cpu_no_call_is_looked_at():
    """There the cost of a choice would be paid by every call."""
    for op in OPS:
        assert all(stage.takes_all for stage in order(op, "CPU")), op


_SCRIPT = """
import os
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
backends.RULES["lowbit_linear", "CPU"] = (backends.Rule("cpp", rows=8), backends.Rule("reference"))
del os.environ["QATKERNELS_BACKEND"]
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
files = ("registry.py", "dispatch.py", "ops/_op.py", "contract.py")
inside = [code for code in entered[before:] if code.co_filename.endswith(files)]
assert {code.co_name for code in inside} <= {"call", "differentiable"}, inside
print(taken)
"""


@pytest.mark.skipif("cpp" not in backends.IMPLS["lowbit_linear"], reason="needs the compiled kernels")
def test_the_dispatcher_chooses_at_every_call():
    """A C++ kernel for few tokens and a backend in Python behind it; the first is reached without Python."""
    environment = {**os.environ, "QATKERNELS_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[9, 10, 9]"
