"""The Triton kernels themselves, run by Triton's interpreter on CPU tensors, against the references.

Interpreting is decided when Triton is imported, so this file has a process of its own:
``TRITON_INTERPRET=1 pytest tests/triton/test_interpreter.py``.
"""

import os

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import (
    assert_same_bits,
    assert_within,
    check_first_output,
    check_gram_schmidt,
    check_in_place,
    check_linear_dual,
    check_norms,
    check_rows,
    check_sample,
    run_out,
    special_calls,
)
from qatkernels.testing.samples import (
    GRIDS,
    basis_calls,
    complete_calls,
    every_sample,
    logits_calls,
    make,
    perturbations,
    weights,
)
from tests.strides import check_strided_outputs, check_strides

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

FAMILY = ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize")
#: A grid of the family whose steps have no exact reciprocal.
SEVENTH = qk.grids.Grid("seventh", 4, -7, 7, 7.0, 0.0, (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))


def triton_out(op):
    return IMPLS[f"{op}_out"]["triton"]


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("sample", list(every_sample()), ids=lambda s: s.name)
def test_family(op, sample):
    check_sample(op, triton_out(op), sample)


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.ternary(), qk.grids.affine(4)], ids=lambda g: g.scheme)
def test_float64(op, grid):
    check_sample(op, triton_out(op), make(grid, (3, 40), torch.float64, "row", noise=True))
    check_sample(op, triton_out(op), make(grid, (3, 40), torch.float64, 8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_special_values(grid, dtype):
    for op, args in special_calls(grid, dtype).items():
        check_first_output(op, triton_out(op), args)


@pytest.mark.parametrize("op", FAMILY)
def test_steps_without_an_exact_reciprocal(op):
    """A product with 1 / 7 is rounded twice, a quotient by 7 once."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for granularity in ("row", 16):
            check_sample(op, triton_out(op), make(SEVENTH, (6, 48), dtype, granularity, noise=op != "quantize"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_of_the_family_at_such_steps(dtype):
    for op, args in special_calls(SEVENTH, dtype).items():
        check_first_output(op, triton_out(op), args)
    sample = make(SEVENTH, (6, 48), dtype)
    check_in_place("reset_", IMPLS["reset_"]["triton"], sample.args("reset_"))
    check_linear_dual(triton_out("quant_linear_dual"), sample, 5, False)
    codes = OPS["quantize"].reference(*sample.args("quantize"))
    args = (codes, sample.scale, None, list(SEVENTH.constants), dtype)
    assert_same_bits(run_out("dequantize", triton_out("dequantize"), args)[0], OPS["dequantize"].reference(*args))


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("shape", [(1, 20000), (3, 16385), (70, 32), (5000, 1), (2, 3)])
def test_shapes_of_every_tiling(op, shape):
    """Rows cut into chunks, rows bundled into tiles, partial tiles."""
    check_sample(op, triton_out(op), make(qk.grids.affine(4), shape, noise=op != "quantize"))


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_empty(op, shape):
    w, scale = torch.empty(shape), torch.ones(shape[0])
    point = (w, scale, None, None, list(qk.grids.lsq(4).constants), 0.0, 0.0, 1.0)
    args = {
        "fake_quantize": (*point, None),
        "fake_quantize_backward": (torch.empty(shape), *point),
        "fake_quantize_dual": (w, scale, None, *point, None),
        "fake_quantize_jvp": (w, scale, None, *point, None),
        "quantize": (w, scale, None, point[4], -8, 7),
    }[op]
    out = run_out(op, triton_out(op), args)
    assert out[0].shape == shape
    if op == "fake_quantize_backward":
        assert torch.equal(out[1], torch.zeros_like(scale))


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in IMPLS[op]])
def test_strided_inputs(op):
    check_strides(op, "triton")


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in IMPLS.get(f"{op}_out", {})])
def test_outputs_that_do_not_fit(op):
    check_strided_outputs(op, "triton")
    args = complete_calls(op)[0]
    for i in range(len(OPS[op].outputs)):
        outputs = list(as_tuple(OPS[op].meta(*args)))
        for wrong in (outputs[i].new_zeros((*outputs[i].shape, 2)), outputs[i].to(torch.complex64)):
            with pytest.raises(ValueError, match=f"{OPS[op].outputs[i]} is .*must be"):
                triton_out(op)(*args, *outputs[:i], wrong, *outputs[i + 1 :])


def test_backward_repeats_its_bits():
    args = make(qk.grids.lsq(4), (48, 32), noise=True).args("fake_quantize_backward")
    first, second = (run_out("fake_quantize_backward", triton_out("fake_quantize_backward"), args) for _ in range(2))
    for a, e in zip(first, second, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(grid, dtype):
    sample = make(grid, (6, 48), dtype, 16)
    codes = qk.quantize(sample.w, sample.scale, grid, group_size=16, zero_point=sample.zero_point)
    args = (codes, sample.scale, sample.zero_point, list(grid.constants), dtype)
    assert_same_bits(run_out("dequantize", triton_out("dequantize"), args)[0], OPS["dequantize"].reference(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 64), (5, 1), (2, 5000), (3, 0), (0, 3)])
@pytest.mark.parametrize("bits", [2, 8])
def test_dynamic(dtype, shape, bits):
    x = weights(shape, dtype)
    if x.numel() > 20:
        x.view(-1, shape[-1])[0, 0] = torch.nan
        x.view(-1, shape[-1])[1] = torch.inf
    if x.numel() > 200:
        x.view(-1, shape[-1])[2:3] = 0.0
    expected = OPS["fake_quantize_dynamic"].reference(x, bits)
    assert_same_bits(run_out("fake_quantize_dynamic", triton_out("fake_quantize_dynamic"), (x, bits))[0], expected)


@pytest.mark.parametrize("numel", [0, 1, 3, 64, 5001])
@pytest.mark.parametrize("seed", [0, -1, 123456789123])
@pytest.mark.parametrize("stream", [0, 1])
def test_normals(numel, seed, stream):
    seed = torch.tensor(seed)
    expected = OPS["normal"].reference(seed, numel, stream)
    assert_same_bits(run_out("normal", triton_out("normal"), (seed, numel, stream))[0], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy(dtype):
    for name, op, args in logits_calls(dtype):
        check_rows(op, triton_out(op), args, name)


@pytest.mark.parametrize("call", [c for c in basis_calls() if c[2][1].numel() < 10_000], ids=lambda c: c[0])
def test_gram_schmidt(call):
    name, op, args = call
    check_gram_schmidt(triton_out(op), args, name)


def test_gram_schmidt_of_more_tiles_than_programs():
    """The last programs have a tile less."""
    from qatkernels.backends.triton.krylov import LEAST_COLUMNS, MOST_PROGRAMS

    rows, cols = 128, (MOST_PROGRAMS + 5) * LEAST_COLUMNS + 3
    basis, w = torch.randn(rows, cols), torch.randn(cols)
    check_gram_schmidt(triton_out("gram_schmidt"), (basis, w, torch.randn(rows).double()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_scales_of_many_weights(dtype):
    """Several programs add the terms of a scale, and a second kernel adds their sums."""
    for shape, granularity in (((40, 1000), "tensor"), ((3, 40000), "row")):
        sample = make(qk.grids.affine(4), shape, dtype, granularity)
        check_sample("fake_quantize_backward", triton_out("fake_quantize_backward"), sample)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [70, 1])
@pytest.mark.parametrize(
    "sample",
    [
        make(qk.grids.lsq(4), (70, 48), torch.float32, "row", noise=True),
        make(qk.grids.affine(4), (6, 48), torch.float32, 16, out_dtype=torch.bfloat16),
        make(qk.grids.seq(2), (5, 37), torch.bfloat16, "tensor"),
        make(qk.grids.binary(), (5, 37), torch.float64, "row"),
        make(qk.grids.ternary(), (33, 16), torch.float16, "row"),
    ],
    ids=lambda s: s.name,
)
def test_quant_linear_dual(sample, tokens, transposed):
    check_linear_dual(triton_out("quant_linear_dual"), sample, tokens, transposed)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_reset(grid):
    calls = [make(grid, (6, 48), dtype, granularity) for dtype in FLOATS for granularity in ("row", 16, "tensor")]
    for sample in (*calls, make(grid, (5, 37)), make(grid, (1, 20000))):
        check_in_place("reset_", IMPLS["reset_"]["triton"], sample.args("reset_"), sample.name)
    for dtype in (torch.float32, torch.bfloat16):
        w, scale, zero_point, constants, *_ = special_calls(grid, dtype)["quantize"]
        check_in_place("reset_", IMPLS["reset_"]["triton"], (w, scale, zero_point, constants, 0.4), str(dtype))


@pytest.mark.parametrize("op", ["perturb_", "perturb_swap_"])
def test_perturb(op):
    for args in perturbations(op):
        check_in_place(op, IMPLS[op]["triton"], args, f"{args[0].dtype} {tuple(args[0].shape)}")


def test_perturbation_norms():
    for args in perturbations("perturbation_norms"):
        check_norms(triton_out("perturbation_norms"), *args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_products(dtype):
    """Experts without tokens, tokens without expert, more tiles than one, any strides."""
    generator = torch.Generator().manual_seed(0)
    for ends in ((3, 3, 40, 45), (0, 0), (70,), ()):
        offsets = torch.tensor(ends, dtype=torch.int32)
        x, g, w = (torch.randn(*s, generator=generator).to(dtype) for s in ((70, 20), (70, 24), (len(ends), 24, 20)))
        strided = x.T.contiguous().T, g[:, :1].expand(70, 24), w.mT.contiguous().mT
        for xs, gs, ws in ((x, g, w), strided):
            for op, a, b in (
                ("grouped_linear", xs, ws), ("grouped_linear_transposed", gs, ws), ("grouped_outer", gs, xs),
            ):  # fmt: skip
                (actual,) = run_out(op, triton_out(op), (a, b, offsets))
                expected = OPS[op].reference(a.double(), b.double(), offsets)
                size = OPS[op].reference(a.double().abs(), b.double().abs(), offsets)
                rounding = torch.finfo(dtype).eps * expected.abs()
                unit = 2**-53 if dtype == torch.float64 else 2**-24
                assert_within(actual, expected, 80 * unit * size + rounding, f"{op} {ends} {dtype}")


@pytest.mark.parametrize("ends", [(3, 75), (-4, 10), (9, 2)], ids=str)
def test_bad_offsets_of_grouped_products_stay_in_the_tensors(ends):
    """A GPU cannot look at them without a wait: the result is undefined, the memory around it is not."""
    offsets = torch.tensor(ends, dtype=torch.int32)
    x, w = torch.ones(30, 20), torch.ones(2, 24, 20)
    x, around = torch.cat([x, torch.full((60, 20), float("nan"))])[:30], torch.full((90, 24), 7.0)
    y = around[30:60]
    triton_out("grouped_linear")(x, w, offsets, y)
    assert ((y == 0) | (y == 20)).all()
    assert (around[:30] == 7).all()
    assert (around[60:] == 7).all()
    outer = torch.full_like(w, float("nan"))
    triton_out("grouped_outer")(y, x, offsets, outer)
    assert outer.isfinite().all(), "tokens past the last were read"
