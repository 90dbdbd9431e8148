"""Choosing an implementation at import."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch, qatkernels as qk
from qatkernels import backends
grid = qk.lsq(4)
print(backends.chosen("fake_quantize", "CPU"), qk.fake_quantize(torch.ones(2, 4), torch.ones(2), grid).sum().item())
"""


def run(backend):
    environment = {**os.environ, "QATKERNELS_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("backend", "serves"), [("reference", "reference"), ("cpp", "cpp"), ("", "cpp")])
def test_override(backend, serves):
    assert run(backend).stdout.split() == [serves, "8.0"]


def test_unknown():
    assert "QATKERNELS_BACKEND is 'cublas', must be one of" in run("cublas").stderr


def test_absent_is_an_error():
    from qatkernels.backends import IMPLS

    if "cuda" in IMPLS["fake_quantize"]:
        pytest.skip("this build has CUDA kernels")
    assert "'cuda', which is not available: the extension was built without CUDA" in run("cuda").stderr
