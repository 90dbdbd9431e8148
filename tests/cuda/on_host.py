"""Runs the CUDA kernels on the CPU, with the signatures of the ops' `_out` forms.

g++ compiles the unchanged csrc/cuda/*.cu against the headers in tests/cuda/host. ctypes calls them.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_bool, c_double, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import torch

from qatkernels.grids import GridConstants

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "host"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-DQK_HOST_CUDA", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
)  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
GUARD = 64  # guard bytes around every output, which must not change


# The structures of csrc/common, field by field in the same order. `library` fails to build if they differ.
class Grid(Structure):
    _cpp_ = "Grid<double>"
    _fields_ = (
        *((name, c_double) for name in GridConstants._fields if name != "by_sign"),
        ("by_sign", c_bool),
    )


class QuantArgs(Structure):
    _fields_ = (
        ("w", c_void_p), ("scale", c_void_p), ("zero_point", c_void_p), ("seed", c_void_p),
        ("rows", c_int64), ("cols", c_int64), ("w_type", c_int32), ("scale_type", c_int32), ("grid", Grid),
        ("noise_std", c_double), ("scale_noise_std", c_double), ("grad_scale", c_double),
    )  # fmt: skip


class FakeQuantizeCall(Structure):
    _fields_ = (("args", QuantArgs), ("y", c_void_p), ("y_type", c_int32))


class FakeQuantizeBackwardCall(Structure):
    _fields_ = (
        ("args", QuantArgs), ("g", c_void_p), ("g_type", c_int32), ("dw", c_void_p), ("ds", c_void_p), ("dz", c_void_p),
    )  # fmt: skip


class FakeQuantizeJvpCall(Structure):
    _fields_ = (
        ("args", QuantArgs), ("tangent_w", c_void_p), ("tangent_scale", c_void_p), ("tangent_zero_point", c_void_p),
        ("y", c_void_p), ("y_type", c_int32), ("value", c_void_p),
    )  # fmt: skip


class QuantizeCall(Structure):
    _fields_ = (("args", QuantArgs), ("codes", c_void_p), ("code_min", c_int32), ("code_max", c_int32))


class DequantizeCall(Structure):
    _fields_ = (
        ("args", QuantArgs),
        ("codes", c_void_p),
        ("codes_unsigned", c_bool),
        ("y", c_void_p),
        ("y_type", c_int32),
    )


class FakeQuantizeDynamicCall(Structure):
    _fields_ = (
        ("x", c_void_p), ("y", c_void_p), ("rows", c_int64), ("cols", c_int64), ("type", c_int32), ("bits", c_int32),
    )  # fmt: skip


class NormalCall(Structure):
    _fields_ = (("seed", c_void_p), ("out", c_void_p), ("numel", c_int64), ("stream", c_uint32))


class LowbitLinearCall(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "scale", "zero_point", "bias", "offsets", "y")),
        *((name, c_int64) for name in ("tokens", "rows", "cols", "groups", "experts")),
        *((name, c_int32) for name in ("x_type", "scale_type", "bias_type")),
        ("steps", c_double), ("offset", c_double), ("code_min", c_int32), ("bits", c_int32), ("act_bits", c_int32),
    )  # fmt: skip


STRUCTURES = (
    Grid, QuantArgs, FakeQuantizeCall, FakeQuantizeBackwardCall, FakeQuantizeJvpCall, QuantizeCall, DequantizeCall,
    FakeQuantizeDynamicCall, NormalCall, LowbitLinearCall,
)  # fmt: skip


def layout_checks(structures=STRUCTURES):
    """Return C++ code that compiles only if each C++ structure has the same fields as its ctypes structure here."""
    headers = sorted(path.name for path in (ROOT / "csrc/common").glob("*.h"))
    lines = ["#include <cstddef>", *(f'#include "common/{name}"' for name in headers), '#include "field_count.h"']

    def check(condition, value, what):
        lines.append(f'static_assert({condition} == {value}, "on_host.py has {what} = {value}");')

    for mirror in structures:
        name = mirror.__name__
        cpp = f"qk::{getattr(mirror, '_cpp_', name)}"
        for field, *_ in mirror._fields_:
            there = getattr(mirror, field)
            check(f"offsetof({cpp}, {field})", there.offset, f"offsetof({name}, {field})")
            check(f"sizeof({cpp}::{field})", there.size, f"sizeof({name}::{field})")
        check(f"field_count<{cpp}>()", len(mirror._fields_), f"number of fields of {name}")
        check(f"sizeof({cpp})", ctypes.sizeof(mirror), f"sizeof({name})")
    return "\n".join(lines) + "\n"


def compile_command(source, *options):
    return ["g++", *FLAGS, f"-I{HOST}", f"-I{ROOT / 'csrc'}", "-x", "c++", *options, source]


@functools.cache
def library():
    """Build the kernels under build/ if their sources changed, and load them."""
    sources = [*KERNELS, *sorted(HOST.glob("*.cpp"))]
    headers = [*HOST.glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h"), *(ROOT / "csrc/common").glob("*.h")]
    digest = hashlib.sha256((" ".join(FLAGS) + layout_checks()).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / f"cuda-on-host-{digest.hexdigest()[:16]}"
    target = folder / "kernels.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checks = folder / f"layout_checks.{os.getpid()}.cpp"
        checks.write_text(layout_checks())
        sources.append(checks)
        objects = [folder / f"{source.name}.{os.getpid()}.o" for source in sources]

        def build(source, out):
            subprocess.run(compile_command(source, "-c", "-o", out), check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, sources, objects))
        linked = folder / f"kernels.{os.getpid()}.so"
        subprocess.run(["g++", "-shared", *objects, "-o", linked], check=True)
        linked.rename(target)
        for path in (*objects, checks):
            path.unlink()
    loaded = ctypes.CDLL(str(target))
    loaded.fake_quantize_backward_workspace.restype = c_size_t
    loaded.lowbit_gemv_serves.restype = c_bool
    loaded.divide.argtypes = [c_void_p, c_void_p, c_void_p, c_int64]
    return loaded


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


class Guarded:
    """Memory for an output between guard bytes, filled with NaN or all ones. It is copied to `out` at the end.

    It has the alignment of `out`, so that a misaligned `out` is tested misaligned.
    """

    def __init__(self, out):
        self.out = out
        self.lead = GUARD + out.data_ptr() % 16
        self.size = out.numel() * out.element_size()
        self.memory = torch.full((self.lead + self.size + GUARD,), 0xFF, dtype=torch.uint8)
        assert self.memory.data_ptr() % 16 == 0
        self.pointer = self.memory.data_ptr() + self.lead

    def give(self):
        before, inside, after = self.memory.split([self.lead, self.size, GUARD])
        assert bool((before == 0xFF).all() & (after == 0xFF).all()), "a kernel wrote outside its output"
        self.out.copy_(inside.clone().view(self.out.dtype).view(self.out.shape))


def quant_args(w, scale, zero_point, seed, grid, noise_std=0.0, scale_noise_std=0.0, grad_scale=1.0):
    assert all(t is None or t.is_contiguous() for t in (w, scale, zero_point, seed))
    by_sign, *constants = grid
    rows = scale.numel()
    cols = w.numel() // rows if rows else 0
    return QuantArgs(
        pointer(w), pointer(scale), pointer(zero_point), pointer(seed), rows, cols, DTYPES.get(w.dtype, 0),
        DTYPES[scale.dtype], Grid(*constants, by_sign != 0), noise_std, scale_noise_std, grad_scale,
    )  # fmt: skip


def run(name, call, outputs, *rest):
    error = getattr(library(), name)(byref(call), *rest)
    assert error == 0, f"{name} returned cudaError {error}"
    for out in outputs:
        out.give()


def fake_quantize(*args):
    *at, dtype, out = args
    y = Guarded(out)
    run("fake_quantize", FakeQuantizeCall(quant_args(*at), y.pointer, DTYPES[dtype or at[0].dtype]), [y])


def fake_quantize_backward(g, *args):
    *at, dw, ds, dz = args
    outputs = [Guarded(t) for t in (dw, ds) + (() if at[2] is None else (dz,))]
    pointers = [o.pointer for o in outputs] + [None]
    call = FakeQuantizeBackwardCall(quant_args(*at), pointer(g), DTYPES[g.dtype], *pointers[:3])
    workspace = torch.full((library().fake_quantize_backward_workspace(byref(call)),), 0xFF, dtype=torch.uint8)
    run("fake_quantize_backward", call, outputs, c_void_p(workspace.data_ptr()))


def fake_quantize_jvp(*args):
    *tangents, out = args[:3] + args[-1:]
    at, dtype, y = args[3:-2], args[-2], Guarded(out)
    call = FakeQuantizeJvpCall(
        quant_args(*at), *(pointer(t) for t in tangents), y.pointer, DTYPES[dtype or at[0].dtype]
    )
    run("fake_quantize_jvp", call, [y])


def quantize(w, scale, zero_point, grid, code_min, code_max, out):
    codes = Guarded(out)
    run(
        "quantize",
        QuantizeCall(quant_args(w, scale, zero_point, None, grid), codes.pointer, code_min, code_max),
        [codes],
    )


def dequantize(codes, scale, zero_point, grid, dtype, out):
    y = Guarded(out)
    args = quant_args(codes, scale, zero_point, None, grid)
    run("dequantize", DequantizeCall(args, pointer(codes), codes.dtype == torch.uint8, y.pointer, DTYPES[dtype]), [y])


def fake_quantize_dynamic(x, bits, out):
    y = Guarded(out)
    cols = x.shape[-1]
    rows = x.numel() // cols if cols else 0
    run("fake_quantize_dynamic", FakeQuantizeDynamicCall(pointer(x), y.pointer, rows, cols, DTYPES[x.dtype], bits), [y])


def normal(seed, numel, stream, out):
    z = Guarded(out)
    run("normal", NormalCall(pointer(seed), z.pointer, numel, stream), [z])


def lowbit_call(x, packed, scale, zero_point, bias, offsets, grid, code_min, bits, act_bits, y):
    assert all(t is None or t.is_contiguous() for t in (x, packed, scale, zero_point, bias, offsets))
    cols = x.shape[-1]
    experts = 1 if offsets is None else offsets.numel()
    return LowbitLinearCall(
        pointer(x), pointer(packed), pointer(scale), pointer(zero_point), pointer(bias), pointer(offsets), y,
        x.numel() // max(cols, 1), packed.shape[-2], cols, scale.shape[-1], experts, DTYPES[x.dtype],
        DTYPES[scale.dtype], DTYPES[x.dtype if bias is None else bias.dtype], grid[1], grid[2], code_min, bits,
        act_bits or 0,
    )  # fmt: skip


def lowbit_serves(*args):
    """Return whether the decode kernel takes a call."""
    return library().lowbit_gemv_serves(byref(lowbit_call(*args, None)))


def lowbit_workspace(*args):
    """Return the bytes of workspace that a call needs."""
    size = c_size_t()
    assert library().lowbit_gemv_workspace(byref(lowbit_call(*args, None)), byref(size)) == 0
    return size.value


def lowbit_linear(*args):
    *args, out = args
    y = Guarded(out)
    # Exactly as large as needed, so that a kernel that needs more writes into the guard.
    size = lowbit_workspace(*args)
    workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
    run("lowbit_gemv", lowbit_call(*args, y.pointer), [y], c_void_p(workspace.data_ptr()))
    assert bool((workspace[size:] == 0xFF).all()), "a kernel wrote outside its workspace"


def set_device(multiprocessors, shared_kib):
    """Set the properties of the fake device."""
    library().set_device(multiprocessors, shared_kib << 10)


def divide(a, b):
    q = torch.empty_like(a)
    library().divide(pointer(a), pointer(b), pointer(q), a.numel())
    return q


def layout(rows, cols, v, u):
    """Return the number of pieces of a row, and the columns of a piece."""
    out = (c_int64 * 2)()
    library().layout(c_int64(rows), c_int64(cols), v, u, out)
    return tuple(out)


def set_reversed(value):
    """Run threads and blocks in the opposite order."""
    library().set_reversed(c_bool(value))


IMPLS = {
    f.__name__: f
    for f in (
        fake_quantize, fake_quantize_backward, fake_quantize_jvp, quantize, dequantize, fake_quantize_dynamic, normal,
        lowbit_linear,
    )
}  # fmt: skip
