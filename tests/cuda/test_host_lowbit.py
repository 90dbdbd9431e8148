"""The decode kernel for packed weights, run on the CPU thread by thread."""

import ctypes
import mmap
import shutil

import pytest
import torch

import qatkernels as qk
from qatkernels import backends
from qatkernels.ops._op import OPS
from qatkernels.testing.compare import assert_same_bits, assert_within, run_out
from tests.choices import choice

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from qatkernels.testing.decode import GRIDS, make, reference
from tests.cuda import on_host

#: Codes that are whole in bytes, that are not, and both sizes of code.
SOME = (qk.grids.binary(), qk.grids.ternary(), qk.grids.lsq(3), qk.grids.affine(4), qk.grids.lsq(8))
#: Of the widths whose calls with 16-bit x have a kernel of their own (csrc/cuda/lowbit_gemv16.cu).
DIRECT = (
    qk.grids.binary(), qk.grids.ternary(), qk.grids.seq(2), qk.grids.lsq(2), qk.grids.affine(2),
    qk.grids.seq(4), qk.grids.lsq(4), qk.grids.affine(4),
)  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)


def name(grid):
    return f"{grid.scheme}{grid.bits}"


@pytest.fixture(autouse=True)
def device():
    """Two multiprocessors with the shared memory of Hopper; threads in their usual order."""
    on_host.set_device(2, 227)
    yield
    on_host.set_device(2, 227)
    on_host.set_reversed(False)


def run(args):
    (y,) = run_out("lowbit_linear", on_host.lowbit_linear, args)
    return y


def check(args, what=""):
    assert on_host.lowbit_serves(*args)
    y = run(args)
    assert_within(y, *reference(args), what)
    return y


def replaced(args, **changes):
    names = ("x", "packed", "scale", "zero_point", "bias")
    return tuple(changes.get(name, a) for name, a in zip(names, args[:5], strict=True)) + args[5:]


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_grids(grid, act_bits):
    check(make(grid, 1, 40, 600, act_bits=act_bits))
    check(make(grid, 2, 21, 640, 32, dtype=torch.float32, act_bits=act_bits), "groups of 32")
    check(make(grid, 3, 17, 768, 128, dtype=torch.float16, act_bits=act_bits), "groups of 128")


@pytest.mark.parametrize("cols", [1, 5, 31, 40, 129, 520, 1001])
@pytest.mark.parametrize("grid", [*SOME, qk.grids.lsq(5), qk.grids.lsq(7)], ids=name)
def test_columns(grid, cols):
    """Rows that end anywhere in a byte, a word, 16 bytes, a stage."""
    check(make(grid, 1, 18, cols))


@pytest.mark.parametrize("group_size", [1, 8, 10, 16, 24, 32, 40, 48, 64, 96, 192, 256, 320, 480, 960])
@pytest.mark.parametrize("grid", [*SOME, qk.grids.seq(2), qk.grids.lsq(6)], ids=name)
def test_group_sizes(grid, group_size):
    """Every divisor: groups of whole granules, groups of whole lanes of a granule, and all others."""
    cols = 1920 if 1920 % (2 * group_size) == 0 else 2 * group_size
    act_bits = 8 if group_size % 3 else None
    check(make(grid, 1, 5, cols, group_size, dtype=torch.float32, act_bits=act_bits))


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("act_bits", [None, 4])
def test_tokens(tokens, act_bits):
    """Up to three tiles of activation rows in a pass, and several passes."""
    for grid, group_size in (
        (qk.grids.lsq(4), None),
        (qk.grids.binary(), 32),
        (qk.grids.lsq(5), 128),
        (qk.grids.ternary(), 20),
    ):
        check(make(grid, tokens, 9, 640, group_size, act_bits=act_bits, bias=torch.float32), name(grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Of x, scales and bias, in any combination, by each of the two kernels."""
    for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, torch.float32, torch.bfloat16, torch.float16):
            for group_size in (64, 15):
                check(make(qk.grids.affine(4), 2, 11, 960, group_size, dtype, scale_dtype=scale_dtype, bias=bias))


@pytest.mark.parametrize("grid", SOME, ids=name)
def test_long_rows(grid):
    """Warps that share rows, and rounds of rows."""
    for rows, cols in ((70, 8192), (20, 30001)):
        check(make(grid, 1, rows, cols, act_bits=8))
        check(make(grid, 1, rows, cols, None if cols % 2 else 512, dtype=torch.float32))


@pytest.mark.parametrize("grid", SOME, ids=name)
@pytest.mark.parametrize(("multiprocessors", "shared"), [(1, 99), (7, 99), (5, 128)])
def test_little_shared_memory(grid, multiprocessors, shared):
    """K is cut into chunks, which another kernel adds.

    The smallest shared memory of a device holds one tile of activation rows.
    """
    on_host.set_device(multiprocessors, shared)
    for tokens, group_size in ((1, None), (2, 128), (1, 32), (8, None)):
        check(make(grid, tokens, 37, 4096, group_size, dtype=torch.float16, bias=torch.float16))
        check(make(grid, tokens, 37, 4096, group_size, act_bits=8))


@pytest.mark.parametrize("grid", SOME, ids=name)
@pytest.mark.parametrize("cols", [512, 544, 333])
def test_order_and_alignment_do_not_matter(grid, cols):
    args = make(grid, 2, 19, cols, dtype=torch.float32)
    expected = run(args)
    x, packed = args[:2]
    for offset in (1, 4, 8):
        moved = torch.empty(packed.numel() + offset, dtype=torch.uint8)[offset:].view(packed.shape).copy_(packed)
        assert_same_bits(run(replaced(args, packed=moved)), expected)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert_same_bits(run(replaced(args, x=shifted)), expected)
    on_host.set_reversed(True)
    assert_same_bits(run(args), expected)
    on_host.set_device(5, 227)
    assert_same_bits(run(args), expected)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits < 8], ids=name)
def test_integers_are_exact(grid):
    """Sums of integers have no error until they are scaled."""
    x, packed, scale, zero, *rest = make(grid, 2, 40, 1500, dtype=torch.float32)
    x = (x * 20).round().clamp(-127, 127)
    x[:, 7] = 127
    scale = torch.ones_like(scale)
    zero = None if zero is None else zero.round()
    for act_bits in (None, 8):
        args = (x, packed, scale, zero, *rest[:-1], act_bits)
        if grid.scheme == "ternary":  # two thirds are not exact
            check(args)
            continue
        y, _ = reference(args)
        assert_same_bits(run(args), y.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes(dtype):
    """Tokens of zeros, of tiny and of huge numbers, and with one number far above the others."""
    args = make(qk.grids.lsq(4), 6, 18, 512, 64, dtype)
    x = args[0].clone()
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e30
    x[3, 5] = 3e5
    x[4] *= 1e-40
    x[5, 1:] = 0
    for act_bits in (None, 8):
        changed = (*replaced(args, x=x)[:-1], act_bits)
        y = run(changed)
        expected, bound = reference(changed)
        bound[4] = 1e-37  # subnormal, of which half is lost
        assert_within(y, expected, bound)
        assert bool((y[0] == 0).all())


@pytest.mark.parametrize("grid", SOME, ids=name)
def test_nan_and_infinities(grid):
    args = make(grid, 4, 18, 200, dtype=torch.float32)
    clean = run(args)
    x = args[0].clone()
    x[0, 3], x[1, 9], x[2, 199] = torch.nan, torch.inf, -torch.inf
    y = run(replaced(args, x=x))
    assert bool(y[0].isnan().all())
    assert_same_bits(y[3], clean[3])
    # One infinity times what is not 0 has a sign, times 0 is NaN: as the reference.
    w = torch.ops.qatkernels.lowbit_linear(torch.eye(200), *args[1:])
    for token, column in ((1, 9), (2, 199)):
        assert_same_bits(y[token], x[token, column] * w[column])
    y = run((*replaced(args, x=x)[:-1], 8))
    assert bool(y[:3].isnan().all())
    assert not bool(y[3].isnan().any())
    scale = args[2].clone()
    scale[4] = torch.nan
    y = run(replaced(args, scale=scale))
    assert y.isnan().sum() == 4


@pytest.mark.parametrize("grid", SOME, ids=name)
def test_a_scale_below_the_floor_acts_as_the_floor(grid):
    for group_size, scale_dtype in ((None, torch.float32), (32, torch.bfloat16), (20, torch.float16)):
        args = make(grid, 2, 18, 640, group_size, dtype=torch.float32, scale_dtype=scale_dtype)
        scale = args[2].clone()
        scale[::4], scale[1::4], scale[2::4] = 0.0, -3.0, 1e-6
        check(replaced(args, scale=scale))


def granule(grid):
    """Return the smallest size of a group that the kernel for 16-bit x takes."""
    return 128 // grid.storage_bits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", DIRECT, ids=name)
def test_direct_grids(grid, dtype):
    """Groups of one granule and of several, that end within a stage and beyond it; bias and scales of any dtype."""
    cols = 24 * granule(grid)
    check(make(grid, 1, 40, cols - 7, dtype=dtype))
    for tokens, granules in ((1, 1), (2, 2), (3, 3), (5, 4), (8, 8), (4, 12)):
        size = granules * granule(grid)
        for scale_dtype, bias in ((torch.float32, None), (dtype, dtype), (torch.float16, torch.float32)):
            args = make(grid, tokens, 21, cols, size, dtype, scale_dtype=scale_dtype, bias=bias)
            assert on_host.lowbit_workspace(*args) == 0
            check(args, f"groups of {size}, scales of {scale_dtype}, bias {bias}")
    # Any other constant of the grid needs sums of x, as zero points do.
    args = make(grid, 3, 21, cols, granule(grid), dtype)
    check((*args[:6], [*args[6][:2], 0.3, *args[6][3:]], *args[7:]), "another offset")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_direct_tokens(tokens, dtype):
    for grid in (qk.grids.binary(), qk.grids.affine(2), qk.grids.lsq(4)):
        check(make(grid, tokens, 35, 1337, dtype=dtype, bias=dtype), name(grid))
        check(make(grid, tokens, 17, 1536, 256, dtype=dtype), f"{name(grid)} in groups")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", DIRECT, ids=name)
def test_direct_chunks(grid, dtype):
    """K is cut, in groups and within groups, with several warps that share rows."""
    for multiprocessors, shared, tokens, cols in ((1, 99, 8, 5000), (5, 99, 3, 12288), (7, 128, 8, 12288)):
        on_host.set_device(multiprocessors, shared)
        for group_size in (None, 768) if cols % 768 == 0 else (None,):
            args = make(grid, tokens, 37, cols, group_size, dtype, bias=torch.float32)
            assert on_host.lowbit_workspace(*args) % (4 * tokens * 37) == 0 < on_host.lowbit_workspace(*args)
            check(args, f"{tokens} tokens, {shared} KiB, groups of {group_size}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cols", [512, 520, 544, 333])
@pytest.mark.parametrize("grid", DIRECT[::2], ids=name)
def test_direct_alignment_does_not_matter(grid, cols, dtype):
    """Of x and of the weight. Neither does the order of threads, nor the number of multiprocessors."""
    args = make(grid, 3, 35, cols, dtype=dtype)
    expected = check(args)
    x, packed = args[:2]
    for offset in (1, 4, 8):
        moved = torch.empty(packed.numel() + offset, dtype=torch.uint8)[offset:].view(packed.shape).copy_(packed)
        assert_same_bits(run(replaced(args, packed=moved)), expected)
        shifted = torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x)
        assert_same_bits(run(replaced(args, x=shifted)), expected)
    on_host.set_reversed(True)
    assert_same_bits(run(args), expected)
    on_host.set_device(5, 227)
    assert_same_bits(run(args), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", [g for g in DIRECT if g.scheme != "ternary"], ids=name)
def test_direct_sums_of_integers_are_exact(grid, dtype):
    x, packed, scale, zero, *rest = make(grid, 5, 40, 1500, dtype=dtype)
    zero = None if zero is None else zero.round()
    args = (x.round().clamp(-4, 4), packed, torch.ones_like(scale), zero, *rest)
    y, _ = reference(args)
    # Binary sums are halves, and 0 has no sign that is worth a bound.
    assert_same_bits(run(args) + 0.0, y.float().to(dtype) + 0.0)


@pytest.mark.parametrize("grid", DIRECT, ids=name)
def test_direct_sums_of_one_sign(grid):
    """Tensor cores round sums towards zero. Where all products have the same sign, these errors add up."""
    for tokens, cols, group_size in ((1, 30000, None), (2, 16384, 512)):
        args = make(grid, tokens, 17, cols, group_size, torch.float16)
        top = torch.full_like(args[1], 0xFF if grid.scheme != "ternary" else 0b10101010)
        check(replaced(args, x=args[0].abs() * 2**-8, packed=top))


def test_direct_magnitudes():
    """Tokens of subnormal numbers, of zeros, and of the largest numbers."""
    for grid, dtype in ((g, d) for g in (qk.grids.lsq(4), qk.grids.affine(2)) for d in HALVES):
        args, info = make(grid, 4, 18, 512, 64, dtype), torch.finfo(dtype)
        x = torch.sign(args[0]) * info.tiny * torch.rand(args[0].shape)
        x[1], x[2] = 0, torch.sign(args[0][2]) * info.max * 2.0**-20
        x[3] = args[0][3]
        changed = replaced(args, x=x.to(dtype))
        expected, bound = reference(changed)
        bound[0] = bound[0] + 2.0**-149 * 512
        assert_within(run(changed), expected, bound, f"{name(grid)} {dtype}")


@pytest.mark.parametrize("shared", [99, 227])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grid", DIRECT, ids=name)
def test_direct_nan_and_infinities(grid, dtype, shared):
    """One infinity times what is not 0 has a sign, times 0 it is NaN: as the reference. Other tokens are unchanged."""
    on_host.set_device(2, shared)
    args = make(grid, 8, 35, 5000, dtype=dtype)
    if args[3] is not None:
        args = replaced(args, zero_point=args[3].round())  # some weights are 0
    clean, x = run(args), args[0].clone()
    x[0, 3], x[1, 9], x[2, 4999], x[4, 2600], x[4, 2], x[6, 31] = (
        torch.nan, torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf,
    )  # fmt: skip
    y = run(replaced(args, x=x))
    assert bool(y[[0, 4]].isnan().all())
    for token in (3, 5, 7):
        assert_same_bits(y[token], clean[token])
    codes = torch.ops.qatkernels.unpack(args[1], args[7], args[8], 5000).double()
    w = codes + args[6][2] - (0 if args[3] is None else args[3].double())
    for token, column in ((1, 9), (2, 4999), (6, 31)):
        assert_same_bits(y[token], (x[token, column].double() * w[:, column]).to(dtype))


def at_the_end_of_memory(t):
    """Return a copy that ends at the end of a mapping, so that reading beyond it crashes."""
    size = (t.nbytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes)
    return flat.view(t.shape).copy_(t)


@pytest.mark.parametrize("grid", [*SOME, qk.grids.lsq(6)], ids=name)
def test_nothing_beyond_the_inputs_is_read(grid):
    for cols, group_size in ((77, None), (96, None), (640, 64), (100, 10)):
        args = make(grid, 3, 7, cols, group_size, bias=torch.float32)
        ended = tuple(at_the_end_of_memory(a) if isinstance(a, torch.Tensor) else a for a in args[:5])
        assert_same_bits(run((*ended, *args[5:])), run(args))


def test_which_calls_multiply_x_as_it_is():
    """Those of the kernel for 16-bit x need no workspace for integers."""

    def needs(grid, group_size=None, **settings):
        return on_host.lowbit_workspace(*make(grid, 1, 8, 256, group_size, **settings)) > 0

    for grid in GRIDS:
        assert needs(grid) == (grid.storage_bits not in (1, 2, 4))
        assert needs(grid, act_bits=8)
        assert needs(grid, dtype=torch.float32)
    for grid in DIRECT:
        assert not needs(grid, granule(grid), dtype=torch.float16)
        assert needs(grid, granule(grid) // 2)


def test_what_is_served():
    args = make(qk.grids.lsq(4), 1, 8, 64)
    x = args[0]
    assert not on_host.lowbit_serves(*replaced(args, x=x.double()))
    assert not on_host.lowbit_serves(*replaced(args, x=x.expand(9, 64).contiguous()))
    assert not on_host.lowbit_serves(*args[:5], torch.tensor([1], dtype=torch.int32), *args[6:])
    assert not on_host.lowbit_serves(*replaced(args, bias=torch.ones(8, dtype=torch.float64)))
    assert run(replaced(args, x=x[:0])).shape == (0, 8)


@pytest.mark.skipif("cpp" in backends.MISSING, reason="the extension makes the choice")
def test_what_is_not_served_goes_to_the_reference(monkeypatch):
    """A build with CUDA and without Triton: more tokens, float64 and experts are products too."""
    op, served = OPS["lowbit_linear"], []

    def kernel(*args):
        served.append(len(args[0]))
        on_host.lowbit_linear(*args)

    monkeypatch.setitem(backends.IMPLS["lowbit_linear_out"], "triton", kernel)
    monkeypatch.setitem(backends.CONDITIONS, "lowbit_linear", {"triton": on_host.lowbit_serves})
    linear = choice(op, "lowbit_linear_out", [backends.Stage("triton", None, True), backends.Stage("reference")])
    args = make(qk.grids.affine(4), 9, 24, 64, 32, torch.float32, bias=torch.float32)
    for x in (args[0][:8], args[0], args[0].double()):
        call = replaced(args, x=x)
        (y,) = run_out("lowbit_linear", linear, call)
        assert_within(y, *reference(call), f"{len(x)} tokens of {x.dtype}")
    experts = (args[0], *(t[None] for t in args[1:4]), None, torch.tensor([9], dtype=torch.int32), *args[6:])
    (y,) = run_out("lowbit_linear", linear, experts)
    assert_within(y, *reference(replaced(args, bias=None)), "experts")
    assert served == [8]
