"""Every op on every backend present, against its reference, on every sample."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS, extension
from qatkernels.ops import noise
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import (
    assert_same_bits,
    check_first_output,
    check_sample,
    run_in_place,
    run_out,
    special_calls,
)
from qatkernels.testing.samples import GRIDS, SEVENTH, basis_calls, logits_calls, make, perturbations, weights
from tests.implementations import implementations, moved, samples_on
from tests.isas import ISAS, using

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
@pytest.mark.parametrize("grid", [*GRIDS, SEVENTH], ids=lambda g: f"{g.scheme}{g.bits}")
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


@pytest.mark.parametrize("op", FAMILY)
def test_threads_and_launch_shape_change_no_bit(op):
    sample = make(qk.grids.affine(4), (37, 5000), torch.float32, "row", noise=op != "quantize")
    whole = make(qk.grids.seq(2), (300, 1000), torch.float32, "tensor", noise=op != "quantize")
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


def calls_for_every_isa():
    """Every elementwise op on the samples, special values and each way that a row can end."""
    calls = [(op, sample.args(op)) for sample in SAMPLES for op in FAMILY]
    wide = [
        make(grid, (3, 40), torch.float64, granularity, noise=True)
        for grid in (*GRIDS, SEVENTH)
        for granularity in ("row", 8)
    ]
    calls += [(op, sample.args(op)) for sample in wide for op in FAMILY]
    calls += [call for grid in (*GRIDS, SEVENTH) for dtype in FLOATS for call in special_calls(grid, dtype).items()]
    for sample in SAMPLES:
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        calls += [("dequantize", (codes, sample.scale, sample.zero_point, list(sample.grid.constants), torch.float32))]
    for bits, cols in product(range(1, 9), (1, 7, 64, 129, 1000)):
        codes = torch.randint(1 << bits, (3, cols), generator=torch.Generator().manual_seed(cols)).to(torch.uint8)
        calls += [("pack", (codes, 0, bits)), ("unpack", (OPS["pack"].reference(codes, 0, bits), 0, bits, cols))]
    calls += [("fake_quantize_dynamic", (weights((5, 77), dtype), bits)) for dtype in FLOATS for bits in (2, 8)]
    calls += [("normal", (torch.tensor(3), numel, 0)) for numel in (1, 10001)]
    calls += [(op, args) for dtype in FLOATS for _, op, args in logits_calls(dtype)]
    calls += [(op, args) for _, op, args in basis_calls()]
    calls += [(op, sample.args(op)) for sample in SAMPLES for op in ("reset_", "quantization_error")]
    for op in ("perturb_", "perturb_swap_", "perturbation_norms"):
        calls += [(op, args) for args in perturbations(op)]
    return calls


def run_cpp(op, args):
    """Every tensor that the C++ kernel of an op writes."""
    if OPS[op].outputs:
        return run_out(op, IMPLS[f"{op}_out"]["cpp"], args)
    return run_in_place(IMPLS[op]["cpp"], args)


def test_every_isa_gives_the_same_bits():
    """Scale gradients included: the order of additions is the same on all of them."""
    for op, args in calls_for_every_isa():
        results = []
        for isa in ISAS:
            with using(isa):
                results.append(run_cpp(op, args))
        for isa, outputs in zip(ISAS[1:], results[1:], strict=True):
            for first, other in zip(results[0], outputs, strict=True):
                assert_same_bits(other, first, f"{op} on {isa}, held against {ISAS[0]}")


def test_half_conversions(isa):
    """Every float16 bit pattern survives, and rounding matches torch's, also without hardware conversion."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    h = bits.view(torch.float16).view(64, 1024)
    h = torch.where(h.isfinite(), h, torch.zeros_like(h))
    grid = (list(qk.grids.lsq(8).constants), 0.0, 0.0, 1.0)
    one, jvp = torch.ones(64, 1), IMPLS["fake_quantize_jvp"]["cpp"]
    # A jvp with one tangent in w passes it through a load and a store.
    assert_same_bits(jvp(h, None, None, torch.zeros_like(h), one, None, None, *grid, None), h, isa)
    x = weights((64, 1024), torch.float32) * 50 * torch.logspace(-9, 5, 64).view(-1, 1)
    y = jvp(x, None, None, torch.zeros_like(x), one, None, None, *grid, torch.float16)
    assert_same_bits(y, x.half(), isa)


#: Loads the extension alone and asks for its ISA with each environment in a child of its own.
_ENVIRONMENTS = """
import importlib.util, json, os, sys, torch
path, *environments = sys.argv[1:]
for environment in map(json.loads, environments):
    if os.fork() == 0:
        os.environ.update(environment)
        spec = importlib.util.spec_from_file_location("qatkernels._C", path)
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
        try:
            print(extension.build_info()["isa"], flush=True)
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_environment_chooses_the_isa():
    """QATKERNELS_ISA names one, ATEN_CPU_CAPABILITY limits it as it limits torch."""
    expected = [({"ATEN_CPU_CAPABILITY": "default"}, "baseline"), ({}, ISAS[-1])]
    for capability in ("avx2", "avx512"):
        expected += [({"ATEN_CPU_CAPABILITY": capability}, capability if capability in ISAS else ISAS[-1])]
    expected += [({"QATKERNELS_ISA": isa}, isa) for isa in ISAS]
    expected += [({"QATKERNELS_ISA": "baseline", "ATEN_CPU_CAPABILITY": "avx2"}, "baseline")]
    expected += [({"QATKERNELS_ISA": "mmx"}, f"QATKERNELS_ISA is 'mmx', must be one of {', '.join(ISAS[::-1])}, which")]
    environment = {k: v for k, v in os.environ.items() if k not in ("QATKERNELS_ISA", "ATEN_CPU_CAPABILITY")}
    command = [sys.executable, "-c", _ENVIRONMENTS, extension().__file__, *(json.dumps(e) for e, _ in expected)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    for (given, isa), line in zip(expected, found, strict=True):
        assert line.startswith(isa), given


def test_an_isa_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=f"isa is 'mmx', must be one of {ISAS[-1]}"):
        extension().use_isa("mmx")
    assert extension().build_info()["isa"] in ISAS


@pytest.mark.parametrize("op", FAMILY)
def test_the_reference_returns_no_views(op):
    """SQuAT changes a quantized weight in place, which autograd refuses of a view."""
    outputs = OPS[op].run_reference(*make(qk.grids.seq(2), (6, 8), torch.float32, "row").args(op))
    assert not any(t._is_view() for t in as_tuple(outputs))
