"""The calls whose kernels are measured. Shapes are real; the tensors' memory is never accessed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import qatkernels as qk
from qatkernels.grids import Grid
from qatkernels.ops.packing import row_bytes

#: An op, its arguments, and the start of the name of the kernel that is measured.
Call = tuple[str, tuple[Any, ...], str]
SQUARE = 4096


@contextmanager
def on(architecture: int) -> Iterator[None]:
    """Let the launchers see a GPU, and multiply with our kernels for any number of tokens."""
    module = importlib.import_module("qatkernels.backends.triton.lowbit_linear")
    known, module.capability = module.capability, lambda device: divmod(architecture, 10)
    serves, module.library_serves = module.library_serves, lambda *args, **kwargs: False
    try:
        yield
    finally:
        module.capability, module.library_serves = known, serves


def _family(op: str, grid: Grid, dtype: torch.dtype, group: int | None = None, *, noise: bool = False) -> Call:
    w = torch.empty(SQUARE, SQUARE, dtype=dtype)
    scale = torch.empty(SQUARE) if group is None else torch.empty(SQUARE, SQUARE // group)
    seed, std = (torch.tensor(3), 0.1) if noise else (None, 0.0)
    point = (w, scale, torch.empty_like(scale) if grid.has_zero_point else None, seed, list(grid.constants), std, std)
    args: tuple[Any, ...] = (*point, 1.0)
    if op == "fake_quantize_backward":
        return op, (w, *args), ""
    if op == "quantize":
        return op, (*args[:3], args[4], grid.code_min, grid.code_max), ""
    if op == "fake_quantize_jvp":
        args = (w, scale, None, *args)
    return op, (*args, None), ""


def _product(
    op: str, grid: Grid, tokens: int, group: int | None = None, dtype: torch.dtype = torch.bfloat16,
    act_bits: int | None = None,
) -> Call:  # fmt: skip
    n = k = SQUARE
    packed = torch.empty(n, row_bytes(k, grid.storage_bits), dtype=torch.uint8)
    scale = torch.empty(n, 1 if group is None else k // group)
    zero = torch.empty_like(scale) if grid.has_zero_point else None
    x = torch.empty(tokens, k, dtype=dtype)
    settings = (list(grid.constants), grid.code_min, grid.storage_bits)
    if op == "lowbit_linear":
        return op, (x, packed, scale, zero, None, None, *settings, act_bits), "lowbit"
    return op, (x, packed, scale, zero, None, *settings, k), "lowbit"


def _gram(rows: int, dtype: torch.dtype) -> Call:
    return "gram_schmidt", (torch.empty(rows, 2**20, dtype=dtype), torch.empty(2**20), torch.empty(rows).double()), ""


def _cases() -> dict[str, Callable[[], Call]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    found: dict[str, Callable[[], Call]] = {
        "forward, 4 bits, bf16": lambda: _family("fake_quantize", qk.grids.lsq(4), bf16),
        "forward, 4 bits, fp32": lambda: _family("fake_quantize", qk.grids.lsq(4), fp32),
        "forward, 2 bits, noise, bf16": lambda: _family("fake_quantize", qk.grids.seq(2), bf16, noise=True),
        "backward, 4 bits, bf16": lambda: _family("fake_quantize_backward", qk.grids.lsq(4), bf16),
        "backward, 2 bits, bf16": lambda: _family("fake_quantize_backward", qk.grids.seq(2), bf16),
        "backward, 4 bits, fp32": lambda: _family("fake_quantize_backward", qk.grids.lsq(4), fp32),
        "backward, 4 bits with zero points in 128, bf16": lambda: _family(
            "fake_quantize_backward", qk.grids.affine(4), bf16, 128
        ),
        "forward mode, 4 bits, bf16": lambda: _family("fake_quantize_jvp", qk.grids.lsq(4), bf16),
        "quantize, 4 bits, fp32": lambda: _family("quantize", qk.grids.lsq(4), fp32),
        "dynamic, 8 bits, bf16": lambda: ("fake_quantize_dynamic", (torch.empty(2048, SQUARE, dtype=bf16), 8), ""),
        "gram_schmidt, 60 rows, fp32": lambda: _gram(60, fp32),
        "gram_schmidt, 16 rows, fp32": lambda: _gram(16, fp32),
        "gram_schmidt, 250 rows, bf16": lambda: _gram(250, bf16),
    }
    grids = {"1": qk.grids.binary(), "1.58": qk.grids.ternary(), "2": qk.grids.seq(2), "8": qk.grids.lsq(8)}
    grids |= {str(bits): qk.grids.lsq(bits) for bits in range(3, 8)}
    for bits, grid in sorted(grids.items()):
        for tokens in (1, 64, 2048):
            found[f"product, {bits} bits, {tokens} tokens"] = lambda g=grid, t=tokens: _product("lowbit_linear", g, t)
    for tokens in (1, 64, 2048):
        for name, grid, group in (("in 128", qk.grids.lsq(4), 128), ("in 32", qk.grids.lsq(4), 32),
                                  ("with zero points in 128", qk.grids.affine(4), 128)):  # fmt: skip
            found[f"product, 4 bits {name}, {tokens} tokens"] = lambda g=grid, n=group, t=tokens: _product(
                "lowbit_linear", g, t, n
            )
        found[f"product, 4 bits, {tokens} tokens, fp32"] = lambda t=tokens: _product(
            "lowbit_linear", qk.grids.lsq(4), t, None, fp32
        )
        found[f"product, 4 bits in 128, {tokens} tokens, A8"] = lambda t=tokens: _product(
            "lowbit_linear", qk.grids.lsq(4), t, 128, act_bits=8
        )
        for name, grid, group, dtype in (
            ("4 bits", qk.grids.lsq(4), None, bf16), ("3 bits", qk.grids.lsq(3), None, bf16),
            ("4 bits in 128", qk.grids.lsq(4), 128, bf16),
            ("4 bits with zero points in 128", qk.grids.affine(4), 128, bf16),
            ("4 bits, fp32", qk.grids.lsq(4), None, fp32),
        ):  # fmt: skip
            found[f"transposed product, {name}, {tokens} tokens"] = lambda g=grid, n=group, d=dtype, t=tokens: _product(
                "lowbit_linear_transposed", g, t, n, d
            )
    return found


#: Builders of the calls, by name.
CASES = _cases()
