"""Every op on every backend present, against its reference, on every sample."""

import os
import subprocess
import sys

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS, extension
from qatkernels.ops import noise
from qatkernels.ops._op import OPS
from qatkernels.ops.fake_quantize import FLOATS
from qatkernels.ops.samples import GRIDS, basis_calls, logits_calls, make, perturbations, weights
from tests.compare import assert_same_bits, check_first_output, check_sample, run_out, special_calls
from tests.implementations import implementations, moved, samples_on

FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize")
SAMPLES = samples_on(torch.device("cpu"))


def test_the_extension_is_built():
    assert "cpp" in IMPLS["fake_quantize"], "run `make setup`: without the extension these tests test little"


@pytest.mark.backends
@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=[s.name for s in SAMPLES])
def test_family(op, index):
    for _, impl, device in implementations(op):
        check_sample(op, impl, samples_on(device)[index])


@pytest.mark.parametrize("op", FAMILY)
def test_float64(op):
    for grid in GRIDS:
        for granularity in ("row", "tensor", 8):
            check_sample(op, IMPLS[f"{op}_out"]["cpp"], make(grid, (3, 40), torch.float64, granularity, noise=True))


@pytest.mark.backends
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_special_values(grid, dtype):
    for op, args in special_calls(grid, dtype).items():
        for _, impl, device in implementations(op):
            check_first_output(op, impl, moved(args, device))


@pytest.mark.backends
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(grid, dtype):
    for granularity in ("row", 16, "tensor"):
        sample = make(grid, (6, 48), dtype, granularity)
        codes = qk.quantize(sample.w, sample.scale, grid, group_size=sample.group_size, zero_point=sample.zero_point)
        args = (codes, sample.scale, sample.zero_point, list(grid.constants), dtype)
        expected = OPS["dequantize"].reference(*args)
        assert_same_bits(expected, OPS["fake_quantize"].reference(*sample.args("fake_quantize")))
        for backend, impl, device in implementations("dequantize"):
            assert_same_bits(run_out("dequantize", impl, moved(args, device))[0].cpu(), expected, backend)


@pytest.mark.backends
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 64), (5, 1), (4, 5000), (3, 0), (0, 3)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dynamic(dtype, shape, bits):
    x = weights(shape, dtype)
    if x.numel() > 20:
        x.view(-1, shape[-1])[0, 0] = torch.nan
        x.view(-1, shape[-1])[1] = torch.inf
        x.view(-1, shape[-1])[2] = 0.0
    expected = OPS["fake_quantize_dynamic"].reference(x, bits)
    for backend, impl, device in implementations("fake_quantize_dynamic"):
        actual = run_out("fake_quantize_dynamic", impl, (x.to(device), bits))
        assert_same_bits(actual[0].cpu(), expected, backend)


@pytest.mark.backends
@pytest.mark.parametrize("numel", [0, 1, 3, 64, 1000, 5001])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789123])
@pytest.mark.parametrize("stream", [noise.WEIGHT_STREAM, noise.SCALE_STREAM])
def test_normals(numel, seed, stream):
    seed = torch.tensor(seed)
    expected = OPS["normal"].reference(seed, numel, stream)
    for backend, impl, device in implementations("normal"):
        actual = run_out("normal", impl, (seed.to(device), numel, stream))
        assert_same_bits(actual[0].cpu(), expected, backend)


@pytest.mark.backends
@pytest.mark.parametrize("op", FAMILY)
def test_views(op):
    """Transposed weights, strided scales and gradients with stride 0 give what their contiguous copies give."""
    sample = make(qk.lsq(4), (48, 32), torch.float32, "row", noise=op != "quantize")
    args = list(sample.args(op))
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.ndim == 2:
            args[i] = a.t().contiguous().t()
        elif isinstance(a, torch.Tensor) and a.ndim == 1:
            args[i] = torch.stack([a, a], -1)[:, 0]
    if op == "fake_quantize_backward":
        args[0] = torch.ones(()).expand(48, 32)
    copies = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    for backend, into, device in implementations(op):
        strided, contiguous = moved(args, device), moved(copies, device)
        for impl in (IMPLS[op][backend], into):
            if impl is into:
                actual, expected = run_out(op, impl, strided), run_out(op, impl, contiguous)
            else:
                actual, expected = impl(*strided), impl(*contiguous)
                actual, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected))
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e, f"{backend} {op}")


@pytest.mark.parametrize("op", FAMILY)
def test_threads_and_launch_shape_change_no_bit(op):
    sample = make(qk.affine(4), (37, 5000), torch.float32, "row", noise=op != "quantize")
    whole = make(qk.seq(2), (300, 1000), torch.float32, "tensor", noise=op != "quantize")
    threads = torch.get_num_threads()
    for s in (sample, whole):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_out(op, IMPLS[f"{op}_out"]["cpp"], s.args(op)))
        torch.set_num_threads(threads)
        for other in results[1:]:
            for a, e in zip(other, results[0], strict=True):
                assert_same_bits(a, e, s.name)


_ISA_SCRIPT = """
import hashlib, sys, torch
import qatkernels._C as extension
from qatkernels.backends import IMPLS
from qatkernels.ops._op import as_tuple
digest = hashlib.sha256()
for op, args in torch.load(sys.argv[1]):
    outputs = as_tuple(IMPLS[op]["cpp"](*args))
    for t in (*outputs, *(a for a in args if isinstance(a, torch.Tensor))):
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
print(extension.build_info()["isa"], digest.hexdigest())
"""


#: What this machine runs of the ISAs that were compiled.
ISAS = [isa for isa in extension().build_info()["isas"].split() if extension().has_isa(isa)] if extension() else []


def _on(isa):
    return {**os.environ, "QATKERNELS_ISA": isa}


def test_every_isa_gives_the_same_bits(tmp_path):
    """Scale gradients included: the order of additions is the same on all of them."""
    # The inputs travel by file, because torch's own random numbers and sums depend on the ISA.
    calls = [(op, sample.args(op)) for sample in SAMPLES for op in FAMILY]
    calls += [("fake_quantize_dynamic", (weights((5, 77), dtype), 8)) for dtype in FLOATS]
    calls += [("normal", (torch.tensor(3), 10001, 0))]
    calls += [(op, args) for dtype in FLOATS for _, op, args in logits_calls(dtype)]
    calls += [(op, args) for _, op, args in basis_calls()]
    calls += [("reset_", sample.args("reset_")) for sample in SAMPLES]
    for op in ("perturb_", "perturb_swap_", "perturbation_norms"):
        calls += [(op, args) for args in perturbations(op)]
    torch.save(calls, tmp_path / "calls.pt")
    results = {}
    for isa in ISAS:
        command = [sys.executable, "-c", _ISA_SCRIPT, str(tmp_path / "calls.pt")]
        out = subprocess.run(command, env=_on(isa), capture_output=True, text=True, check=True).stdout.split()
        results[out[0]] = out[1]
    assert list(results) == ISAS
    assert len(set(results.values())) == 1, results


def test_half_conversions_of_the_baseline():
    """Every float16 bit pattern survives, and rounding matches torch's, also without hardware conversion."""
    script = """
import torch
from qatkernels.backends import IMPLS, extension
from qatkernels import lsq
bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
h = bits.view(torch.float16).view(64, 1024)
h = torch.where(h.isfinite(), h, torch.zeros_like(h))
one = torch.ones(64, 1)
# A jvp with one tangent in w passes it through a load and a store.
g = lsq(8)
w = torch.zeros(64, 1024, dtype=torch.float16)
out = IMPLS["fake_quantize_jvp"]["cpp"](h, None, None, w, one, None, None, list(g.constants), 0.0, 0.0, 1.0, None)
assert torch.equal(out, h)
x = torch.randn(64, 1024) * torch.logspace(-9, 5, 64).view(-1, 1)
w = torch.zeros(64, 1024)
point = (w, one, None, None, list(g.constants), 0.0, 0.0, 1.0)
out = IMPLS["fake_quantize_jvp"]["cpp"](x, None, None, *point, torch.float16)
assert torch.equal(out, x.half())
"""
    for isa in ISAS:
        subprocess.run([sys.executable, "-c", script], env=_on(isa), check=True)


@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_torchs_limit_holds(capability, isa):
    environment = {k: v for k, v in os.environ.items() if k != "QATKERNELS_ISA"} | {"ATEN_CPU_CAPABILITY": capability}
    script = "import qatkernels._C as extension; print(extension.build_info()['isa'])"
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == (isa if isa in ISAS else ISAS[-1])


def test_an_isa_that_is_not_there_is_an_error():
    script = "import torch, qatkernels._C as extension; extension.build_info()"
    out = subprocess.run([sys.executable, "-c", script], env=_on("mmx"), capture_output=True, text=True)
    assert "QATKERNELS_ISA is 'mmx', must be one of" in out.stderr
