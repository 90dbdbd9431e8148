"""The CUDA kernels compiled for every architecture: no warning, no spill, and 128-bit memory accesses where meant."""

import hashlib
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FLAGS = ("-std=c++17", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills")
#: Two blocks of 256 threads, or one of 512, share the 65536 registers of a multiprocessor.
MOST_REGISTERS = 128

#: Kernels of aligned float32 and bfloat16 weights without noise and zero point, and the operands that each reads.
VECTOR_KERNELS = [
    (f"{kernel}_kernelINS_12ElementTypesI{types}EELb0ELb0ELi{v}ELb{long}E", operands)
    for kernel, operands in (("20fake_quantize", 1), ("29fake_quantize_backward", 2))
    for types, v in (("fff", 4), ("f13__nv_bfloat16S3_", 8))
    for long in (0, 1)
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


def compile_once(source, arch):
    """Return ptxas's report and the binary, kept under build/ for each state of the sources."""
    digest = hashlib.sha256(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    headers = [*(ROOT / "csrc/cuda").glob("*.h"), *(ROOT / "csrc/common").glob("*.h")]
    for text in (*FLAGS, *(path.read_text() for path in (source, *sorted(headers)))):
        digest.update(text.encode())
    target = ROOT / "build" / f"cubin-{digest.hexdigest()[:16]}" / f"{source.stem}.{arch}.cubin"
    report = target.with_suffix(".txt")
    if not report.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        report.write_text(result.stderr)
    return report.read_text(), target


def cuobjdump():
    found = shutil.which("cuobjdump")
    if found is None and (spec := find_spec("triton")) is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def disassemble(source, arch):
    """Return the machine code of each kernel."""
    _, target = compile_once(source, arch)
    sass = subprocess.run([cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL))


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_no_kernel_spills(source, arch, record_property):
    report, _ = compile_once(source, arch)
    entries = re.findall(r"Compiling entry function '(\w+)'", report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", report)]
    assert len(entries) == len(registers) > 0
    assert len(frames) >= len(entries)
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MOST_REGISTERS
    record_property("registers", f"{min(registers)} to {max(registers)} in {len(registers)} kernels")


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_aligned_kernels_move_16_bytes_at_a_time(arch):
    bodies = disassemble(ROOT / "csrc/cuda/fake_quantize.cu", arch)
    for part, operands in VECTOR_KERNELS:
        (body,) = (text for name, text in bodies.items() if part in name)
        loads = re.findall(r"\bLDG\.E(?:\.\w+)*\b", body)
        stores = re.findall(r"\bSTG\.E(?:\.\w+)*\b", body)
        wide_loads, wide_stores = ([a for a in accesses if a.endswith(".128")] for accesses in (loads, stores))
        # Four vectors are in flight, of one operand or two; what else is loaded are scales.
        assert len(wide_loads) >= 4, part
        assert len(loads) - len(wide_loads) <= 4, part
        # What else is stored are sums.
        assert len(wide_stores) >= 4 // operands, part
        assert len(stores) - len(wide_stores) <= (0 if operands == 1 else 4), part
        assert not re.search(r"\b(LDL|STL)\b", body), f"{part} uses local memory"


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_decode_kernel_uses_what_it_is_built_on(arch):
    """Codes come 16 bytes at a time past the L1 cache, x from shared memory likewise, and tensor cores multiply."""
    bodies = disassemble(ROOT / "csrc/cuda/lowbit_gemv.cu", arch)
    kernels = {
        (int(bits), int(tiles)): body
        for name, body in bodies.items()
        for bits, tiles in re.findall(r"lowbit_gemv_kernelILi(\d)ELi(\d)E", name)
    }
    assert sorted({bits for bits, _ in kernels}) == list(range(1, 9))
    # Up to three tiles of activation rows, two where codes cross bytes (from 5 bits on).
    assert len(kernels) == 21
    for (bits, tiles), body in kernels.items():
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.(LTC128B\.)?128\b", body), (bits, tiles)
        # Of a stage, whose columns are those of 64 bytes, or 128 where codes cross bytes; one for each 32 of them.
        products = (512 // bits if 8 % bits == 0 else 128) // 32
        # Twice: products with codes, and sums of x for grids that need them.
        assert len(re.findall(r"\bIMMA\.16832\.S8\.S8\b", body)) == 2 * products * tiles, (bits, tiles)
        assert len(re.findall(r"\bLDS\.128\b", body)) >= products // 2 * tiles, (bits, tiles)
        assert not re.search(r"\b(LDL|STL)\b", body), (bits, tiles)


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_decode_kernel_for_sixteen_bits_uses_what_it_is_built_on(arch):
    """As above, and two instructions besides shifts make two codes an operand."""
    bodies = disassemble(ROOT / "csrc/cuda/lowbit_gemv16.cu", arch)
    found = {
        (int(bits), "bfloat16" in x, sums == "1"): body
        for name, body in bodies.items()
        for bits, x, sums in re.findall(r"lowbit_gemv16_kernelILi(\d)E(\w+?)Lb(\d)E", name)
    }
    assert len(found) == 12
    for (bits, brain, sums), body in found.items():
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.(LTC128B\.)?128\b", body), (bits, brain, sums)
        products = 512 // bits // 16
        kind = r"\bHMMA\.16816\.F32\.BF16\b" if brain else r"\bHMMA\.16816\.F32(?!\.BF16)"
        assert len(re.findall(kind, body)) == (2 if sums else 1) * products, (bits, brain, sums)
        assert len(re.findall(r"\bLDS\.128\b", body)) >= products // 2, (bits, brain, sums)
        assert len(re.findall(r"\bHFMA2", body)) == 4 * products, (bits, brain, sums)
        # The table 0xea is (a & b) | c.
        assert len(re.findall(r"\bLOP3\.LUT\b[^;]*, 0xea,", body)) == 4 * products, (bits, brain, sums)
        assert not re.search(r"\b(LDL|STL)\b", body), (bits, brain, sums)
