"""Tests that need a GPU: real sizes, streams, graphs, compiled steps. Each available backend is tested on its own."""

import os

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS, MISSING
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, assert_within, check_sample, run_out, scale_gradients
from qatkernels.testing.samples import make, weights
from tests.implementations import GPU, GPU_BACKENDS

pytestmark = pytest.mark.gpu

FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "quantize")


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    if request.param not in IMPLS["fake_quantize"]:
        pytest.skip(f"no {request.param} backend: {MISSING.get(request.param)}")
    return request.param


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["tensor", "row", 32, 128])
def test_real_sizes(op, backend, dtype, granularity):
    for shape in ((4096, 4096), (1000, 11008)):
        if isinstance(granularity, str) or shape[1] % granularity == 0:
            sample = make(qk.grids.affine(4), shape, dtype, granularity, GPU, noise=op != "quantize")
            check_sample(op, IMPLS[f"{op}_out"][backend], sample)


def test_backends_agree_with_the_reference_on_the_cpu(backend):
    """Noise and codes have the same bits on the CPU and on the GPU."""
    for grid in (qk.grids.binary(), qk.grids.seq(2), qk.grids.lsq(4)):
        there = make(grid, (256, 513), torch.float32, "row", GPU, noise=True)
        here = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in there.args("fake_quantize"))
        (y,) = run_out("fake_quantize", IMPLS["fake_quantize_out"][backend], there.args("fake_quantize"))
        assert_same_bits(y.cpu(), OPS["fake_quantize"].reference(*here))
    seed = torch.tensor(-5, device=GPU)
    (z,) = run_out("normal", IMPLS["normal_out"][backend], (seed, 1_000_003, 0))
    assert_same_bits(z.cpu(), OPS["normal"].reference(seed.cpu(), 1_000_003, 0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2048, 4096), (33, 4097), (5, 60000), (10000, 48)])
def test_dynamic(backend, dtype, shape):
    x = weights(shape, dtype, GPU)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0.0
    (y,) = run_out("fake_quantize_dynamic", IMPLS["fake_quantize_dynamic_out"][backend], (x, 8))
    assert_same_bits(y, OPS["fake_quantize_dynamic"].reference(x, 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(backend, dtype):
    for granularity in ("tensor", "row", 64):
        sample = make(qk.grids.affine(8), (512, 1024), dtype, granularity, GPU)
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        args = (codes, sample.scale, sample.zero_point, list(sample.grid.constants), dtype)
        (w,) = run_out("dequantize", IMPLS["dequantize_out"][backend], args)
        assert_same_bits(w, OPS["dequantize"].reference(*args))


def test_the_scale_gradient_repeats(backend):
    for granularity in ("tensor", "row", 32):
        args = make(qk.grids.affine(4), (2048, 8192), torch.bfloat16, granularity, GPU).args("fake_quantize_backward")
        first, *others = (IMPLS["fake_quantize_backward"][backend](*args) for _ in range(5))
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert_same_bits(a, b)


@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="every free waits for the device")
@pytest.mark.parametrize("op", FAMILY)
def test_runs_on_the_current_stream(op, backend):
    """Inputs that a side stream is still waiting to write are read after they are written."""
    sample = make(qk.grids.lsq(4), (1024, 1024), torch.float32, "tensor", GPU)
    args = sample.args(op)
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args]
    IMPLS[op][backend](*late)  # compiled before, so that the side stream is not waited for
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for destination, source in zip(late, args, strict=True):
            if isinstance(source, torch.Tensor):
                destination.copy_(source)
        actual = as_tuple(IMPLS[op][backend](*late))
    assert not side.query(), "the side stream was waited for"
    side.synchronize()
    assert_same_bits(actual[0], as_tuple(OPS[op].reference(*args))[0])


@pytest.mark.parametrize("op", FAMILY[:3])
def test_graph_replays_with_another_seed(op, backend):
    sample = make(qk.grids.seq(2), (512, 2048), torch.bfloat16, "tensor", GPU, noise=True)
    args = sample.args(op)
    IMPLS[op][backend](*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = as_tuple(IMPLS[op][backend](*args))
    for seed in (1, 2**40, -3):
        sample.seed.fill_(seed)
        for out in outputs:
            out.fill_(torch.nan)
        graph.replay()
        assert_same_bits(outputs[0], as_tuple(OPS[op].reference(*args))[0], f"seed {seed}")
        if op == "fake_quantize_backward":
            ds, bound, _, _ = scale_gradients(sample)
            assert_within(outputs[1], ds, bound, f"seed {seed}")


def test_no_call_waits_for_the_device(backend):
    calls = {op: make(qk.grids.lsq(4), (64, 256), torch.float32, "tensor", GPU).args(op) for op in FAMILY}
    calls["fake_quantize_dynamic"] = (weights((64, 256), torch.float32, GPU), 8)
    calls["normal"] = (torch.tensor(1, device=GPU), 1000, 0)
    for op, args in calls.items():
        IMPLS[op][backend](*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op, args in calls.items():
            IMPLS[op][backend](*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_step_with_cuda_graphs():
    """torch.compile(mode="reduce-overhead") gives the eager forward and gradients, call after call."""
    grid = qk.grids.lsq(4)
    w = weights((256, 512), torch.float32, GPU).requires_grad_()
    scale = grid.init_scale(w).requires_grad_()
    seed = torch.tensor(0, device=GPU)

    def step(x, seed):
        y = qk.fake_quantize(w, scale, grid, noise_std=0.002, scale_noise_std=0.0002, seed=seed)
        return torch.nn.functional.linear(qk.fake_quantize_dynamic(x, 8), y).square().mean()

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for i in range(5):
        x = weights((32, 512), torch.float32, GPU, seed=i)
        seed.fill_(i)
        results = []
        for function in (step, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(x, seed)
            results.append([loss.detach().clone(), *(g.clone() for g in torch.autograd.grad(loss, (w, scale)))])
        for eager, graphed in zip(*results, strict=True):
            torch.testing.assert_close(graphed, eager, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend):
    """The last rows of a weight that 32-bit offsets cannot reach."""
    rows, cols = 2**18 + 3, 2**13
    w = torch.zeros(rows, cols, dtype=torch.bfloat16, device=GPU)
    tail = weights((5, cols), torch.bfloat16, GPU)
    w[-5:] = tail
    scale = torch.full((rows,), 0.01, device=GPU)
    point = (None, None, list(qk.grids.lsq(4).constants), 0.0, 0.0, 1.0)
    y = IMPLS["fake_quantize"][backend](w, scale, *point, None)
    assert_same_bits(y[-5:], OPS["fake_quantize"].reference(tail, scale[-5:], *point, None))
    del y
    dw, ds, _ = IMPLS["fake_quantize_backward"][backend](w, w, scale, *point)
    wanted_dw, wanted_ds, _ = OPS["fake_quantize_backward"].reference(tail, tail, scale[-5:], *point)
    assert_same_bits(dw[-5:], wanted_dw)
    torch.testing.assert_close(ds[-5:], wanted_ds)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors(backend):
    sample = make(qk.grids.lsq(4), (64, 256), torch.float32, "row", "cuda:1")
    with torch.cuda.device(0):
        check_sample("fake_quantize", IMPLS["fake_quantize_out"][backend], sample)


def test_tensors_on_two_devices_are_refused(backend):
    sample = make(qk.grids.lsq(4), (4, 64), torch.float32, "row", GPU)
    args = list(sample.args("fake_quantize"))
    args[1] = args[1].cpu()
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        IMPLS["fake_quantize"][backend](*args)
