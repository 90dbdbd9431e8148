"""The Triton kernels of packed weights, run by Triton's interpreter on CPU tensors.

``TRITON_INTERPRET=1 pytest tests/triton/test_interpreter_lowbit.py``, a process of its own. The interpreter is slow, so
not every combination of grid, size, granularity and dtype is run, but every pair of them occurs.
"""

import os

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.grids import code_dtype
from qatkernels.ops._op import OPS
from qatkernels.testing.compare import assert_same_bits, assert_within, run_out
from qatkernels.testing.products import (
    GRID_IDS,
    GRIDS,
    Case,
    activations,
    cases,
    expected_linear,
    floored_cases,
    grouped_cases,
    replaced,
    scaled_weight,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
pytest.importorskip("triton")

from qatkernels.backends.triton import _library, _weight, lowbit_linear  # noqa: E402
from qatkernels.backends.triton._products import (  # noqa: E402
    CONFIGS,
    MAX_INTEGERS,
    MIN_TERMS,
    Config,
    choose,
    common_block,
    distinct,
    fitted,
)
from qatkernels.backends.triton._weight import BY_ROW, BY_TILE, ENOUGH_TERMS, whole_codes  # noqa: E402

OPERATIONS = ("lowbit_linear", "lowbit_linear_transposed")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def run(op, args):
    return run_out(op, IMPLS[f"{op}_out"]["triton"], args)[0]


def check(case, operations=OPERATIONS):
    for op in operations:
        args, expected, bound = case.call(op)
        actual = run(op, args)
        assert actual.dtype == case.x.dtype
        assert_within(actual, expected, bound, f"{op} {case.name}")


def turns(every, grid, count):
    """Return `count` elements, others for each grid."""
    every = list(every)
    return [every[(GRIDS.index(grid) * 5 + i * len(every) // count) % len(every)] for i in range(count)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(2, 3, 67), (2, 5000), (4, 0), (0, 9), (70,)])
def test_packing(bits, shape):
    for code_min in (0, -(1 << (bits - 1))) if shape == (70,) else (-128,):
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(code_min, code_min + (1 << bits), shape, generator=generator)
        codes = codes.to(code_dtype(code_min + (1 << bits) - 1))
        packed = run("pack", (codes, code_min, bits))
        assert_same_bits(packed, OPS["pack"].reference(codes, code_min, bits))
        assert_same_bits(run("unpack", (packed, code_min, bits, shape[-1])), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_sizes_and_granularities(grid):
    dtype = DTYPES[GRIDS.index(grid) % 3]
    for case in turns(cases(grid, dtype), grid, 1):
        check(case)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("group", [None, 32, 24], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("grid", [qk.grids.lsq(4), qk.grids.affine(4)], ids=lambda g: g.scheme)
def test_where_scales_enter(grid, group, act_bits):
    """Scales per row, per tile and per element, with and without zero points, whole and not."""
    zero = "any" if grid.has_zero_point else None
    weight = scaled_weight(grid, (20, 96), group, torch.bfloat16, zero)
    check(
        Case(f"{group}", weight, activations((3, 96), torch.bfloat16), torch.ones(20), None, act_bits), OPERATIONS[:1]
    )


@pytest.mark.parametrize("group", [None, 32, 24], ids=lambda g: f"group{g}")
def test_steps_without_an_exact_reciprocal(group):
    grid = qk.grids.Grid("seventh", 4, -7, 7, 7.0, 0.0, (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))
    weight = scaled_weight(grid, (20, 96), group)
    x = torch.eye(96)  # picks elements: the products are the weight itself, as dequantize gives it
    args = (x, weight.packed, weight.scale, None, None, None, weight.constants, grid.code_min, weight.bits, None)
    assert_same_bits(run("lowbit_linear", args), weight.dequantize().T.contiguous())


def test_beyond_a_tile():
    many = activations((70, 96), torch.bfloat16)
    check(Case("many", scaled_weight(qk.grids.seq(2), (70, 96)), many))
    check(Case("many", scaled_weight(qk.grids.lsq(3), (36, 96), 32), many, None, None, 8), OPERATIONS[:1])
    check(
        Case(
            "long", scaled_weight(qk.grids.affine(8), (33, 1100)), activations((2, 1100), torch.float16), torch.ones(33)
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [qk.grids.lsq(3), qk.grids.affine(4)], ids=lambda g: g.scheme)
def test_gradients_of_many_outputs(grid, dtype):
    """Enough terms for two parts of a float32 number, where the gradient has 16 bits."""
    zero = "any" if grid.has_zero_point else None
    weight = scaled_weight(grid, (ENOUGH_TERMS, 64), 32, torch.float32, zero)
    check(Case("many", weight, activations((3, 64), dtype)), OPERATIONS[1:])


@pytest.fixture
def products(monkeypatch):
    """The shapes of the library's products, which begin at two tokens and 256 terms, in the smallest slices."""
    monkeypatch.setattr(_library, "CODES_TOKENS", 1)
    monkeypatch.setattr(_library, "PARTS_TOKENS", 2)
    monkeypatch.setattr(_library, "GROUPS_TOKENS", 2)
    monkeypatch.setattr(_library, "ENOUGH_TERMS", 256)
    monkeypatch.setattr(_library, "SLICE_BYTES", 1)
    multiply, found = _library.library_product, []

    def recorded(x, w):
        found.append((x.dtype, *x.shape, w.shape[1]))
        return multiply(x, w)

    monkeypatch.setattr(_library, "library_product", recorded)
    return found


def zero_of(grid):
    return "any" if grid.has_zero_point else None


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_the_library_multiplies_codes(grid, products):
    """One scale for each row: floats, and integers of tokens; whole slices and odd rests."""
    dtype = DTYPES[GRIDS.index(grid) % 2 * 2]
    for rows, cols, act_bits in ((300, 67, None), (264, 72, 8), (5, 64, None)):
        products.clear()
        weight = scaled_weight(grid, (rows, cols), None, torch.bfloat16, zero_of(grid))
        bias = activations((rows,), torch.float32, seed=3) if cols % 2 else None
        check(Case("codes", weight, activations((3, cols), dtype), bias, None, act_bits), OPERATIONS[:1])
        of = torch.int8 if act_bits else dtype
        rest = [(of, 3, cols, rows - 256)] if rows > 256 else []
        assert products == [(of, 3, cols, min(rows, 256)), *rest]


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_the_library_multiplies_parts(grid, products):
    """Groups that tiles divide, and others."""
    (rows, cols, group), *_ = turns(
        [(9, 288, 32), (7, 345, 115), (6, 260, 5), (5, 272, 16), (260, 256, 128), (9, 256, 64)], grid, 1
    )
    weight = scaled_weight(grid, (rows, cols), group, torch.float16, zero_of(grid))
    bias = activations((rows,), torch.bfloat16, seed=3)
    check(Case("parts", weight, activations((3, cols), torch.bfloat16), bias), OPERATIONS[:1])
    slices = [256, 4] if rows == 260 else [rows]
    assert products == [(torch.bfloat16, 3, cols, length) for length in slices for _ in range(2)]
    if rows < 256:  # integers of tokens, which are exact in bfloat16
        dtype = (torch.float32, torch.float16)[GRIDS.index(grid) % 2]
        check(Case("parts of A8", weight, activations((2, cols), dtype), bias, None, 8), OPERATIONS[:1])
        assert products[2:] == [(torch.bfloat16, 2, cols, rows)] * 2


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_the_library_multiplies_transposed(grid, products):
    """In parts, by slices of columns. The rest of the columns has operands of a smaller width."""
    shapes = [(256, 64, 32), (259, 67, None), (257, 60, 20), (262, 260, None), (256, 64, None), (256, 288, 32)]
    (rows, cols, group), *_ = turns(shapes, grid, 1)
    weight = scaled_weight(grid, (rows, cols), group, torch.float32, zero_of(grid))
    check(Case("transposed", weight, activations((3, cols), torch.bfloat16)), OPERATIONS[1:])
    slices = [256, cols - 256] if cols > 256 else [cols]
    assert products == [(torch.bfloat16, 3, rows, length) for length in slices for _ in range(2)]


@pytest.mark.parametrize(
    ("dtype", "shape", "group", "act_bits"),
    [
        (torch.float32, (1024, 1024), 32, None), (torch.float16, (1024, 1024), 32, None),
        (torch.bfloat16, (512, 512), 32, None), (torch.bfloat16, (2, 1024, 1024), 32, None),
        (torch.bfloat16, (1024, 1020), None, 8), (torch.bfloat16, (1020, 1024), None, 8),
    ],
)  # fmt: skip
def test_what_the_library_does_not_multiply(dtype, shape, group, act_bits):
    """Float32 and float16 with parts, few terms, experts, and sizes that its product of integers does not take."""
    weight = scaled_weight(qk.grids.lsq(4), shape, group)
    offsets = torch.tensor([1, 2], dtype=torch.int32) if len(shape) == 3 else None
    w = _weight.Weight(
        weight.packed, weight.scale, None, offsets, weight.constants, weight.grid.code_min, 4, shape[-1]
    )  # fmt: skip
    assert lowbit_linear._plan(torch.device("cpu"), torch.int8 if act_bits else dtype, w, 4096).config is not None
    if not act_bits:
        assert lowbit_linear._plan_transposed(torch.device("cpu"), dtype, w, 4096).config is not None


@pytest.mark.parametrize("tokens", [256, 2048, 65536])
def test_slices_are_equal_and_within_memory(tokens):
    for length, size in ((8192, 57344), (8192, 114688), (28672, 16384), (4096, 8192), (1000, 10**6), (100, 10**9)):
        each = _library.slice_length(length, size, tokens)
        count = -(-length // each)
        assert each == length or each % _library.SLICE_UNIT == 0
        assert each * size <= _library.SLICE_BYTES or each <= _library.SLICE_UNIT
        most = 2 * each * size > _library.SLICE_BYTES or 2 * each * tokens >= _library.SLICE_RESULTS
        assert count == 1 or most, "fewer slices are enough"
        assert each - (length - (count - 1) * each) < _library.SLICE_UNIT * count, "the last one is as long"


@pytest.mark.parametrize("grid", GRIDS[::2], ids=GRID_IDS[::2])
def test_grouped(grid):
    for case in turns(grouped_cases(grid, DTYPES[(GRIDS.index(grid) + 1) % 3]), grid, 1):
        check(case, OPERATIONS[1:])
        args, expected, bound = case.call("lowbit_linear")
        y = run("lowbit_linear", args)
        assert_within(y, expected, bound, case.name)
        nobody = y[case.offsets[-1] :]
        assert_same_bits(nobody, torch.zeros_like(nobody), f"{case.name}: tokens of nobody")


def test_float64_and_empty_stacks_do_not_look_at_offsets(monkeypatch):
    """Looking would wait for the device."""
    ends = torch.tensor([3, 3, 9], dtype=torch.int32)
    calls = []
    for name, rows, cols, tokens in (("float64", 24, 40, 11), ("no token", 24, 40, 0), ("no input", 24, 0, 11)):
        weight = scaled_weight(qk.grids.lsq(4), (3, rows, cols), None)
        last = torch.tensor([0, 0, 0], dtype=torch.int32) if not tokens else ends
        for act_bits in (None, 8) if cols else (None,):
            calls.append(Case(name, weight, activations((tokens, cols), torch.float64), None, last, act_bits))
    prepared = [(case, op, case.call(op)) for case in calls for op in OPERATIONS[: 1 if case.act_bits else 2]]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the offsets were read"))
    for case, op, (args, expected, bound) in prepared:
        assert_within(run(op, args), expected, bound, f"{case.name} {op}")


def test_more_tiles_than_programs():
    weight, ends = scaled_weight(qk.grids.lsq(4), (3, 300, 200)), torch.tensor([17, 17, 40], dtype=torch.int32)
    x = activations((45, 200), torch.float32)
    assert _weight.processors(x.device) < 3 * 300 // 64, "one program for each tile"
    check(Case("", weight, x, None, ends))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_stays_in_its_token(act_bits, bad):
    weight, x = scaled_weight(qk.grids.lsq(4), (9, 70)), activations((3, 70), torch.float32)
    x[1] = 0.0
    expected, bound = expected_linear(x, weight, act_bits=act_bits)
    x[0, 5] = bad
    y = run("lowbit_linear", Case("", weight, x, act_bits=act_bits).call("lowbit_linear")[0])
    assert not y[0].isfinite().any()
    assert act_bits is None or y[0].isnan().all()
    assert_within(y[1:], expected[1:], bound[1:])
    assert (y[1] == 0).all()


@pytest.mark.parametrize("grid", [qk.grids.seq(2), qk.grids.affine(4)], ids=lambda g: g.scheme)
def test_a_scale_below_the_floor_acts_as_the_floor(grid):
    for case in turns(floored_cases(grid, torch.bfloat16), grid, 3):
        check(case)


@pytest.mark.parametrize("grid", [qk.grids.lsq(8), qk.grids.affine(8), qk.grids.binary()], ids=lambda g: g.scheme)
def test_extremes_of_integer_sums(grid):
    """Every product is the largest of its sign. With groups, as with rows that are too long, tiles are summed."""
    for group_size, value in ((None, grid.code_min), (500, grid.code_max)):
        w = (torch.full((3, 1000), float(value)) + grid.offset) / grid.steps
        scale = torch.ones(3) if group_size is None else torch.ones(3, 2)
        weight = qk.PackedWeight.from_float(w, scale, grid, group_size)
        check(Case(f"{value}", weight, torch.full((2, 1000), -1.0), act_bits=8), OPERATIONS[:1])


def test_integer_sums_that_would_overflow_are_summed_by_tile():
    x = torch.zeros(2, 1)
    for cols, scales in ((MAX_INTEGERS, BY_ROW), (MAX_INTEGERS + 1, BY_TILE)):
        weight = scaled_weight(qk.grids.lsq(8), (1, cols))
        args = (weight.packed, weight.scale, None, None, weight.constants, weight.grid.code_min, 8, cols)
        assert lowbit_linear._plan(x.device, torch.int8, _weight.Weight(*args), 2)[1] == scales


def test_views_leading_dimensions_and_nothing():
    base, weight = activations((6, 80), torch.float32), scaled_weight(qk.grids.lsq(3), (5, 40))
    inputs = {
        "vector": base[0, :40], "three": base[:, :40].reshape(2, 3, 40), "columns apart": base[:, ::2],
        "repeated": base[:1, :40].expand(6, 40), "no token": base[:0, :40],
    }  # fmt: skip
    for name, x in inputs.items():
        check(Case(name, weight, x, base[0, ::2][:5]), OPERATIONS[:1])
    strided = replaced(weight, packed=weight.packed.t().contiguous().t())
    check(Case("strided weight", strided, base[:, :40].double()))
    check(Case("strided weight", strided, base[:, :40]))
    for rows, cols in ((0, 40), (5, 0)):
        check(Case(f"{rows}x{cols}", scaled_weight(qk.grids.lsq(3), (rows, cols)), base[:, :cols], torch.ones(rows)))


@pytest.mark.parametrize(("op", "shape"), [("lowbit_linear", (9, 1000)), ("lowbit_linear_transposed", (600, 24))])
def test_parts_of_sums_repeat_their_bits(op, shape):
    outputs, terms = min(shape), max(shape)
    config = choose(CONFIGS[-1].capability, "parts", 3)
    assert fitted(config, 3, outputs, terms, MIN_TERMS).split > 1, "the sum is not split"
    case = Case("", scaled_weight(qk.grids.lsq(4), shape), activations((3, shape[1]), torch.float32))
    args = case.call(op)[0]
    assert_same_bits(run(op, args), run(op, args))
    check(case, [op])


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("kind", ["rows", "groups", "parts", "ieee"])
def test_choice(capability, kind):
    for tokens in (1, 16, 17, 64, 65, 10**6):
        config = choose(capability, kind, tokens)
        assert config.kind == kind
        assert tokens <= config.tokens
        assert config.capability <= max(capability, (8, 0))
        newer = [c for c in CONFIGS if c.kind == kind and config.capability < c.capability <= capability]
        assert not newer, "a newer row fits"
        assert capability < (10, 0) or kind != "ieee" or config.block_m < 64, "Triton would take it for TF32"


def test_fitting():
    config = Config((9, 0), "groups", 16, 16, 32, 128, 4, 4, 16)
    assert fitted(config, 1, 16384, 4096, 16).split == 1  # enough columns
    assert fitted(config, 1, 4096, 4096, 16).split == 2
    assert fitted(config, 1, 1024, 4096, 16).split == 8
    assert fitted(config, 1, 32, 256, 16).split == 1  # too few terms
    assert fitted(config, 1, 5, 20, 16).block_n == 16
    assert fitted(config, 1, 5, 20, 16).block_k == 32
    assert fitted(config, 1, 5, 20, 32).block_k == 32
    assert [common_block(64, size, 16) for size in (128, 96, 64, 16, 24)] == [64, 32, 64, 16, None]
    every = [fitted(choose((9, 0), "rows", t), t, 512, 2048, 16) for t in range(1, 40000, 7)]
    few = distinct(lambda t: fitted(choose((9, 0), "rows", t), t, 512, 2048, 16))
    assert {fitted(choose((9, 0), "rows", t), t, 512, 2048, 16) for t in few} >= set(every)
    assert len(few) < 12


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
@pytest.mark.parametrize("zero", [False, True])
def test_operands_are_exact(grid, zero):
    shift, stored = grid.code_min + grid.offset, torch.arange(2**grid.storage_bits).double()
    for dtype in (torch.int8, torch.bfloat16, torch.float16):
        factor, add, sums = whole_codes(shift, grid.storage_bits, zero, dtype == torch.int8)
        operands = factor * stored + add
        assert torch.equal(operands.to(dtype).double(), operands)
        assert sums or torch.equal(operands, factor * (stored + shift))
        assert sums or not zero
