"""Packing: exact, the layout that it says, and a packed weight that is the fake-quantized one bit for bit."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import qatkernels as qk
from qatkernels.dtypes import dtype_name
from qatkernels.grids import MIN_SCALE, code_dtype
from qatkernels.ops._op import OPS
from qatkernels.ops.contract import FLOATS
from qatkernels.ops.packing import SCALES, row_bytes, store_scale
from qatkernels.testing.compare import assert_same_bits, run_out
from qatkernels.testing.products import GRID_IDS, GRIDS, scaled_weight
from tests.implementations import implementations

#: The widths that are named by the schemes, each with the bits that it is stored in.
WIDTHS = {1: 1, 1.58: 2, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 8: 8}


def random_codes(grid, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.code_min, grid.code_max + 1, shape, generator=generator).to(grid.code_dtype)


def packed_by_definition(codes, code_min, bits):
    """The string of bits of the docstring, written with Python's integers."""
    rows = []
    for row in codes.flatten(0, -2).tolist() if codes.ndim > 1 else [codes.tolist()]:
        string = sum((code - code_min) << (k * bits) for k, code in enumerate(row))
        rows.append(list(string.to_bytes(row_bytes(len(row), bits), "little")))
    return torch.tensor(rows, dtype=torch.uint8).reshape(*codes.shape[:-1], row_bytes(codes.shape[-1], bits))


def every(op):
    """Every `_out` implementation that runs here, the reference included, with its device."""
    reference = ("reference", lambda *args: args[-1].copy_(OPS[op].reference(*args[:-1])), torch.device("cpu"))
    return [reference, *implementations(op)]


def check_packing(codes, grid, packed):
    """Check every implementation of pack, and of unpack from bytes with a stride."""
    layout = (grid.code_min, grid.storage_bits)
    for backend, impl, device in every("pack"):
        assert_same_bits(run_out("pack", impl, (codes.to(device), *layout))[0].cpu(), packed, backend)
    for backend, impl, device in every("unpack"):
        for source in (packed.to(device), torch.stack([packed, packed], -1).to(device)[..., 0]):
            actual = run_out("unpack", impl, (source, *layout, codes.shape[-1]))[0]
            assert_same_bits(actual.cpu(), codes.contiguous(), backend)


@pytest.mark.parametrize(("bits", "stored"), WIDTHS.items())
def test_bits_stored(bits, stored):
    grid = qk.grids.paretoq(bits)
    assert grid.storage_bits == stored
    assert qk.pack(random_codes(grid, (3, 40)), grid).shape == (3, 5 * stored)


def test_worked_example():
    """The one of docs/packing.md."""
    codes = torch.tensor([[-4, -3, 3, 0, 1]], dtype=torch.int8)
    assert qk.pack(codes, qk.grids.lsq(3)).tolist() == [[0b11_001_000, 0b0_101_100_1]]
    assert qk.pack(torch.tensor([[-1, 0, 1, 1, -1]], dtype=torch.int8), qk.grids.ternary()).tolist() == [
        [0b10_10_01_00, 0]
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.integers(1, 8))
    # What fits int8, or uint8 from 0 on.
    code_min = data.draw(st.one_of(st.just(0), st.integers(-128, min(0, 128 - (1 << bits)))))
    leading = data.draw(st.lists(st.integers(0, 4), max_size=2))
    cols = data.draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    codes = torch.randint(code_min, code_min + (1 << bits), (*leading, cols), generator=generator)
    codes = codes.to(code_dtype(code_min + (1 << bits) - 1))
    packed = torch.ops.qatkernels.pack(codes, code_min, bits)
    assert_same_bits(packed, packed_by_definition(codes, code_min, bits))
    assert_same_bits(torch.ops.qatkernels.unpack(packed, code_min, bits, cols), codes)


@pytest.mark.backends
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_every_implementation(grid):
    for shape in ((1, 1), (3, 7), (2, 8), (2, 3, 64), (5, 129), (4, 1000), (2, 0), (0, 9), (70,)):
        codes = random_codes(grid, shape)
        check_packing(codes, grid, packed_by_definition(codes, grid.code_min, grid.storage_bits))


@pytest.mark.backends
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_views(bits):
    grid = qk.grids.paretoq(bits)
    codes = random_codes(grid, (24, 24))
    for view in (codes.t(), codes[:, ::2], codes[:1].expand(5, 24), codes[3:, 5:]):
        check_packing(view, grid, packed_by_definition(view, grid.code_min, grid.storage_bits))


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_any_bytes_unpack(grid):
    """Bytes that no code gave neither crash nor leave the range of the width."""
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    cols = 128 * 8 // grid.storage_bits
    codes = qk.unpack(packed, grid, cols).int() - grid.code_min
    assert (codes >= 0).all()
    assert (codes < 1 << grid.storage_bits).all()


def test_opcheck():
    codes = random_codes(qk.grids.lsq(3), (4, 9))
    packed = qk.pack(codes, qk.grids.lsq(3))
    opcheck(torch.ops.qatkernels.pack.default, (codes, -4, 3))
    opcheck(torch.ops.qatkernels.unpack.default, (packed, -4, 3, 9))


def test_bad_codes_and_bytes():
    grid = qk.grids.lsq(3)
    for codes, error, message in (
        (torch.tensor([[4]], dtype=torch.int8), ValueError, "codes are 4 to 4, must be -4 to 3"),
        (torch.tensor([[-5, 0]], dtype=torch.int8), ValueError, "codes are -5 to 0"),
        (torch.tensor([[0]]), RuntimeError, "codes is torch.int64"),
        (torch.tensor(0, dtype=torch.int8), RuntimeError, r"codes has shape \(\), must be \(..., K\)"),
    ):
        with pytest.raises(error, match=message):
            qk.pack(codes, grid)
    for packed, cols, message in (
        (torch.zeros(2, 3, dtype=torch.int8), 8, "packed is torch.int8"),
        (torch.zeros(2, 3, dtype=torch.uint8), 9, r"packed has shape \(2, 3\), must be \(..., 4\)"),
        (torch.tensor(0, dtype=torch.uint8), 1, "packed has shape"),
        (torch.zeros(2, 0, dtype=torch.uint8), -1, "cols is -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            qk.unpack(packed, grid, cols)
    codes = torch.zeros(2, 3, dtype=torch.int8)
    for code_min, bits, message in (
        (0, 0, "bits is 0"),
        (0, 9, "bits is 9"),
        (1, 2, "code_min is 1"),
        (-1, 8, "code_min is -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qatkernels.pack(codes, code_min, bits)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_dequantize_is_fake_quantize(grid, dtype):
    """Bit for bit, offsets of a half and zero points that are no integers included."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 96), (2, 3, 96), (1, 1), (4, 7)):
        w = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for group in (None, *(g for g in (32, 16, 48, 1, 7) if shape[-1] % g == 0)):
            for per_tensor in (False, True) if group is None else (False,):
                scale = (grid.init_scale(w, group, per_tensor=per_tensor) * 0.6).float()
                zeros = [None]
                if grid.has_zero_point:
                    exact = grid.init_zero_point(w.float(), scale, group)
                    zeros += [exact, exact + torch.rand(exact.shape, generator=generator) - 0.5]
                for zero in zeros:
                    packed = qk.PackedWeight.from_float(w, scale, grid, group, zero_point=zero)
                    wanted = qk.fake_quantize(w.float(), scale, grid, group_size=group, zero_point=zero)
                    assert_same_bits(packed.dequantize(), wanted)
                    if dtype != torch.float64:
                        wanted = qk.fake_quantize(w, scale, grid, group_size=group, zero_point=zero)
                        assert_same_bits(packed.dequantize(dtype), wanted)
                    assert packed.shape == w.shape
                    assert packed.group_size == (group or shape[-1])
                    assert packed.bits == grid.storage_bits


@pytest.mark.parametrize("dtype", SCALES, ids=dtype_name)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
def test_scale_dtypes(grid, dtype):
    """The codes are those of the scale as given; values are those of the scale as stored."""
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = grid.init_scale(w, 32)
    packed = qk.PackedWeight.from_float(w, scale, grid, 32, scale_dtype=dtype)
    codes = qk.quantize(w, scale, grid, group_size=32)
    assert packed.scale.dtype == dtype
    assert_same_bits(packed.codes(), codes)
    assert_same_bits(packed.scale, scale.to(dtype))
    assert_same_bits(packed.dequantize(), qk.dequantize(codes, scale.to(dtype).float(), grid, group_size=32))
    assert packed.nbytes == 6 * row_bytes(64, grid.storage_bits) + 6 * 2 * dtype.itemsize


def test_no_stored_scale_is_below_the_floor():
    """A kernel may take scales as they are."""
    for dtype in SCALES:
        small = store_scale(torch.tensor([0.0, -3.0, 1e-30, MIN_SCALE]), dtype)
        assert (small.double() >= torch.tensor(MIN_SCALE, dtype=torch.float32).double()).all()
        assert small.unique().numel() == 1
    w, scale = torch.full((2, 8), 1e-6), torch.tensor([1e-7, -1.0])
    packed = qk.PackedWeight.from_float(w, scale, qk.grids.lsq(4))
    assert_same_bits(packed.dequantize(), qk.fake_quantize(w, scale, qk.grids.lsq(4)))


def test_bad_weights():
    w, scale, grid = torch.randn(4, 16), torch.ones(4), qk.grids.lsq(4)
    make = qk.PackedWeight.from_float
    good = make(w, scale, grid)
    for message, call in {
        "w has shape": lambda: make(w[0], scale[:1], grid),
        "group_size is 5": lambda: make(w, torch.ones(4, 3), grid, 5),
        "group_size is 0": lambda: make(w, torch.ones(4, 3), grid, 0),
        "scale has shape": lambda: make(w, torch.ones(5), grid),
        "zero_point is given": lambda: make(w, scale, grid, zero_point=scale),
        "scale_dtype is torch.float64": lambda: make(w, scale, grid, scale_dtype=torch.float64),
        "must be finite in torch.float16": lambda: make(w, scale * 1e6, grid, scale_dtype=torch.float16),
        "must be finite in torch.float32": lambda: make(w, scale * torch.nan, grid),
        "packed is torch.uint8 of shape": lambda: qk.PackedWeight(good.packed[:3], good.scale, None, grid, 16),
        "for 32 columns": lambda: qk.PackedWeight(good.packed, good.scale, None, grid, 32),
        "scale is torch.float64": lambda: qk.PackedWeight(good.packed, good.scale.double(), None, grid, 16),
        "scale has 3 columns": lambda: qk.PackedWeight(good.packed, good.scale.expand(4, 3), None, grid, 16),
        "zero_point is torch.float64": lambda: qk.PackedWeight(
            good.packed, good.scale, good.scale.double(), qk.grids.affine(4), 16
        ),
        "cols is -1, must be at least 0": lambda: qk.PackedWeight(good.packed[:, :0], good.scale, None, grid, -1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_arguments_of_another_kind():
    w, scale, grid = torch.randn(4, 16), torch.ones(4), qk.grids.lsq(4)
    make = qk.PackedWeight.from_float
    for message, call in {
        "w is 3, must be a tensor": lambda: make(3, scale, grid),
        "scale is 0.3, must be a tensor": lambda: make(w, 0.3, grid),
        "zero_point is 8, must be a tensor": lambda: make(w, scale, qk.grids.affine(4), zero_point=8),
        "grid is 4, must be a Grid": lambda: make(w, scale, 4),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_what_has_no_code_is_an_error(grid, dtype):
    """NaN would become code 0, an ordinary level. Infinite weights saturate, as in fake_quantize."""
    w, scale = torch.randn(4, 16).to(dtype), torch.ones(4)
    bad = w.clone()
    bad[1, 3] = bad[2, 0] = torch.nan
    with pytest.raises(ValueError, match="w has NaN in 2 of 64 elements"):
        qk.PackedWeight.from_float(bad, scale, grid)
    infinite = w.clone()
    infinite[0, 0], infinite[1, 0] = torch.inf, -torch.inf
    wanted = qk.fake_quantize(infinite.float(), scale, grid)
    assert_same_bits(qk.PackedWeight.from_float(infinite, scale, grid).dequantize(), wanted)
    for value in (torch.nan, torch.inf, -torch.inf) if grid.has_zero_point else ():
        zero = torch.zeros(4)
        zero[2] = value
        with pytest.raises(ValueError, match=f"zero_point has an element {value}, must be finite"):
            qk.PackedWeight.from_float(w, scale, grid, zero_point=zero)


def test_values_that_cannot_be_looked_at():
    """On the meta device and while tracing, shapes are all there is."""
    grid = qk.grids.affine(4)

    def make(w, scale, zero):
        return qk.PackedWeight.from_float(w, scale, grid, zero_point=zero)

    args = (torch.randn(4, 16), torch.ones(4), torch.full((4,), 7.0))
    assert make(*(t.to("meta") for t in args)).shape == (4, 16)
    with FakeTensorMode() as mode:
        assert make(*(mode.from_tensor(t) for t in args)).shape == (4, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: make(*args).packed, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*args), make(*args).packed)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)], ids=str)
def test_empty_weights(shape):
    packed = scaled_weight(qk.grids.lsq(4), shape)
    assert packed.shape == shape
    assert packed.dequantize().shape == shape


def test_copies_and_devices():
    weight = scaled_weight(qk.grids.affine(3), (5, 24), 8, torch.bfloat16, "any")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert_same_bits(other.dequantize(), weight.dequantize())
        assert other.grid == weight.grid
    moved = weight.to("meta")
    assert moved.device.type == "meta"
    assert (moved.shape, moved.nbytes) == (weight.shape, weight.nbytes)
    assert weight != moved
    assert weight in {weight}
