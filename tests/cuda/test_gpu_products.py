"""Products with packed weights on a GPU: what Triton compiles for each width, and all that the CUDA kernel serves."""

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import CONDITIONS, IMPLS, MISSING, Stage
from qatkernels.dtypes import dtype_name
from qatkernels.ops._op import OPS
from qatkernels.ops.contract import FLOATS
from qatkernels.testing import decode
from qatkernels.testing.checks import DECODED
from qatkernels.testing.compare import assert_same_bits, assert_within, run_out
from qatkernels.testing.products import (
    GRID_IDS,
    GRIDS,
    Case,
    activations,
    cases,
    floored_cases,
    grouped_cases,
    scaled_weight,
)
from qatkernels.testing.samples import weights
from tests.choices import choice
from tests.implementations import GPU, GPU_BACKENDS, moved

pytestmark = pytest.mark.gpu

#: One grid for each width of a stored code: Triton compiles another kernel for every one.
WIDTHS = [qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), *map(qk.grids.lsq, (3, 4, 5, 6)), qk.grids.affine(8)]
#: Few tokens and many, within a tile and beyond it.
SIZES = [(5, 17, 300), (33, 70, 520), (130, 96, 256)]
OPERATIONS = ("lowbit_linear", "lowbit_linear_transposed")


def names(grids):
    return {"argvalues": grids, "ids": [f"{g.scheme}{g.bits}" for g in grids]}


@pytest.fixture(params=GPU_BACKENDS)
def linear(request):
    if request.param not in IMPLS["lowbit_linear"]:
        pytest.skip(f"lowbit_linear has no {request.param} kernel here: {MISSING.get(request.param)}")
    return IMPLS["lowbit_linear"][request.param]


def check_triton(case):
    for op in OPERATIONS:
        if op == "lowbit_linear" or case.act_bits is None:
            args, expected, bound = case.call(op)
            (actual,) = run_out(op, IMPLS[f"{op}_out"]["triton"], moved(args, GPU))
            assert_within(actual.cpu(), expected, bound, f"{op} {case.name}")


@pytest.mark.parametrize("grid", **names(WIDTHS))
def test_triton_on_sixteen_bits(grid):
    for case in cases(grid, torch.bfloat16, SIZES):
        check_triton(case)
    for case in list(floored_cases(grid, torch.float16))[:4]:
        check_triton(case)


@pytest.mark.parametrize("grid", **names(WIDTHS[::2]))
def test_triton_on_float32(grid):
    for case in cases(grid, torch.float32, SIZES[::2]):
        check_triton(case)


@pytest.mark.parametrize("grid", **names(WIDTHS))
def test_triton_on_many_tokens(grid, monkeypatch):
    """The library multiplies: codes and parts of weights, with several slices of rows and of columns."""
    monkeypatch.setattr("qatkernels.backends.triton._library.SLICE_BYTES", 1 << 20)
    monkeypatch.setattr("qatkernels.backends.triton._library.GROUPS_TOKENS", 256)
    zero, bias = "any" if grid.has_zero_point else None, activations((1100,), torch.bfloat16, seed=3)
    for tokens, cols, group, act_bits in (
        (1030, 1100, None, None), (1030, 1100, None, 8),
        (260, 1152, 128, None), (260, 1100, 25, None), (260, 1152, 32, 8),
    ):  # fmt: skip
        weight = scaled_weight(grid, (1100, cols), group, torch.bfloat16, zero)
        x = activations((tokens, cols), torch.bfloat16)
        check_triton(Case(f"{tokens} tokens group {group} A{act_bits}", weight, x, bias, None, act_bits))
    weight = scaled_weight(grid, (1096, 1104), None, torch.float32, zero)
    for dtype, act_bits in ((torch.float16, None), (torch.bfloat16, 8)):
        check_triton(Case("aligned", weight, activations((1030, 1104), dtype), None, None, act_bits))


@pytest.mark.skipif("triton" not in IMPLS["lowbit_linear"], reason="needs Triton")
def test_many_tokens_in_a_graph_and_again(monkeypatch):
    """A call with products of the library is never replayed as a launch plan; it can be captured."""
    monkeypatch.setattr("qatkernels.backends.triton._library.GROUPS_TOKENS", 256)
    weight = scaled_weight(qk.grids.lsq(4), (256, 1024), 128).to(GPU)
    planned, out = IMPLS["lowbit_linear"]["triton"], []
    xs = [weights((1030, 1024), torch.bfloat16, GPU, seed=seed) for seed in range(4)]
    grid = (list(weight.grid.constants), weight.grid.code_min, weight.bits)
    settings = (weight.packed, weight.scale, None, None, None, *grid, None)
    for x in xs:
        out.append(planned(x, *settings))
        assert_same_bits(out[-1], getattr(planned, "impl", planned)(x, *settings))
    given = xs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = planned(given, *settings)
    for x, expected in zip(xs, out, strict=True):
        given.copy_(x)
        graph.replay()
        assert_same_bits(y, expected)


@pytest.mark.parametrize("grid", **names([qk.grids.ternary(), qk.grids.lsq(3), qk.grids.affine(4)]))
def test_triton_by_expert(grid):
    for case in grouped_cases(grid, torch.bfloat16):
        check_triton(case)


def test_triton_in_float64():
    """No kernel has float64 tiles: the weight is dequantized and multiplied by torch, or by the kernel for experts."""
    for case in (
        *cases(qk.grids.affine(4), torch.float64, SIZES[:1]),
        *list(grouped_cases(qk.grids.lsq(3), torch.float64))[:2],
    ):
        check_triton(case)


@pytest.mark.skipif("cuda" not in IMPLS["lowbit_linear"] or "cuda" not in GPU_BACKENDS, reason="no CUDA kernel here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_cuda_on_few_tokens(grid, dtype):
    """Every size and granularity that it serves, within the bound for sums of limbs."""
    for case in (*cases(grid, dtype), *floored_cases(grid, dtype)):
        if case.x.shape[0] <= DECODED:
            args = moved(case.call("lowbit_linear")[0], GPU)
            (y,) = run_out("lowbit_linear", IMPLS["lowbit_linear_out"]["cuda"], args)
            assert_within(y, *decode.reference(args), case.name)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_any_number_of_tokens(act_bits):
    """Through the public function, whichever kernel it takes."""
    weight = scaled_weight(qk.grids.lsq(4), (96, 512), 128)
    for tokens in (*range(DECODED + 2), 16, 64, 130):
        case = Case(f"{tokens} tokens", weight, activations((tokens, 512), torch.bfloat16), act_bits=act_bits)
        args, expected, bound = case.call("lowbit_linear")
        y = qk.lowbit_linear(case.x.to(GPU), weight.to(GPU), act_bits=act_bits)
        if 0 < tokens <= DECODED:
            bound = torch.maximum(bound, decode.reference(args)[1])
        assert_within(y.cpu(), expected, bound, case.name)


@pytest.mark.parametrize("grid", decode.GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
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
        args = decode.make(grid, tokens, rows, cols, group_size, dtype, GPU, bias=dtype, act_bits=act_bits)
        y = linear(*args)
        assert_within(y, *decode.reference(args), f"{tokens}x{rows}x{cols}, groups of {group_size}")
        assert_same_bits(linear(*args), y)


def test_decoding_what_has_just_been_written(linear):
    """Each of several calls in a row sees the weights and tokens written right before it, without a synchronization."""
    args = decode.make(qk.grids.lsq(4), 1, 2048, 4096, 128, torch.bfloat16, GPU)
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
    args = decode.make(qk.grids.seq(2), 2, 1024, 8192, None, torch.bfloat16, GPU)
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
    args = decode.make(qk.grids.affine(4), tokens, 70, 256, 64, dtype, GPU)
    assert serves(*args) == (tokens <= 8 and dtype != torch.float64)
    stages = [Stage("cuda", None, True), Stage("reference")]
    y = choice(OPS["lowbit_linear"], "lowbit_linear", stages, "CUDA")(*args)
    assert_within(y, *decode.reference(args), f"{tokens} tokens of {dtype}")
    stack = (args[0], *(t[None] for t in args[1:4]), None, torch.tensor([tokens], dtype=torch.int32, device=GPU))
    assert not serves(*stack, *args[6:])


@pytest.mark.skipif("cuda" not in IMPLS["lowbit_linear"] or "triton" not in IMPLS["lowbit_linear"], reason="needs both")
@pytest.mark.parametrize("tokens", [1, DECODED, DECODED + 1, 64])
def test_few_tokens_go_to_the_decode_kernel(tokens):
    """The two kernels round differently, so the bits tell which one ran."""
    args = decode.make(qk.grids.lsq(4), tokens, 512, 2048, 128, torch.float32, GPU)
    first, other = ("cuda", "triton") if tokens <= DECODED else ("triton", "cuda")
    y = torch.ops.qatkernels.lowbit_linear(*args)
    assert_same_bits(y, IMPLS["lowbit_linear"][first](*args))
    if tokens <= DECODED:
        assert not torch.equal(y, IMPLS["lowbit_linear"][other](*args))


@pytest.mark.skipif("triton" not in IMPLS["lowbit_linear"], reason="needs Triton")
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_replayed_calls(tokens, act_bits):
    """From the third call on a plan is replayed, with other values at other addresses.

    Results equal those without a plan.
    """
    planned = IMPLS["lowbit_linear"]["triton"]
    made = decode.make(
        qk.grids.lsq(3), tokens, 96, 1024, 128, torch.bfloat16, GPU, bias=torch.bfloat16, act_bits=act_bits
    )
    kept = []
    for seed in range(5):
        args = (weights(made[0].shape, torch.bfloat16, GPU, seed=seed), made[1].roll(seed, 0), *made[2:])
        kept.append((planned(*args), getattr(planned, "impl", planned)(*args)))
    for seed, (y, expected) in enumerate(kept):
        assert_same_bits(y, expected, f"call {seed}")
