"""Products with packed weights: every implementation present against float64, and bad calls."""

from itertools import product

import pytest
import torch
from torch.func import jvp

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.dtypes import dtype_name
from qatkernels.ops._op import OPS
from qatkernels.ops.contract import FLOATS
from qatkernels.testing.compare import assert_same_bits, assert_within, run_out
from qatkernels.testing.products import (
    GRID_IDS,
    GRIDS,
    LARGE,
    SINGLE,
    Case,
    activations,
    cases,
    expected_linear,
    floored_cases,
    grouped_cases,
    replaced,
    scaled_weight,
)
from tests.isas import FLOAT_ISAS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: One grid for each width of a stored code.
WIDTHS = [qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), *map(qk.grids.lsq, (3, 4, 5, 6)), qk.grids.affine(8)]
OPERATIONS = ("lowbit_linear", "lowbit_linear_transposed")


def implementations(op):
    """Every `_out` implementation of the CPU, the reference included, with its device.

    Those of a GPU are compared in tests/cuda/test_gpu_products.py: each takes part of these calls, and Triton compiles
    a kernel for nearly every one.
    """
    found = [("reference", _reference_out(op), "cpu")]
    return found + [(name, IMPLS[f"{op}_out"][name], "cpu") for name in ("cpp",) if name in IMPLS[f"{op}_out"]]


def _reference_out(op):
    return lambda *args: args[-1].copy_(OPS[op].reference(*args[:-1]))


def _to(args, device):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def check(case):
    for op in OPERATIONS:
        args, expected, bound = case.call(op)
        for backend, impl, device in implementations(op):
            (actual,) = run_out(op, impl, _to(args, device))
            assert actual.dtype == case.x.dtype
            assert_within(actual.cpu(), expected, bound, f"{backend} {op} {case.name}")


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_every_size_and_granularity(grid, dtype):
    for case in cases(grid, dtype):
        check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("grid", WIDTHS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_beyond_a_tile(grid, dtype):
    for case in cases(grid, dtype, LARGE):
        check(case)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_grouped(grid, dtype):
    for case in grouped_cases(grid, dtype):
        check(case)
        args, *_ = case.call("lowbit_linear")
        for backend, impl, device in implementations("lowbit_linear"):
            (y,) = run_out("lowbit_linear", impl, _to(args, device))
            nobody = y[case.offsets[-1] :].cpu()
            assert_same_bits(nobody, torch.zeros_like(nobody), f"{backend} {case.name}: tokens of nobody")


@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_grouped_product_is_the_products_of_its_experts(act_bits):
    weight, ends = scaled_weight(qk.grids.lsq(4), (3, 8, 32)), [2, 2, 7]
    x = activations((9, 32), torch.float32)
    y = qk.grouped_lowbit_linear(x, weight, torch.tensor(ends, dtype=torch.int32), act_bits=act_bits)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        one = qk.PackedWeight(weight.packed[e], weight.scale[e], None, weight.grid, weight.cols)
        expected, bound = expected_linear(x[start:end], one, act_bits=act_bits)
        assert_within(y[start:end], expected, bound)
        assert_within(qk.lowbit_linear(x[start:end], one, act_bits=act_bits), expected, bound)


@pytest.mark.parametrize("grid", [qk.grids.binary(), qk.grids.lsq(3), qk.grids.affine(4)], ids=lambda g: g.scheme)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_any_leading_dimensions_strides_and_nothing(grid, act_bits):
    base = activations((6, 80), torch.float32)
    weight = scaled_weight(grid, (5, 40), zero="any" if grid.has_zero_point else None)
    inputs = {
        "vector": base[0, :40], "three": base[:, :40].reshape(2, 3, 40), "rows apart": base[:, :40],
        "columns apart": base[:, ::2], "transposed": base[:, :40].t().contiguous().t(),
        "repeated": base[:1, :40].expand(6, 40),
        "no token": base[:0, :40], "no token, three": base[:0, :40].reshape(2, 0, 40),
    }  # fmt: skip
    for name, x in inputs.items():
        check(Case(name, weight, x, base[0, :5], None, act_bits))
    weight_views = qk.PackedWeight(
        weight.packed.t().contiguous().t(), torch.stack([weight.scale, weight.scale], -1)[..., 0],
        None if weight.zero_point is None else torch.cat([weight.zero_point] * 2, -1)[:, :1], grid, 40,
    )  # fmt: skip
    check(Case("strided weight", weight_views, base[:, :40], None, None, act_bits))
    for rows, cols in ((0, 40), (5, 0), (0, 0)):
        empty = scaled_weight(grid, (rows, cols))
        for bias in (None, torch.ones(rows)):
            for tokens in (1, 6, 30):
                x = base[:1, :cols].expand(tokens, cols)
                check(Case(f"{tokens} times {rows}x{cols}", empty, x, bias, None, act_bits))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.lsq(4)], ids=lambda g: g.scheme)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_token(grid, act_bits, bad):
    for tokens in (3, 40):
        weight, x = scaled_weight(grid, (9, 70)), activations((tokens, 70), torch.float32)
        x[1] = 0.0
        expected, bound = expected_linear(x, weight, act_bits=act_bits)
        x[0, 5] = bad
        args, *_ = Case("", weight, x, act_bits=act_bits).call("lowbit_linear")
        for backend, impl, device in implementations("lowbit_linear"):
            y = run_out("lowbit_linear", impl, _to(args, device))[0].cpu()
            assert not y[0].isfinite().any(), backend
            assert act_bits is None or y[0].isnan().all(), backend
            assert_within(y[1:], expected[1:], bound[1:], backend)
            assert (y[1] == 0).all(), backend


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize(
    "grid",
    [qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), qk.grids.lsq(3), qk.grids.lsq(4)],
    ids=lambda g: g.scheme,
)
def test_a_scale_that_is_not_finite_stays_in_its_row(grid, act_bits):
    """Also where a row ends within the columns that are multiplied at once."""
    others = torch.arange(9) != 4
    for dtype, (cols, size) in product((torch.float32, torch.bfloat16), ((64, 32), (96, 32), (192, 64))):
        weight = scaled_weight(grid, (9, cols), size)
        scale = weight.scale.clone()
        scale[4] = torch.nan
        for tokens in (1, 3, 40):
            x = activations((tokens, cols), dtype)
            args, *_ = Case("", replaced(weight, scale=scale), x, act_bits=act_bits).call("lowbit_linear")
            expected, bound = expected_linear(x, weight, act_bits=act_bits)
            for backend, impl, device in implementations("lowbit_linear"):
                y = run_out("lowbit_linear", impl, _to(args, device))[0].cpu()
                assert y[:, 4].isnan().all(), backend
                assert_within(y[:, others], expected[:, others], bound[:, others], f"{backend} {cols} {tokens}")


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("outlier", [1e2, 1e4])
def test_an_outlier_on_a_small_weight(isa, dtype, outlier):
    """Kernels that sum integers keep activations to 24 bits below the largest, whatever its weight is."""
    of_integers = {torch.float32: ("cpp", "cuda"), torch.float16: ("cpp", "cuda")}
    if isa.partition("+")[0] in ("avx512_vnni", "avx512_icelake"):  # which cannot multiply bfloat16
        of_integers[torch.bfloat16] = ("cpp",)
    for grid, group in (
        (qk.grids.affine(4), None),
        (qk.grids.lsq(4), 32),
        (qk.grids.seq(2), 32),
        (qk.grids.binary(), 32),
    ):
        weight = scaled_weight(grid, (9, 64), group)
        if group is None:  # the code of every weight in the column of the outlier is 0
            codes = weight.codes().clone()
            codes[:, 0] = 0
            weight = replaced(weight, packed=qk.pack(codes, grid))
        else:
            scale = weight.scale.clone()
            scale[:, 0] /= 50
            weight = replaced(weight, scale=scale)
        for tokens in (1, 3, 20):
            x = activations((tokens, 64), dtype)
            x[:, 0] = outlier
            args, expected, bound = Case("", weight, x).call("lowbit_linear")
            digits = x.double().abs().amax(-1, keepdim=True) * weight.dequantize().double().abs().sum(-1) * SINGLE
            # Lookup tables, for few tokens at 1 bit, have 24 bits for each group.
            without_lookup = isa.startswith("avx512_vnni") or ("+" in isa and tokens == 20)
            for backend, impl, device in implementations("lowbit_linear"):
                (y,) = run_out("lowbit_linear", impl, _to(args, device))
                integers = backend in of_integers.get(dtype, ()) and (grid.bits > 1 or without_lookup)
                allowed = bound + digits if integers else bound
                assert_within(y.cpu(), expected, allowed, f"{backend} {grid.scheme} {tokens}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("grid", WIDTHS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_a_scale_below_the_floor_acts_as_the_floor(grid, dtype):
    for case in floored_cases(grid, dtype):
        check(case)


@pytest.mark.usefixtures("isa")
def test_the_largest_activations_are_summed():
    """Activations whose partial sums no float32 holds, where the result fits."""
    for grid in (qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), qk.grids.lsq(2)):
        codes = torch.full((3, 4), grid.code_min, dtype=torch.int8)
        codes[:, 2:] = grid.code_max
        packed = qk.pack(codes, grid)
        weight = qk.PackedWeight(packed, torch.full((3, 1), 0.01), None, grid, 4)
        x = torch.tensor([[3e38, 3e38, 3e38, 2.9e38]]) * torch.linspace(0.5, 1, 4)
        args, expected, bound = Case("", weight, x).call("lowbit_linear")
        for backend, impl, device in implementations("lowbit_linear"):
            (y,) = run_out("lowbit_linear", impl, _to(args, device))
            assert_within(y.cpu(), expected, bound, f"{backend} {grid.scheme}")


@pytest.mark.usefixtures("isa")
def test_a_panel_of_few_rows_reads_its_own_scales():
    """Many tokens, and rows that end within the first sixteen of a panel: scales end with their rows."""
    for rows in (1, 5, 37):
        for grid in (qk.grids.lsq(4), qk.grids.seq(2)):
            check(Case(f"{rows} rows", scaled_weight(grid, (rows, 64)), activations((13, 64), torch.bfloat16)))


@pytest.mark.usefixtures("isa")
def test_large_activations_do_not_overflow_between():
    """Integer sums at their extremes: every product is the largest of its sign."""
    cols = 8192
    for grid in (qk.grids.lsq(8), qk.grids.affine(8), qk.grids.binary()):
        for value in (grid.code_min, grid.code_max):
            w = (torch.full((3, cols), float(value)) + grid.offset) / grid.steps
            weight = qk.PackedWeight.from_float(w, torch.ones(3), grid)
            for sign in (-1.0, 1.0):
                check(Case(f"{grid.scheme} {value}", weight, torch.full((2, cols), sign), act_bits=8))


@pytest.mark.parametrize("grouped", [False, True])
def test_autocast_rounds_nothing(grouped):
    offsets = torch.tensor([1, 4], dtype=torch.int32) if grouped else None
    weight = scaled_weight(qk.grids.lsq(4), (2, 24, 40) if grouped else (24, 40))
    case = Case("", weight, activations((5, 40), torch.float32), offsets=offsets)
    for op in OPERATIONS:
        args, expected, bound = case.call(op)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = getattr(torch.ops.qatkernels, op)(*_to(args, DEVICE))
        assert_within(actual.cpu(), expected, bound, op)


def _runs(case, isa):
    """What the C++ kernel gives on one, two and three threads."""
    args, threads = case.call("lowbit_linear")[0], torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results += run_out("lowbit_linear", IMPLS["lowbit_linear_out"]["cpp"], args)
    torch.set_num_threads(threads)
    return results


def test_number_of_threads_changes_no_bit(isa):
    """Of the product itself, in every dtype but float64; docs/packing.md says where the promise ends."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        every = [
            case
            for grid in (qk.grids.ternary(), qk.grids.lsq(3), qk.grids.affine(4))
            for case in cases(grid, dtype, LARGE)
        ]
        for case in [*every, *grouped_cases(qk.grids.lsq(4), dtype)]:
            first, *others = _runs(case, isa)
            for other in others:
                assert_same_bits(other, first, f"{isa} {case.name}")


@pytest.mark.parametrize("isa", FLOAT_ISAS, indirect=True)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_token_does_not_depend_on_how_many_there_are(isa, act_bits):
    """Where sums are float32 products, added in one order."""
    kernel = IMPLS["lowbit_linear"]["cpp"]
    for grid, group in product((qk.grids.lsq(4), qk.grids.lsq(3), qk.grids.affine(4)), (None, 50)):
        weight = scaled_weight(grid, (70, 650), group, zero="any" if grid.has_zero_point else None)
        x = activations((43, 650), torch.float32)
        whole = kernel(*Case("", weight, x, act_bits=act_bits).call("lowbit_linear")[0])
        for first, last in ((0, 1), (1, 3), (3, 10), (10, 23), (23, 43)):
            part = Case("", weight, x[first:last], act_bits=act_bits)
            assert_same_bits(kernel(*part.call("lowbit_linear")[0]), whole[first:last], f"{isa} {grid.scheme}")


@pytest.fixture(scope="module")
def isa_calls():
    """Calls with expectations and bounds, as (op, name, arguments, expectation, bound)."""
    dtypes = (torch.float32, torch.bfloat16)
    every = [c for grid in WIDTHS for dtype in dtypes for c in cases(grid, dtype)]
    every += [c for grid in WIDTHS for c in grouped_cases(grid, torch.float16)]
    every += [c for grid in WIDTHS for dtype in dtypes for c in cases(grid, dtype, LARGE)]
    every += [c for grid in WIDTHS for c in floored_cases(grid, torch.float32)]
    return [(op, case.name, *case.call(op)) for case in every for op in OPERATIONS]


def test_every_isa_is_within_the_bound(isa, isa_calls):
    """The order of additions, and so the bits, may differ between ISAs. Each is compared with float64."""
    for op, name, args, expected, bound in isa_calls:
        (actual,) = run_out(op, IMPLS[f"{op}_out"]["cpp"], args)
        assert_within(actual, expected, bound, f"{isa} {op} {name}")


def _bad_calls():
    w, x = scaled_weight(qk.grids.lsq(4), (6, 16), 8), torch.randn(3, 16)
    stack, ends = scaled_weight(qk.grids.lsq(4), (2, 6, 16)), torch.tensor([1, 3], dtype=torch.int32)
    linear, grouped = qk.lowbit_linear, qk.grouped_lowbit_linear
    return {
        "x is torch.int64": lambda: linear(x.long(), w),
        "x has shape .., must be .\\.\\.\\., K.": lambda: linear(torch.tensor(1.0), w),
        "x has shape .3, 9., its last dimension must be 16 like the weight's": lambda: linear(x[:, :9], w),
        "x has shape .3, 15., its last dimension must be 16": lambda: grouped(x[:, :15], stack, ends),
        "act_bits is 9": lambda: linear(x, w, act_bits=9),
        "act_bits is 1": lambda: linear(x, w, act_bits=1),
        "bias has shape .5,., must be .6,.": lambda: linear(x, w, torch.zeros(5)),
        "bias is torch.int64": lambda: linear(x, w, torch.zeros(6, dtype=torch.int64)),
        "packed has shape .2, 6, 8., must be .N, 8.": lambda: linear(x, stack),
        "packed has shape .6, 8., must be .E, N, 8.": lambda: grouped(x, w, ends),
        "offsets is torch.int64": lambda: grouped(x, stack, ends.long()),
        "offsets has shape .1,., must be .2,.": lambda: grouped(x, stack, ends[:1]),
        "x has 3 dimensions, must have 2 with offsets": lambda: grouped(x[None], stack, ends),
        "packed is on meta, must be on cpu": lambda: linear(x, w.to("meta")),
        "offsets is .2, 1., must ascend": lambda: grouped(x, stack, torch.tensor([2, 1], dtype=torch.int32)),
        "offsets is .-1, 3., must ascend": lambda: grouped(x, stack, torch.tensor([-1, 3], dtype=torch.int32)),
        "offsets is .1, 4., must ascend from 0 to at most the 3": lambda: grouped(
            x, stack, torch.tensor([1, 4], dtype=torch.int32)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("message", _bad_calls())
def test_bad_calls(message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        _bad_calls()[message]()


def test_a_weight_of_another_kind():
    weight, ends = torch.randn(6, 16), torch.tensor([3], dtype=torch.int32)
    for given, name in ((weight, "a tensor"), (torch.nn.Identity(), "Identity"), (None, "None")):
        for call in (qk.lowbit_linear, lambda x, w: qk.grouped_lowbit_linear(x, w, ends)):
            with pytest.raises(TypeError, match=f"weight is {name}.*, must be a PackedWeight"):
                call(torch.randn(3, 16), given)


@pytest.mark.parametrize("cols", [64, 63])
@pytest.mark.parametrize("grid", WIDTHS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_an_input_a_few_columns_off(grid, cols):
    """Also where a row takes as many bytes with so many columns."""
    dense, stack = scaled_weight(grid, (4, cols)), scaled_weight(grid, (2, 4, cols))
    ends = torch.tensor([1, 3], dtype=torch.int32)
    layer, grouped = qk.PackedLinear(dense), qk.GroupedPackedLinear(stack)
    calls = {
        "dense": lambda x: qk.lowbit_linear(x, dense),
        "integers": lambda x: qk.lowbit_linear(x, dense, act_bits=8),
        "grouped": lambda x: qk.grouped_lowbit_linear(x, stack, ends),
        "layer": layer,
        "grouped layer": lambda x: grouped(x, ends),
    }
    for width in (*range(cols - 7, cols), cols + 1):
        message = rf"x has shape \(3, {width}\), its last dimension must be {cols}"
        for name, call in calls.items():
            for x in (torch.randn(3, width), torch.randn(3, width, requires_grad=True)):
                with pytest.raises(RuntimeError, match=message):
                    raise AssertionError(f"{name} gives {call(x)}")
            with pytest.raises(RuntimeError, match=message):
                jvp(call, (torch.randn(3, width),), (torch.randn(3, width),))


@pytest.mark.parametrize("op", OPERATIONS)
def test_bad_operands(op):
    """What a PackedWeight does not let through, given to the op itself."""
    args = list(Case("", scaled_weight(qk.grids.affine(4), (6, 16), 8, zero="any"), torch.randn(3, 16)).call(op)[0])
    for i, value, message in (
        (1, args[1].to(torch.int8), "packed is torch.int8"),
        (2, args[2].double(), "scale is torch.float64"),
        (2, args[2][:5], "scale has shape"),
        (3, args[3][:, :1], "zero_point has shape .6, 1., must be .6, 2."),
        (3, args[3].double(), "zero_point is torch.float64, must be torch.float32"),
        (-4, args[-4][:9], "grid has 9 constants"),
        (-3, 5, "code_min is 5"),
        (-2, 9, "bits is 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.qatkernels, op)(*args[:i], value, *args[i + 1 :] if i != -1 else [])


def test_bad_out():
    args, *_ = Case("", scaled_weight(qk.grids.lsq(4), (6, 16)), torch.randn(3, 16)).call("lowbit_linear")
    for backend, impl, device in implementations("lowbit_linear"):
        if backend == "reference":
            continue
        for out in (torch.empty(3, 5), torch.empty(3, 6, dtype=torch.float64), torch.empty(6, 3).t()):
            with pytest.raises((RuntimeError, ValueError), match="out"):
                impl(*_to(args, device), out.to(device))
