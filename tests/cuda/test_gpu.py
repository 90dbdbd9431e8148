"""What only a GPU can show: real sizes, streams, graphs, compiled steps. Every backend that is there, by itself."""

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import CONDITIONS, IMPLS, MISSING, by_call
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.fake_quantize import FLOATS
from qatkernels.ops.samples import make, samples, weights
from tests.compare import assert_same_bits, assert_within, check_sample, run_out, scale_gradients
from tests.cuda import lowbit

pytestmark = pytest.mark.gpu

FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "quantize")
GPU = torch.device("cuda")


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param not in IMPLS["fake_quantize"]:
        pytest.skip(f"no {request.param} backend: {MISSING.get(request.param)}")
    return request.param


@pytest.fixture
def linear(backend):
    if backend not in IMPLS["lowbit_linear"]:
        pytest.skip(f"lowbit_linear has no {backend} kernel")
    return IMPLS["lowbit_linear"][backend]


@pytest.mark.parametrize("op", FAMILY)
def test_samples(op, backend):
    for sample in samples(GPU):
        check_sample(op, IMPLS[f"{op}_out"][backend], sample)


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["tensor", "row", 32, 128])
def test_real_sizes(op, backend, dtype, granularity):
    for shape in ((4096, 4096), (1000, 11008)):
        if isinstance(granularity, str) or shape[1] % granularity == 0:
            sample = make(qk.affine(4), shape, dtype, granularity, GPU, noise=op != "quantize")
            check_sample(op, IMPLS[f"{op}_out"][backend], sample)


def test_backends_agree_with_the_reference_on_the_cpu(backend):
    """Noise and codes are the same bits on either side of the bus."""
    for grid in (qk.binary(), qk.seq(2), qk.lsq(4)):
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
        sample = make(qk.affine(8), (512, 1024), dtype, granularity, GPU)
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        args = (codes, sample.scale, sample.zero_point, list(sample.grid.constants), dtype)
        (w,) = run_out("dequantize", IMPLS["dequantize_out"][backend], args)
        assert_same_bits(w, OPS["dequantize"].reference(*args))


def test_the_scale_gradient_repeats(backend):
    for granularity in ("tensor", "row", 32):
        args = make(qk.affine(4), (2048, 8192), torch.bfloat16, granularity, GPU).args("fake_quantize_backward")
        first, *others = (IMPLS["fake_quantize_backward"][backend](*args) for _ in range(5))
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("op", FAMILY)
def test_runs_on_the_current_stream(op, backend):
    """Inputs that a side stream is still waiting to write are read after they are written."""
    sample = make(qk.lsq(4), (1024, 1024), torch.float32, "tensor", GPU)
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
    sample = make(qk.seq(2), (512, 2048), torch.bfloat16, "tensor", GPU, noise=True)
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
    calls = {op: make(qk.lsq(4), (64, 256), torch.float32, "tensor", GPU).args(op) for op in FAMILY}
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
    grid = qk.lsq(4)
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


@pytest.mark.parametrize("grid", lowbit.GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
@pytest.mark.parametrize("act_bits", [None, 8])
def test_decoding(grid, act_bits, linear):
    """At most eight tokens, at sizes of layers: every way that the decode kernel divides them, and odd ones."""
    for tokens, rows, cols, group_size, dtype in (
        (1, 4096, 4096, None, torch.bfloat16),
        (1, 1000, 11008, 128, torch.bfloat16),
        (2, 4096, 14336, 64, torch.float16),
        (8, 2048, 8192, None, torch.float32),
        (5, 512, 28672, 32, torch.bfloat16),
        (3, 77, 4099, None, torch.float16),
        (1, 130, 4000, 20, torch.float32),
    ):
        args = lowbit.make(grid, tokens, rows, cols, group_size, dtype, GPU, bias=dtype, act_bits=act_bits)
        y = linear(*args)
        assert_within(y, *lowbit.reference(args), f"{tokens}x{rows}x{cols}, groups of {group_size}")
        assert_same_bits(linear(*args), y)


def test_decoding_what_has_just_been_written(linear):
    """Calls behind one another: each sees the weights and tokens written right before it, and waits for nothing."""
    args = lowbit.make(qk.lsq(4), 1, 2048, 4096, 128, torch.bfloat16, GPU)
    x, packed = args[0], args[1]
    sources = [(torch.roll(x, i, -1), torch.roll(packed, i, 0)) for i in range(8)]
    expected = []
    for new_x, new_packed in sources:
        expected.append(linear(new_x, new_packed, *args[2:]))
        torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for _ in range(20):
            for new_x, new_packed in sources:
                x.copy_(new_x)
                packed.copy_(new_packed)
                results.append(linear(*args))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, y in enumerate(results):
        assert_same_bits(y, expected[i % len(sources)], f"call {i}")


def test_decoding_in_a_graph(linear):
    args = lowbit.make(qk.seq(2), 2, 1024, 8192, None, torch.bfloat16, GPU)
    linear(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(*args)
    for seed in range(3):
        args[0].copy_(weights(args[0].shape, torch.bfloat16, GPU, seed=seed))
        y.fill_(torch.nan)
        graph.replay()
        assert_same_bits(y, linear(*args), f"seed {seed}")


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_kernel_that_takes_few_tokens_passes_the_others_on(tokens, dtype):
    """The condition of the decode kernel, asked of tensors, and the reference behind it, as without Triton."""
    if "cuda" not in IMPLS["lowbit_linear"]:
        pytest.skip(f"no cuda backend: {MISSING.get('cuda')}")
    serves = CONDITIONS["lowbit_linear"]["cuda"]
    args = lowbit.make(qk.affine(4), tokens, 70, 256, 64, dtype, GPU)
    assert serves(*args) == (tokens <= 8 and dtype != torch.float64)
    op = OPS["lowbit_linear"]
    y = by_call(op, [(IMPLS["lowbit_linear"]["cuda"], serves), (op.reference, None)])(*args)
    assert_within(y, *lowbit.reference(args), f"{tokens} tokens of {dtype}")
    stack = (args[0], *(t[None] for t in args[1:4]), None, torch.tensor([tokens], dtype=torch.int32, device=GPU))
    assert not serves(*stack, *args[6:])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend):
    """The last rows of a weight that 32-bit offsets cannot reach."""
    rows, cols = 2**18 + 3, 2**13
    w = torch.zeros(rows, cols, dtype=torch.bfloat16, device=GPU)
    tail = weights((5, cols), torch.bfloat16, GPU)
    w[-5:] = tail
    scale = torch.full((rows,), 0.01, device=GPU)
    point = (None, None, list(qk.lsq(4).constants), 0.0, 0.0, 1.0)
    y = IMPLS["fake_quantize"][backend](w, scale, *point, None)
    assert_same_bits(y[-5:], OPS["fake_quantize"].reference(tail, scale[-5:], *point, None))
    del y
    dw, ds, _ = IMPLS["fake_quantize_backward"][backend](w, w, scale, *point)
    wanted_dw, wanted_ds, _ = OPS["fake_quantize_backward"].reference(tail, tail, scale[-5:], *point)
    assert_same_bits(dw[-5:], wanted_dw)
    torch.testing.assert_close(ds[-5:], wanted_ds)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors(backend):
    sample = make(qk.lsq(4), (64, 256), torch.float32, "row", "cuda:1")
    with torch.cuda.device(0):
        check_sample("fake_quantize", IMPLS["fake_quantize_out"][backend], sample)


def test_tensors_on_two_devices_are_refused(backend):
    sample = make(qk.lsq(4), (4, 64), torch.float32, "row", GPU)
    args = list(sample.args("fake_quantize"))
    args[1] = args[1].cpu()
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        IMPLS["fake_quantize"][backend](*args)
