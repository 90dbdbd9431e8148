"""A backend of another distribution: found by its entry point, takes the calls that it says, and is reported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: As in CONTRIBUTING.md.
_BACKEND = """
from qatkernels.backends import Backend, Registry

calls = []

def dynamic(x, bits, out):  # the arguments of the op, then its outputs
    calls.append(tuple(x.shape))
    assert x.is_contiguous()
    step = x.float().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    out.copy_((x / step).round() * step)

def load(registry: Registry) -> None:
    registry.enter_kernel("toy", "fake_quantize_dynamic", dynamic, serves=lambda x, bits: bits == 8)

BACKENDS = (Backend("toy", devices=("CPU",), load=load, priority=30),)
"""
#: With something to compile before products with packed weights, of which it takes none.
_COMPILING = """
from qatkernels.backends import Backend, Registry

compiled = []

def load(registry: Registry) -> None:
    registry.enter_kernel("toy", "lowbit_linear", print, serves=lambda *args: False)

def warm_up(weight, dtype, bias, act_bits):
    compiled.append((tuple(weight.shape), dtype, bias, act_bits))

BACKENDS = (Backend("toy", devices=("CPU",), load=load, priority=30, warm_up=warm_up),)
"""
_COMPILE = """
import os
import torch
import qatkernels as qk
import toy_backend

model = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 16, bias=False))
model = qk.pack_model(qk.quantize_model(model, qk.QuantConfig(bits=4, act_bits=8)))
if os.environ.get("QATKERNELS_BACKEND") == "reference":  # kernels that no call reaches are not compiled
    assert (qk.compile_kernels(model), toy_backend.compiled) == (0, [])
else:
    assert qk.compile_kernels(model, torch.float16) == 2
    (shape, dtype, bias, act_bits), second = toy_backend.compiled
    assert bias is model[0].bias
    assert (shape, dtype, act_bits) == ((8, 32), torch.float16, 8)
    assert second == ((16, 8), torch.float16, None, 8)
"""
_USE = """
import torch
import qatkernels as qk
import toy_backend
from qatkernels.backends import report

x = torch.tensor([[1.0, -3.0, 0.5], [2.0, 1.0, -0.25]])
torch.testing.assert_close(qk.fake_quantize_dynamic(x, 8), x, rtol=0, atol=3 / 127)
assert toy_backend.calls == [(2, 3)], toy_backend.calls
qk.fake_quantize_dynamic(x.t(), 8)  # strides are seen to before it is called
assert toy_backend.calls == [(2, 3), (3, 2)], toy_backend.calls
qk.fake_quantize_dynamic(x, 4)  # which it does not take
assert len(toy_backend.calls) == 2
out = torch.empty(2, 3)
torch.ops.qatkernels.fake_quantize_dynamic_out(x, 8, out)
assert torch.equal(out, qk.fake_quantize_dynamic(x, 8))
x.requires_grad_()
qk.fake_quantize_dynamic(x, 8).sum().backward()
assert torch.equal(x.grad, torch.ones(2, 3))
try:
    torch.ops.qatkernels.fake_quantize_dynamic(x, 9)
except RuntimeError as error:
    assert "bits is 9, must be 2 to 8" in str(error), error
else:
    raise AssertionError("the contract was not checked")
print(report()["fake_quantize_dynamic"]["CPU"])
"""


def installed(folder, backend):
    """Install a distribution with a backend into a folder; return the environment variables that find it."""
    (folder / "toy_backend.py").write_text(backend)
    about = folder / "toy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[qatkernels.backends]\ntoy = toy_backend:BACKENDS\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    environment.pop("QATKERNELS_BACKEND", None)
    return environment


def test_kernels_of_a_backend_are_compiled_ahead(tmp_path):
    environment = installed(tmp_path, _COMPILING)
    for forced in ({}, {"QATKERNELS_BACKEND": "reference"}):
        subprocess.run([sys.executable, "-c", _COMPILE], env=environment | forced, check=True)


def test_an_entry_point_is_all_that_it_takes(tmp_path):
    environment = installed(tmp_path, _BACKEND)
    for forced, first in ((None, "toy (some calls)"), ("toy", "toy (some calls)")):
        run = subprocess.run(
            [sys.executable, "-c", _USE], env=environment | ({} if forced is None else {"QATKERNELS_BACKEND": forced}),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"['{first}', "), run.stdout
    said = subprocess.run(
        [sys.executable, "-m", "qatkernels", "doctor"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "toy (some calls), then " in said


def test_a_broken_one_is_left_out_and_named(tmp_path):
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[qatkernels.backends]\nbroken = not_there:BACKENDS\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", "import qatkernels; print(qatkernels.backends.MISSING['broken'])"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "its entry point 'not_there:BACKENDS' raises ModuleNotFoundError" in run.stdout
    assert "backend 'broken' is left out" in run.stderr
