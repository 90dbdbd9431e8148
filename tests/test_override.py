"""Choosing an implementation at import."""

import os
import subprocess
import sys

import pytest
import torch

from qatkernels.backends import Registry, extension, fits
from qatkernels.backends.compiled import BACKENDS

SCRIPT = """
import torch, qatkernels as qk
from qatkernels import backends
grid = qk.grids.lsq(4)
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


@pytest.mark.parametrize(
    ("built", "running", "cuda", "fit"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", False, True),
        ("2.13.0+cpu", "2.13.0", False, True),
        ("2.13.0", "2.13.0+cpu", False, True),
        ("2.13.0+cpu", "2.13.0+cu130", False, True),
        ("2.13.0.post1+cpu", "2.13.0.post1", False, True),
        ("2.13.0+cu130", "2.13.0+cu130", True, True),
        ("2.13.0+cu130", "2.13.0+cpu", True, False),
        ("2.13.0+cu130", "2.13.0+cu126", True, False),
        ("2.13.0+cpu", "2.13.1+cpu", False, False),
        ("2.13.0+cpu", "2.13.0.post1+cpu", False, False),
        ("2.1.0+cpu", "2.10.0+cpu", False, False),
        ("2.14.0a0+git1234567", "2.14.0a0+git1234567", False, True),
        ("2.14.0a0+git1234567", "2.14.0a0+git89abcde", False, False),
        ("2.14.0.dev20251101+cpu", "2.14.0.dev20251101", False, False),
    ],
)
def test_which_torch_an_extension_fits(built, running, cuda, fit):
    assert fits(built, running, cuda) == fit


def test_another_build_of_the_same_torch_keeps_the_kernels(monkeypatch):
    if extension() is None:
        pytest.skip("the extension is not built")
    release = torch.__version__.partition("+")[0]
    cuda = bool(extension().build_info()["cuda_archs"])
    monkeypatch.setattr(torch, "__version__", f"{release}+other")
    assert (extension() is None) == cuda
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    assert extension() is None
    found = Registry(ops={})
    for backend in BACKENDS:
        found.add(backend)
    found.load()
    assert "built for torch" in found.missing["cpp"]
    assert "was not built" in found.missing["cuda"]
