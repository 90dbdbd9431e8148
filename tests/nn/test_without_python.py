"""A packed model that AOTInductor compiled, in a C++ process without Python: our library of ops is built for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> Path:
    """Build the library and the example as is quickest: for the baseline of instructions, without optimization.

    The folder stays, beside those of setup.py, so that the next run compiles only what has changed.
    """
    if not all(map(shutil.which, ("cmake", "ninja", "c++"))):
        pytest.skip("needs cmake, ninja and a C++ compiler")
    build = ROOT / "build" / "standalone-test"
    options = {
        "QK_STANDALONE": "ON",
        "CMAKE_BUILD_TYPE": "Debug",
        "QK_ISAS": "baseline",
        "QK_TORCH_DIR": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *defines], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "run_package"], check=True)
    return build / "run_package"


CONFIGS = [qk.QuantConfig(2), qk.QuantConfig(4, group_size=32, act_bits=8)]


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_process_without_python(program: Path, tmp_path: Path, config: qk.QuantConfig, packed: bool) -> None:
    """The program gives the bits that Python gives with the same kernels, for any number of tokens."""
    compiled = pytest.importorskip("qatkernels._C")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    model = qk.quantize_model(model, config, exclude=())
    model = (qk.pack_model(model) if packed else model).eval()
    shapes = ({0: torch.export.Dim("tokens", min=1, max=64)},)
    exported = torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    before = compiled.use_isa("baseline")
    try:
        for tokens in (1, 33):
            x = torch.randn(tokens, 64)
            with torch.no_grad():
                wanted = run(x)
            arguments = [str(program), package, str(tokens), "64"]
            done = subprocess.run(arguments, input=x.numpy().tobytes(), capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(tokens, 32)
            assert_same_bits(found, wanted)
    finally:
        compiled.use_isa(before)


def test_it_has_no_python(program: Path) -> None:
    """Neither the program nor our library is linked with Python, or with torch's Python library."""
    for file in (program, *program.parent.glob("libqatkernels_ops.*")):
        text = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
        names = [line.split()[0] for line in text.splitlines()]  # the rest is where they lie, in a folder of Python
        assert "libtorch_cpu.so" in names
        assert not [name for name in names if "python" in name]
