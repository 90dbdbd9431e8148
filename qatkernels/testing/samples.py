"""Sample calls of every op, for tests, benchmarks and authors of backends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..grids import Grid, affine, binary, lsq, seq, ternary
from ..ops.noise import make_seed

#: Grids of every scheme, with the smallest and the largest bit widths.
GRIDS = (binary(), ternary(), seq(2), seq(4), lsq(2), lsq(3), lsq(4), lsq(8), affine(2), affine(4), affine(8))
#: A grid of no scheme. 1 / steps is not exact, so a kernel that multiplies by it instead of dividing gives other bits.
SEVENTH = Grid("seventh", 4, -7, 7, 7.0, 0.0, (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))


@dataclass(frozen=True)
class Sample:
    """The arguments of a call of an op of the fake-quantize family."""

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
        """The arguments that all ops of the family have: ``w`` to ``grad_scale``."""
        constants, grad_scale = list(self.grid.constants), self.grid.grad_scale(self.w.numel())
        return (
            self.w, self.scale, self.zero_point, self.seed, constants, self.noise_std, self.scale_noise_std, grad_scale,
        )  # fmt: skip

    def upstream(self) -> Tensor:
        """Return a gradient of y."""
        return draw(self.w.shape, self.dtype or self.w.dtype, self.w.device, seed=7)

    def tangents(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tangents of w, scale and zero point."""
        return tuple(
            None if t is None else draw(t.shape, t.dtype, t.device, seed=seed)
            for seed, t in enumerate((self.w, self.scale, self.zero_point), 8)
        )  # type: ignore[return-value]

    def moments(self) -> Tensor:
        """Return what the errors of each input feature are multiplied by; of a stack, for each expert."""
        shape = (*self.w.shape[:-2], self.w.shape[-1])
        return draw(shape, torch.float64, self.w.device, seed=11).square()

    def args(self, op: str) -> tuple[Any, ...]:
        """Return the arguments of an op of the family."""
        if op == "fake_quantize":
            return (*self.point, self.dtype)
        if op == "fake_quantize_backward":
            return (self.upstream(), *self.point)
        if op in ("fake_quantize_jvp", "fake_quantize_dual"):
            return (*self.tangents(), *self.point, self.dtype)
        if op == "quantize":
            w, scale, zero_point, _, constants = self.point[:5]
            return w, scale, zero_point, constants, self.grid.code_min, self.grid.code_max
        if op == "quantization_error":
            w, scale, zero_point, _, constants = self.point[:5]
            return w, scale, zero_point, self.moments(), constants
        if op == "reset_":
            w, scale, zero_point, _, constants = self.point[:5]
            return w, scale, zero_point, constants, 0.4
        raise KeyError(op)


#: Tensors with at least this many elements are drawn on their device, because a CPU would take seconds.
MANY = 2**22


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    width: float = 1.0,
) -> Tensor:
    """Return normal numbers times ``width``. Below :data:`MANY` elements they are the same on every device."""
    draw_device = device if math.prod(shape) >= MANY else "cpu"
    numbers = torch.randn(shape, generator=torch.Generator(draw_device).manual_seed(seed), device=draw_device)
    return numbers.mul_(width).to(device, dtype)


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Return weights like those of a linear layer: normal, with a standard deviation of 0.02."""
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
    """Return a sample.

    Args:
        grid: grid of the weight.
        shape: shape of the weight.
        dtype: dtype of the weight.
        granularity: the weights that share a scale: ``"tensor"``, ``"row"``, or a group size.
        device: device of all tensors.
        noise: whether weight and scale get noise.
        out_dtype: dtype of the result; that of the weight if None.

    >>> make(lsq(4), (6, 48), granularity=16).name
    'lsq4-6x48-float32-16'
    """
    w = weights(shape, dtype, device)
    group_size = granularity if isinstance(granularity, int) else None
    # Half of the initial scale, so that some weights saturate.
    scale = grid.init_scale(w, group_size, per_tensor=granularity == "tensor") * 0.5
    zero_point = grid.init_zero_point(w, scale, group_size) if grid.has_zero_point else None
    name = f"{grid.scheme}{grid.bits}-{'x'.join(map(str, shape))}-{dtype_name(dtype)}-{granularity}"
    name += ("-noise" if noise else "") + (f"-to-{dtype_name(out_dtype)}" if out_dtype else "")
    std, seed = (0.002, make_seed(1234, w.device)) if noise else (0.0, None)
    return Sample(name, grid, w, scale, zero_point, seed, group_size, std, std, out_dtype)


def perturbations(op: str, device: torch.device | str = "cpu") -> Iterator[tuple[Any, ...]]:
    """Yield arguments of an op for perturbations: every allowed pair of dtypes, SAM and ASAM, odd sizes."""
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


def every_sample(device: torch.device | str = "cpu") -> Iterator[Sample]:
    """Yield samples of every grid: every granularity and dtype, odd sizes, noise, mixed dtypes.

    >>> sum(sample.zero_point is not None for sample in every_sample()) > 20
    True
    """
    for grid in GRIDS:
        for granularity in ("tensor", "row", 16):
            yield make(grid, (6, 48), torch.float32, granularity, device)
        yield make(grid, (5, 37), torch.float32, "row", device)
        yield make(grid, (5, 37), torch.float32, "row", device, noise=True)
        yield make(grid, (4, 64), torch.float32, "row", device, out_dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float16):
            yield make(grid, (6, 48), dtype, "row", device)
    for dtype in (torch.float32, torch.bfloat16):
        yield make(SEVENTH, (16, 48), dtype, "row", device)
        yield make(SEVENTH, (16, 48), dtype, 16, device, noise=True)
    for grid in (seq(2), lsq(4), affine(4)):
        yield make(grid, (3, 4, 32), torch.float32, 8, device)
        yield make(grid, (1,), torch.float32, "tensor", device)
        yield make(grid, (7, 1), torch.float32, "row", device)
        yield make(grid, (2, 5001), torch.float32, "row", device)
        yield make(grid, (3, 40000), torch.bfloat16, "tensor", device, noise=True)
        yield make(grid, (64, 128), torch.float32, 32, device, noise=True)
        yield make(grid, (4, 64), torch.float32, "row", device, out_dtype=torch.float16)


#: A call: its name, the op, the arguments.
Call = tuple[str, str, tuple[Any, ...]]


def logits_calls(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Call]:
    """Yield calls of every op of _cross_entropy.py on logits of several sizes.

    One row is ignored, one has a target outside the vocabulary, and half of one row is -inf.
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
        name = f"{tokens}x{vocabulary}-{dtype_name(dtype)}"
        yield name, "cross_entropy", (logits, *point[2:])
        yield name, "cross_entropy_jvp", (tangent, *point)
        yield name, "cross_entropy_backward", (g, *point)
        for along in (tangent_g, None):
            yield name, "cross_entropy_hvp", (tangent, along, g, *point)
            yield name, "cross_entropy_dual", (tangent, along, g, *point)


def basis_calls(device: torch.device | str = "cpu") -> Iterator[Call]:
    """Yield calls of gram_schmidt in every dtype, with and without an update, at small, large and odd sizes."""
    for basis_dtype, dtype in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
        (torch.float32, torch.float64),
    ):  # fmt: skip
        for rows, cols in ((7, 1003), (60, 5001), (1, 100), (300, 700), (3, 0), (0, 50), (2, 600_000)):
            generator = torch.Generator().manual_seed(cols)
            basis = torch.randn(rows, cols, generator=generator).to(device, basis_dtype)
            w = torch.randn(cols, generator=generator).to(device, dtype)
            h = torch.randn(rows, generator=generator, dtype=torch.float64).to(device)
            name = f"{rows}x{cols}-{dtype_name(basis_dtype)}-{dtype_name(dtype)}"
            for update in (None, h):
                yield name + ("" if update is None else "-update"), "gram_schmidt", (basis, w, update)


def _small(*shape: int, seed: int = 0) -> Tensor:
    """Return small multiples of 1/4. Sums of their products are exact in any order of additions."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 4


def _family_calls(op: str) -> Iterator[tuple[Any, ...]]:
    yield make(affine(4), (6, 48), noise=True).args(op)


def _dequantize_calls(op: str) -> Iterator[tuple[Any, ...]]:
    grid, codes = affine(4), torch.randint(16, (6, 48), generator=torch.Generator().manual_seed(0))
    yield codes.to(grid.code_dtype), torch.rand(6) + 0.1, torch.rand(6) * 15, list(grid.constants), torch.float32


def _linear_dual_calls(op: str) -> Iterator[tuple[Any, ...]]:
    grid, scale, zero = affine(4), torch.tensor([0.25, 0.5, 1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, 7.0, 1.0, 15.0])
    point = (_small(5, 24), scale, zero, make_seed(1, torch.device("cpu")), list(grid.constants), 0.0, 0.0, 1.0)
    tangents = _small(5, 24, seed=1), _small(5, seed=2), _small(5, seed=3)
    for transposed in (False, True):
        shape = (3, 5 if transposed else 24)
        yield _small(*shape, seed=4), _small(*shape, seed=5), *tangents, *point, transposed


def _linear_backward_calls(op: str) -> Iterator[tuple[Any, ...]]:
    for *_, w, scale, zero, seed, constants, noise, scale_noise, factor, transposed in _linear_dual_calls(op):
        if not transposed:
            yield _small(3, 5), _small(3, 24, seed=1), w, scale, zero, seed, constants, noise, scale_noise, factor


def _logits_calls(op: str) -> Iterator[tuple[Any, ...]]:
    yield next(args for _, name, args in logits_calls(torch.float32) if name == op)


def _linear_logits_calls(op: str) -> Iterator[tuple[Any, ...]]:
    tokens, features, vocabulary = 6, 8, 11
    hidden, weight = _small(tokens, features), _small(vocabulary, features, seed=1)
    targets = torch.arange(tokens)
    lse = torch.logsumexp(hidden @ weight.t(), 1)
    tangents = _small(tokens, features, seed=2), _small(vocabulary, features, seed=3)
    g, tangent_g = _small(tokens, seed=4), _small(tokens, seed=5)
    settings = (-100, 4)
    yield {
        "linear_cross_entropy": (hidden, weight, targets, *settings),
        "linear_cross_entropy_jvp": (*tangents, hidden, weight, lse, targets, *settings),
        "linear_cross_entropy_backward": (g, hidden, weight, lse, targets, *settings, True, True),
        "linear_cross_entropy_hvp": (
            *tangents, tangent_g, g, hidden, weight, lse, targets, *settings, True, True,
        ),
    }[op]  # fmt: skip


def _packing_calls(op: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for bits in (3, 4):
        if op == "pack":
            yield torch.randint(0, 1 << bits, (5, 40), generator=generator).to(torch.uint8), 0, bits
        else:
            yield torch.randint(256, (5, 5 * bits), generator=generator).to(torch.uint8), 0, bits, 40


def _packed_calls(op: str) -> Iterator[tuple[Any, ...]]:
    grid, generator = affine(4), torch.Generator().manual_seed(0)
    forward = op == "lowbit_linear"
    for ends in (None, (2, 2, 4)):
        leading = (5,) if ends is None else (len(ends), 5)
        packed = torch.randint(256, (*leading, 32), generator=generator).to(torch.uint8)
        scale = torch.tensor([0.25, 0.5]).repeat(*leading, 1)
        zero = torch.randint(16, (*leading, 2), generator=generator).float()
        offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        bias = (_small(5, seed=1) if ends is None else None,) if forward else ()
        code = (list(grid.constants), grid.code_min, 4, None if forward else 64)
        yield _small(4, 64 if forward else 5), packed, scale, zero, *bias, offsets, *code


def _expert_calls(op: str) -> Iterator[tuple[Any, ...]]:
    x, g, w = _small(9, 6), _small(9, 5, seed=1), _small(3, 5, 6, seed=2)
    operands = {"grouped_linear": (x, w), "grouped_linear_transposed": (g, w), "grouped_outer": (g, x)}
    yield *operands[op], torch.tensor([2, 5, 8], dtype=torch.int32)


def _perturbation_calls(op: str) -> Iterator[tuple[Any, ...]]:
    yield list(itertools.islice(perturbations(op), 2))[1]  # the second one is ASAM's, in which w is not None


#: Calls of every op in which each tensor argument is not None at least once. A new op needs an entry.
COMPLETE_CALLS: dict[str, Callable[[str], Iterator[tuple[Any, ...]]]] = {
    **dict.fromkeys(
        (
            "fake_quantize",
            "fake_quantize_backward",
            "fake_quantize_jvp",
            "fake_quantize_dual",
            "quantize",
            "quantization_error",
            "reset_",
        ),
        _family_calls,
    ),
    "dequantize": _dequantize_calls,
    "fake_quantize_dynamic": lambda _: iter([(weights((5, 7), torch.float32), 8)]),
    "normal": lambda _: iter([(make_seed(1, torch.device("cpu")), 100, 0)]),
    "quant_linear_dual": _linear_dual_calls,
    "quant_linear_backward": _linear_backward_calls,
    **dict.fromkeys(("pack", "unpack"), _packing_calls),
    **dict.fromkeys(("lowbit_linear", "lowbit_linear_transposed"), _packed_calls),
    **dict.fromkeys(("grouped_linear", "grouped_linear_transposed", "grouped_outer"), _expert_calls),
    "gram_schmidt": lambda _: iter([(_small(7, 103), _small(103, seed=1), _small(7, seed=2).double())]),
    **dict.fromkeys((f"cross_entropy{s}" for s in ("", "_jvp", "_backward", "_hvp", "_dual")), _logits_calls),
    **dict.fromkeys((f"linear_cross_entropy{s}" for s in ("", "_jvp", "_backward", "_hvp")), _linear_logits_calls),
    **dict.fromkeys(("perturb_", "perturb_swap_", "perturbation_norms"), _perturbation_calls),
}


def complete_calls(op: str, device: torch.device | str = "cpu") -> list[tuple[Any, ...]]:
    """Return calls of an op in which each tensor argument is not None at least once.

    >>> [tuple(x.shape) for x, bits in complete_calls("fake_quantize_dynamic")]
    [(5, 7)]

    Raises:
        KeyError: if there are none; the message says where to add them.
    """
    if op not in COMPLETE_CALLS:
        raise KeyError(f"op {op!r} has no entry in COMPLETE_CALLS of qatkernels/testing/samples.py, add one")
    return [tuple(a.to(device) if isinstance(a, Tensor) else a for a in args) for args in COMPLETE_CALLS[op](op)]
