"""The CUDA kernels, run on the CPU thread by thread, against the references."""

import shutil
from dataclasses import replace

import pytest
import torch

import qatkernels as qk
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, check_sample, run_out
from qatkernels.testing.samples import GRIDS, SEVENTH, every_sample, make, weights

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from tests.cuda import on_host

FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "quantize")
SAMPLES = list(every_sample())


@pytest.fixture(params=[False, True], ids=["", "reversed"], autouse=True)
def order(request):
    """Run every test with threads and blocks in both orders."""
    on_host.set_reversed(request.param)


def misaligned(t):
    """Return a contiguous copy that starts one element past a vector's boundary."""
    return None if t is None else t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def check(op, sample):
    check_sample(op, on_host.IMPLS[op], sample)


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_family(op, sample):
    check(op, sample)


#: Each way that tile.h divides rows: groups in one and several blocks, a warp and a block a row, odd columns (one
#: element at a time), rows longer than a block's step, and few rows that are cut into pieces.
LAYOUTS = [
    ((6, 256), 32), ((600, 64), 64), ((3, 1024), 256), ((9, 40), "row"), ((300, 1), "row"), ((1, 3), "row"),
    ((5, 31), "row"), ((5, 33), "row"), ((21, 520), "row"), ((9, 1023), "row"), ((2, 4096), "row"), ((2, 9001), "row"),
    ((16, 4096), "tensor"), ((3, 22222), "tensor"), ((1, 70001), "tensor"), ((7, 3, 50), "tensor"),
]  # fmt: skip


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize(("shape", "granularity"), LAYOUTS)
def test_layouts(op, shape, granularity):
    check(op, make(qk.grids.lsq(3), shape, torch.float32, granularity))
    check(op, make(qk.grids.affine(3), shape, torch.bfloat16, granularity, noise=op != "quantize"))


@pytest.mark.parametrize("op", FAMILY)
def test_float64(op):
    for grid in (qk.grids.binary(), qk.grids.seq(2), qk.grids.affine(4)):
        for granularity in ("row", "tensor", 8):
            sample = make(grid, (3, 400), torch.float64, granularity, noise=op != "quantize")
            check(op, sample)
            check(op, replace(sample, scale=sample.scale.float(), zero_point=_float(sample.zero_point)))


def _float(t):
    return None if t is None else t.float()


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("op", FAMILY)
def test_misaligned_pointers(op, dtype):
    sample = make(qk.grids.seq(2), (4, 512), dtype, "row", noise=op != "quantize")
    check(op, replace(sample, w=misaligned(sample.w)))
    args = sample.args(op)
    outputs = tuple(misaligned(t) for t in run_out(op, on_host.IMPLS[op], args))
    for out in outputs:
        out.fill_(1)
    on_host.IMPLS[op](*args, *outputs)
    assert_same_bits(outputs[0], as_tuple(OPS[op].reference(*args))[0])


def test_the_scale_gradient_repeats():
    """Cut into pieces or not, the order of additions is fixed."""
    for shape, granularity in (((64, 4096), "tensor"), ((9, 2048), "row"), ((64, 64), 32)):
        sample = make(qk.grids.affine(4), shape, torch.float32, granularity)
        args, results = sample.args("fake_quantize_backward"), []
        for flag in (False, True):
            on_host.set_reversed(flag)
            results.append(run_out("fake_quantize_backward", on_host.fake_quantize_backward, args))
        for first, second in zip(*results, strict=True):
            assert_same_bits(first, second)


def test_each_tangent_alone():
    sample = make(qk.grids.affine(4), (6, 64), torch.float32, "row", noise=True)
    sample.w[0, 3] = torch.nan
    args = sample.args("fake_quantize_jvp")
    for keep in range(3):
        some = tuple(t if i == keep else None for i, t in enumerate(args[:3])) + args[3:]
        (actual,) = run_out("fake_quantize_jvp", on_host.fake_quantize_jvp, some)
        assert_same_bits(actual, OPS["fake_quantize_jvp"].reference(*some))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", [*GRIDS, SEVENTH], ids=lambda g: f"{g.scheme}{g.bits}")
def test_special_values(grid, dtype):
    """Ties, both zeros, subnormals, the largest numbers, infinities, NaN; in w, scale and zero point."""
    ties = [(k + 0.5 + grid.offset) / grid.steps for k in range(grid.code_min - 2, grid.code_max + 2)]
    info = torch.finfo(dtype)
    near = torch.tensor([*ties, *grid.clamp, *grid.passes], dtype=torch.float64)
    near = torch.cat([near, near * (1 + info.eps), near * (1 - info.eps)])
    extremes = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 4, info.max, -info.max, torch.inf, -torch.inf, torch.nan]
    scale = torch.tensor([1.0, 0.5, 3.0, 0.01, 1e-5, 0.0, -2.0, 2e6, 1e30, torch.inf, torch.nan])
    rows = [torch.cat([near * max(s, 1e-5), torch.tensor(extremes, dtype=torch.float64)]) for s in scale.tolist()]
    w = torch.stack(rows).to(dtype)
    w = torch.cat([w, w.new_zeros(len(w), -w.shape[1] % 8)], 1)  # whole vectors
    zero_points = [None]
    if grid.has_zero_point:
        zero_points += [torch.full_like(scale, z) for z in (1.0, 0.3, 1e-30, torch.inf, torch.nan)]
    for zero_point in zero_points:
        point = (w, scale, zero_point, None, list(grid.constants), 0.0, 0.0, 1.0)
        calls = {
            "fake_quantize": (*point, None),
            "fake_quantize_backward": (torch.ones_like(w), *point),
            "fake_quantize_jvp": (torch.ones_like(w), torch.ones_like(scale), None, *point, None),
            "quantize": (w, scale, zero_point, list(grid.constants), grid.code_min, grid.code_max),
        }
        for op, args in calls.items():
            actual = run_out(op, on_host.IMPLS[op], args)
            assert_same_bits(actual[0], as_tuple(OPS[op].reference(*args))[0], f"{op}, zero point {zero_point}")


def test_codes_stay_in_a_range_without_zero():
    w = torch.tensor([[torch.nan, -9.0, 0.0, 2.0, 9.0, torch.inf, -torch.inf, 3.4]])
    for low, high in ((1, 5), (-6, -2), (200, 255)):
        args = (w, torch.ones(1), None, list(qk.grids.lsq(8).constants), low, high)
        (codes,) = run_out("quantize", on_host.quantize, args)
        assert_same_bits(codes, OPS["quantize"].reference(*args))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(grid, dtype):
    for shape, granularity in (((6, 48), "row"), ((6, 48), 16), ((5, 37), "row"), ((7, 1024), "tensor")):
        sample = make(grid, shape, dtype, granularity)
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        for given in (codes, misaligned(codes)):
            args = (given, sample.scale, sample.zero_point, list(grid.constants), dtype)
            (actual,) = run_out("dequantize", on_host.dequantize, args)
            assert_same_bits(actual, OPS["dequantize"].reference(*args), sample.name)
            assert_same_bits(actual, OPS["fake_quantize"].reference(*sample.args("fake_quantize")), sample.name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(7, 33), (2, 3, 64), (5, 1), (4, 5000), (40, 128), (3, 0), (0, 3), (3, 2056), (2, 20000), (3, 4, 9)]
)
@pytest.mark.parametrize("bits", [2, 8])
def test_dynamic(dtype, shape, bits):
    x = weights(shape, dtype)
    if x.numel() > 20:
        rows = x.view(-1, shape[-1])
        rows[0, -1] = torch.nan
        rows[1, 0] = -torch.inf
        rows[2:3] = 0.0
        rows[3:4] *= 1e-3 if dtype == torch.float16 else 1e-30
    expected = OPS["fake_quantize_dynamic"].reference(x, bits)
    for given in (x, misaligned(x)):
        (actual,) = run_out("fake_quantize_dynamic", on_host.fake_quantize_dynamic, (given, bits))
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("numel", [0, 1, 3, 64, 1000, 5001])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 123456789123])
@pytest.mark.parametrize("stream", [0, 1])
def test_normals(numel, seed, stream):
    seed = torch.tensor(seed)
    expected = OPS["normal"].reference(seed, numel, stream)
    (actual,) = run_out("normal", on_host.normal, (seed, numel, stream))
    assert_same_bits(actual, expected)
    shifted = misaligned(expected).fill_(torch.nan)
    on_host.normal(seed, numel, stream, shifted)
    assert_same_bits(shifted, expected)


def test_empty_weights_give_zero_scale_gradients():
    w, scale = torch.empty(3, 0), torch.ones(3)
    args = (w, w, scale, scale, None, list(qk.grids.affine(4).constants), 0.0, 0.0, 1.0)
    dw, ds, dz = run_out("fake_quantize_backward", on_host.fake_quantize_backward, args)
    assert dw.numel() == 0
    assert_same_bits(ds, torch.zeros(3))
    assert_same_bits(dz, torch.zeros(3))


@pytest.mark.parametrize("rows", [1, 2, 700, 2048, 8192, 2**20])
@pytest.mark.parametrize("cols", [1, 32, 8192, 100_000, 2**20 + 8, 2**32])
def test_pieces_cover_a_row_in_at_most_eight_steps(rows, cols):
    for v, u in ((1, 4), (4, 2), (8, 4), (8, 1)):
        pieces, piece_cols = on_host.layout(rows, cols, v, u)
        assert (pieces - 1) * piece_cols < cols <= pieces * piece_cols
        if pieces > 1:
            assert piece_cols % (256 * v * u) == 0
        assert piece_cols <= 8 * 256 * v * u


def test_division_is_correctly_rounded():
    """The division without a reciprocal for each element, over the whole range of float32 and near it."""
    generator = torch.Generator().manual_seed(0)

    def bits(n):
        return torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)

    n = 1 << 20
    ordinary = torch.randn(n, generator=generator)
    scales = torch.rand(n, generator=generator) * 10.0 ** torch.randint(-5, 6, (n,), generator=generator)
    # Quotients a unit in the last place around numbers with few bits, where one rounding error shows.
    few = torch.randint(1, 4096, (n,), generator=generator).float()
    nearly = (few * scales).view(torch.int32) + torch.randint(-2, 3, (n,), generator=generator).to(torch.int32)
    cases = [(bits(n), bits(n)), (bits(n), scales), (ordinary, scales), (nearly.view(torch.float32), scales)]
    for a, b in cases:
        actual, expected = on_host.divide(a, b), a / b
        # A quotient of zero may lose its sign, which nothing looks at.
        assert_same_bits(actual + 0.0, expected + 0.0)
