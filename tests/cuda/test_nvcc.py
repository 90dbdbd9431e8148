"""The CUDA kernels compiled for every architecture: no warning, no spill, and 128-bit memory accesses where meant."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100")
FLAGS = ["-std=c++17", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return ptxas's report and the binary of each source for each architecture, compiled side by side."""
    folder = tmp_path_factory.mktemp("cubin")

    def build(job):
        source, arch = job
        target = folder / f"{source.stem}.{arch}.cubin"
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", source, "-o", target]
        return job, subprocess.run(command, capture_output=True, text=True), target

    # The longest first, so that none of them is left for the end.
    jobs = sorted(((k, a) for a in ARCHS for k in KERNELS), key=lambda job: -job[0].stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {job: (result, target) for job, result, target in pool.map(build, jobs)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_compiles_without_spills(compiled, source, arch, record_property):
    result, _ = compiled[source, arch]
    assert result.returncode == 0, result.stderr[-4000:]
    entries = re.findall(r"Compiling entry function '(\w+)'", result.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(entries) == len(registers) > 0
    assert len(frames) >= len(entries)
    assert set(frames) == {("0", "0", "0")}
    # Two blocks of 256 threads at least share a multiprocessor's 65536 registers.
    assert max(registers) <= 128
    record_property("registers", f"{min(registers)} to {max(registers)} in {len(registers)} kernels")


def _cuobjdump():
    found = shutil.which("cuobjdump")
    if found is None and (spec := find_spec("triton")) is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


#: Kernels of aligned weights without noise and zero point: float32, and bfloat16, walking rows in either way.
VECTOR_KERNELS = [
    (f"{kernel}_kernelINS0_5TypesI{types}EELb0ELb0ELi{v}ELb{long}E", loads)
    for kernel, loads in (("20fake_quantize", 1), ("29fake_quantize_backward", 2))
    for types, v in (("fff", 4), ("f13__nv_bfloat16S3_", 8))
    for long in (0, 1)
]


@pytest.mark.skipif(_cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ARCHS[:2])
def test_aligned_kernels_move_16_bytes_at_a_time(compiled, arch):
    source = ROOT / "csrc/cuda/fake_quantize.cu"
    _, target = compiled[source, arch]
    sass = subprocess.run([_cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL))
    for part, loads in VECTOR_KERNELS:
        (body,) = (text for name, text in bodies.items() if part in name)
        assert len(re.findall(r"\bLDG\.E(\.\w+)*\.128\b", body)) >= 2 * loads, part
        stores = re.findall(r"\bSTG\.E(?:\.\w+)*\b", body)
        wide = [s for s in stores if s.endswith(".128")]
        assert len(wide) >= 2, part
        # What else is stored are the sums, one by one.
        assert len(stores) - len(wide) <= (0 if loads == 1 else 8), part
        assert not re.search(r"\b(LDL|STL)\b", body), part
