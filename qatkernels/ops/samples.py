"""Inputs of the ops that tests and benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..grid import Grid, affine, binary, lsq, seq, ternary
from .noise import make_seed

#: One grid of each kind, and the widths at the ends.
GRIDS = (binary(), ternary(), seq(2), seq(4), lsq(2), lsq(3), lsq(4), lsq(8), affine(2), affine(4), affine(8))


@dataclass(frozen=True)
class Sample:
    """One call of the fake-quantize family."""

    name: str
    grid: Grid
    w: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    zero_point: Tensor | None = field(default=None, repr=False)
    seed: Tensor | None = field(default=None, repr=False)
    group_size: int | None = None
    noise_std: float = 0.0
    scale_noise_std: float = 0.0
    dtype: torch.dtype | None = None

    @property
    def point(self) -> tuple[Any, ...]:
        """The arguments from ``w`` to ``grad_scale`` that the ops of the family share."""
        constants, grad_scale = list(self.grid.constants), self.grid.grad_scale(self.w.numel())
        return (
            self.w, self.scale, self.zero_point, self.seed, constants, self.noise_std, self.scale_noise_std, grad_scale,
        )  # fmt: skip

    def upstream(self) -> Tensor:
        """A gradient with respect to y."""
        return draw(self.w.shape, self.dtype or self.w.dtype, self.w.device, seed=7)

    def tangents(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tangents of w, scale and zero point."""
        return tuple(
            None if t is None else draw(t.shape, t.dtype, t.device, seed=seed)
            for seed, t in enumerate((self.w, self.scale, self.zero_point), 8)
        )  # type: ignore[return-value]

    def args(self, op: str) -> tuple[Any, ...]:
        """Arguments of a named op of the family."""
        if op == "fake_quantize":
            return (*self.point, self.dtype)
        if op == "fake_quantize_backward":
            return (self.upstream(), *self.point)
        if op in ("fake_quantize_jvp", "fake_quantize_dual"):
            return (*self.tangents(), *self.point, self.dtype)
        if op == "quantize":
            w, scale, zero_point, _, constants = self.point[:5]
            return w, scale, zero_point, constants, self.grid.code_min, self.grid.code_max
        if op == "reset_":
            w, scale, zero_point, _, constants = self.point[:5]
            return w, scale, zero_point, constants, 0.4
        raise KeyError(op)


#: Drawn on the device from so many numbers on: a CPU takes seconds for what a GPU draws at once.
MANY = 2**22


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    width: float = 1.0,
) -> Tensor:
    """Normal numbers times ``width``, the same ones on every device unless there are :data:`MANY`."""
    where = device if math.prod(shape) >= MANY else "cpu"
    numbers = torch.randn(shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    return numbers.mul_(width).to(device, dtype)


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Weights as a linear layer has them: normal, a fiftieth wide."""
    return draw(shape, dtype, device, seed, width=0.02)


def make(
    grid: Grid,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    granularity: str | int = "row",
    device: torch.device | str = "cpu",
    noise: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Sample:
    """Build one sample; ``granularity`` is ``"tensor"``, ``"row"`` or a group size."""
    w = weights(shape, dtype, device)
    group_size = granularity if isinstance(granularity, int) else None
    # Scales half as wide as they should be, so that some weights saturate.
    scale = grid.init_scale(w, group_size, per_tensor=granularity == "tensor") * 0.5
    zero_point = grid.init_zero_point(w, scale, group_size) if grid.has_zero_point else None
    name = f"{grid.scheme}{grid.bits}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}-{granularity}"
    name += ("-noise" if noise else "") + (f"-to-{str(out_dtype)[6:]}" if out_dtype else "")
    std, seed = (0.002, make_seed(1234, w.device)) if noise else (0.0, None)
    return Sample(name, grid, w, scale, zero_point, seed, group_size, std, std, out_dtype)


def perturbations(op: str, device: torch.device | str = "cpu") -> Iterator[tuple[Any, ...]]:
    """Arguments of a perturbation's ops: every pair of dtypes that it takes, SAM and ASAM, odd sizes."""
    factor, single = torch.tensor(3.7, device=device), torch.float32
    pairs = [(t, t) for t in (single, torch.bfloat16, torch.float16, torch.float64)]
    if op != "perturb_swap_":
        pairs += [(torch.bfloat16, single), (torch.float16, single)]
    for w_dtype, g_dtype in pairs:
        for shape in ((5, 37), (70, 700), (0, 3)):
            w, g = weights(shape, w_dtype, device), weights(shape, g_dtype, device, seed=1)
            if op == "perturbation_norms":
                yield from ((g, None, 0.0), (g, w, 0.01))
            else:
                yield from ((w, g, factor, None), (w, g, factor, 0.01))


def samples(device: torch.device | str = "cpu") -> Iterator[Sample]:
    """Every grid at every granularity and dtype, odd sizes, noise, mixed dtypes."""
    for grid in GRIDS:
        for granularity in ("tensor", "row", 16):
            yield make(grid, (6, 48), torch.float32, granularity, device)
        yield make(grid, (5, 37), torch.float32, "row", device)
        yield make(grid, (5, 37), torch.float32, "row", device, noise=True)
        yield make(grid, (4, 64), torch.float32, "row", device, out_dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float16):
            yield make(grid, (6, 48), dtype, "row", device)
    for grid in (seq(2), lsq(4), affine(4)):
        yield make(grid, (3, 4, 32), torch.float32, 8, device)
        yield make(grid, (1,), torch.float32, "tensor", device)
        yield make(grid, (7, 1), torch.float32, "row", device)
        yield make(grid, (2, 5001), torch.float32, "row", device)
        yield make(grid, (3, 40000), torch.bfloat16, "tensor", device, noise=True)
        yield make(grid, (64, 128), torch.float32, 32, device, noise=True)
        yield make(grid, (4, 64), torch.float32, "row", device, out_dtype=torch.float16)


#: A call of an op by name: what it is, the op, its arguments.
Call = tuple[str, str, tuple[Any, ...]]


def logits_calls(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Call]:
    """Yield every op of cross_entropy.py on logits of several sizes.

    One row is ignored, one has a target outside, one is half -inf.
    """
    for tokens, vocabulary in ((5, 7), (1, 1), (4, 1500), (3, 4096), (4, 9001)):
        generator = torch.Generator().manual_seed(vocabulary)
        logits, tangent = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
        targets = torch.randint(vocabulary, (tokens,), generator=generator)
        if tokens > 3:
            targets[:2] = torch.tensor([-100, vocabulary])
            logits[2, : vocabulary // 2], targets[2] = -torch.inf, vocabulary - 1
        logits, tangent = (logits * 3).to(device, dtype), tangent.to(device, dtype)
        number = torch.float64 if dtype == torch.float64 else torch.float32
        g, tangent_g = (torch.randn(tokens, generator=generator).to(device, number) for _ in range(2))
        lse = torch.logsumexp(logits.to(number), 1)
        point = (logits, lse, targets.to(device), -100)
        name = f"{tokens}x{vocabulary}-{str(dtype)[6:]}"
        yield name, "cross_entropy", (logits, *point[2:])
        yield name, "cross_entropy_jvp", (tangent, *point)
        yield name, "cross_entropy_backward", (g, *point)
        for along in (tangent_g, None):
            yield name, "cross_entropy_hvp", (tangent, along, g, *point)
            yield name, "cross_entropy_dual", (tangent, along, g, *point)


def basis_calls(device: torch.device | str = "cpu") -> Iterator[Call]:
    """Yield gram_schmidt in every dtype: with and without an update, one block and many, groups of rows and rests."""
    for basis_dtype, dtype in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
        (torch.float32, torch.float64),
    ):  # fmt: skip
        for rows, cols in ((7, 1003), (60, 5001), (1, 100), (300, 700), (3, 0), (0, 50), (2, 600_000)):
            generator = torch.Generator().manual_seed(cols)
            basis = torch.randn(rows, cols, generator=generator).to(device, basis_dtype)
            w = torch.randn(cols, generator=generator).to(device, dtype)
            h = torch.randn(rows, generator=generator, dtype=torch.float64).to(device)
            name = f"{rows}x{cols}-{str(basis_dtype)[6:]}-{str(dtype)[6:]}"
            for update in (None, h):
                yield name + ("" if update is None else "-update"), "gram_schmidt", (basis, w, update)
