"""Random calls of every op on every ISA, against results that are exact or bounded in float64.

An op that specifies every rounding must give the reference's bits. For the others compare.py and products.py of
qatkernels/testing give the allowed difference, in float64. A call with strided arguments must give the same bits as one
with contiguous ones, and the form that allocates its outputs the same bits as the `_out` form.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import qatkernels as qk
from qatkernels import grids
from qatkernels.backends import IMPLS, extension
from qatkernels.dtypes import dtype_name
from qatkernels.grids import Grid
from qatkernels.ops import noise
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.ops.contract import FLOATS
from qatkernels.ops.packing import SCALES
from qatkernels.testing.compare import (  # fmt: skip
    assert_same_bits,
    assert_within,
    check_error,
    check_gram_schmidt,
    check_in_place,
    check_linear_backward,
    check_linear_dual,
    check_norms,
    check_rows,
    check_sample,
    run_out,
)
from qatkernels.testing.products import Case, activations, by_expert, rounded_bound
from qatkernels.testing.samples import Sample

from .runner import Campaign

CASES = 200
_GRIDS = [
    grids.binary(), grids.ternary(),
    *(make(bits) for make in (grids.seq, grids.lsq, grids.affine) for bits in range(2, 9)),
]  # fmt: skip
_SPECIAL = (0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)


def isas() -> list[str]:
    """Return the ISAs to test: all of this machine, if the extension can switch between them."""
    compiled = extension()
    if compiled is None:
        return []
    info = compiled.build_info()
    if not hasattr(compiled, "use_isa"):
        return [info["isa"]]
    return [isa for isa in info["isas"].split() if compiled.has_isa(isa)]


def use(isa: str) -> None:
    """Use the kernels of an ISA from now on."""
    compiled = extension()
    if hasattr(compiled, "use_isa"):
        compiled.use_isa(isa)


class Drawn:
    """Draws random arguments from the random numbers of a case."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw.getrandbits(63))

    def size(self, most: int) -> int:
        """Return a size: usually small or next to a power of two, sometimes the largest."""
        draw = self.draw
        near = 2 ** draw.randint(0, most.bit_length() - 1) + draw.randint(-1, 1)
        return min(max(draw.choice((draw.randint(1, 9), near, near, draw.randint(1, most))), 1), most)

    def dtype(self) -> torch.dtype:
        """Return one of the dtypes of weights."""
        return self.draw.choice((torch.float32, torch.float32, *FLOATS))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal numbers of any magnitude."""
        return (torch.randn(shape, generator=self.generator) * 10.0 ** self.draw.uniform(-4, 2)).to(dtype)

    def spoil(self, t: Tensor, values: tuple[float, ...] = _SPECIAL, share: float = 0.02) -> Tensor:
        """Put special values into a tensor."""
        chosen = torch.tensor(values)[torch.randint(len(values), t.shape, generator=self.generator)].to(t.dtype)
        return torch.where(torch.rand(t.shape, generator=self.generator) < share, chosen, t)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def sample(self, dims: int | None = None, special: bool = False) -> Sample:
        """Return a call of the fake-quantize family.

        Args:
            dims: of the weight; any if None.
            special: whether weights, scales and zero points may have special values.
        """
        draw, grid, dtype = self.draw, self.draw.choice(_GRIDS), self.dtype()
        cols = self.size(700)
        leading = [self.size(24) for _ in range((draw.choice((1, 2, 2, 3)) if dims is None else dims) - 1)]
        divisors = [d for d in range(1, cols + 1) if cols % d == 0]
        group = draw.choice((None, None, draw.choice(divisors)))
        tensor = group is None and draw.random() < 0.2
        scale_shape = [] if tensor else leading if group is None else [*leading, cols // group]
        magnitude = 10.0 ** draw.uniform(-5, 1)
        scale = magnitude * (0.2 + torch.rand(scale_shape, generator=self.generator))
        if special:
            scale = self.spoil(scale, (0.0, -1.0, 1e-7, 1e30, torch.inf, torch.nan), 0.1)
        # Weights near the levels; some are ties, some are beyond the range.
        unit = torch.randn([*leading, cols], generator=self.generator) * draw.uniform(0.1, 2) * max(grid.values)
        ties = (torch.round(unit * grid.steps) + 0.5) / grid.steps
        unit = torch.where(torch.rand(unit.shape, generator=self.generator) < 0.2, ties, unit)
        w = (unit * magnitude).to(dtype)
        zero_point = None
        if grid.has_zero_point and draw.random() < 0.7:
            zero_point = torch.rand(scale_shape, generator=self.generator) * grid.code_max
            zero_point = zero_point.round() if draw.random() < 0.5 else zero_point
            zero_point = self.spoil(zero_point, (-1e4, 1e6, torch.nan), 0.1) if special else zero_point
        w = self.spoil(w) if special else w
        if dtype == torch.float64 and draw.random() < 0.5:
            scale, zero_point = scale.double(), None if zero_point is None else zero_point.double()
        std = draw.choice((0.0, 0.0, magnitude * 0.1))
        seed = noise.make_seed(draw.getrandbits(60), torch.device("cpu")) if std else None
        to = draw.choice((torch.bfloat16, torch.float16, None)) if dtype == torch.float32 else None
        name = f"{grid.scheme}{grid.bits:g} {list(w.shape)} {dtype_name(dtype)} group {group} tensor {tensor} to {to}"
        return Sample(name, grid, w, scale, zero_point, seed, group, std, draw.choice((std, 0.0)) if std else 0.0, to)

    def weight(self, grid: Grid, *shape: int) -> qk.PackedWeight:
        """Return a packed weight of random codes, scales and zero points."""
        draw, cols = self.draw, shape[-1]
        divisors = [d for d in range(1, cols + 1) if cols % d == 0 and (d >= 8 or d == cols)]
        groups = cols // draw.choice(divisors) if draw.random() < 0.6 else 1
        codes = self.whole(grid.code_min, grid.code_max, *shape).to(grid.code_dtype)
        scale = 10.0 ** draw.uniform(-4, 0) * (0.2 + torch.rand((*shape[:-1], groups), generator=self.generator))
        if draw.random() < 0.1:
            scale = self.spoil(scale, (0.0, -1.0, 1e-7), 0.2)
        zero_point = None
        if grid.has_zero_point and draw.random() < 0.7:
            zero_point = torch.rand(scale.shape, generator=self.generator) * grid.code_max
            zero_point = zero_point.round() if draw.random() < 0.5 else zero_point
        scale = scale.to(draw.choice(SCALES))
        return qk.PackedWeight(qk.pack(codes, grid), scale, zero_point, grid, cols)

    def logits(self, op: str) -> tuple[Any, ...]:
        """Return arguments of an op of cross_entropy.py."""
        draw, dtype = self.draw, self.draw.choice(FLOATS)
        rows, vocabulary = self.size(12), self.size(5000)
        z = (torch.randn(rows, vocabulary, generator=self.generator) * draw.choice((0.1, 3, 30))).to(dtype)
        targets = self.whole(0, vocabulary - 1, rows)
        if draw.random() < 0.3 and vocabulary > 1:
            z[:, : vocabulary // 2] = -torch.inf
            targets = targets.clamp_min(vocabulary // 2)
        if draw.random() < 0.2:
            z[draw.randrange(rows), draw.randrange(vocabulary)] = torch.nan
        if draw.random() < 0.3:
            targets[draw.randrange(rows)] = draw.choice((-100, vocabulary, -1))
        number = torch.float64 if dtype == torch.float64 else torch.float32
        g, tangent_g = (torch.randn(rows, generator=self.generator).to(number) for _ in range(2))
        tangent = torch.randn(rows, vocabulary, generator=self.generator).to(dtype)
        point = (z, torch.logsumexp(z.to(number), 1), targets, -100)
        along = draw.choice((tangent_g, None))
        return {
            "cross_entropy": (z, targets, -100), "cross_entropy_jvp": (tangent, *point),
            "cross_entropy_backward": (g, *point), "cross_entropy_hvp": (tangent, along, g, *point),
            "cross_entropy_dual": (tangent, along, g, *point),
        }[op]  # fmt: skip

    def ends(self, tokens: int, experts: int) -> Tensor:
        """Return the offsets of experts; the last tokens may be unassigned."""
        return torch.tensor(sorted(self.draw.randint(0, tokens) for _ in range(experts)), dtype=torch.int32)

    def strided(self, t: Tensor) -> Tensor:
        """Return a tensor of the same values that is not contiguous, if its shape allows."""
        way = self.draw.choice(("step", "transposed", "offset"))
        if t.ndim == 0 or t.numel() == 0:
            return t
        if way == "step":
            return torch.stack([t, torch.full_like(t, 77)], -1)[..., 0]
        if way == "transposed" and t.ndim > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        padded = torch.cat([torch.full_like(t[..., :1], 77), t], -1)
        return padded[..., 1:]


def out_impl(op: str) -> Callable[..., Any]:
    """Return the compiled `_out` implementation, or the reference where there is none."""
    if "cpp" in IMPLS[f"{op}_out"]:
        return IMPLS[f"{op}_out"]["cpp"]

    def by_reference(*args: Any) -> None:
        inputs, outputs = args[: -len(OPS[op].outputs)], args[-len(OPS[op].outputs) :]
        for out, value in zip(outputs, as_tuple(OPS[op].reference(*inputs)), strict=True):
            out.copy_(value)

    return by_reference


def same_bits(op: str, args: tuple[Any, ...]) -> None:
    """Compare the bits of every output with the reference."""
    outputs = run_out(op, out_impl(op), args)
    for actual, expected in zip(outputs, as_tuple(OPS[op].reference(*args)), strict=True):
        assert_same_bits(actual, expected, op)


def views(op: str, args: tuple[Any, ...], drawn: Drawn) -> None:
    """Compare a call with strided tensors, through torch's dispatcher, with one with contiguous ones."""
    call = getattr(torch.ops.qatkernels, op)
    apart = tuple(drawn.strided(a) if isinstance(a, Tensor) else a for a in args)
    given = run_out(op, out_impl(op), args)
    for actual, expected in zip(as_tuple(call(*apart)), given, strict=True):
        assert_same_bits(actual, expected, f"{op} of strided tensors")


#: The check of each op: draws a call, and raises AssertionError.
CHECKS: dict[str, Callable[[Drawn], Iterator[None]]] = {}


def checks(*ops: str) -> Callable[[Callable[[str, Drawn], Iterator[None]]], None]:
    """Register a check for ops. It yields after drawing the call, and then runs the call again on each ISA."""

    def register(check: Callable[[str, Drawn], Iterator[None]]) -> None:
        for op in ops:
            CHECKS[op] = lambda drawn, op=op: check(op, drawn)  # type: ignore[misc]

    return register


@checks("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "fake_quantize_dual", "quantize")
def _family(op: str, drawn: Drawn) -> Iterator[None]:
    special = drawn.draw.random() < 0.3
    sample = drawn.sample(special=special)
    args = sample.args(op)
    if special and op == "fake_quantize_backward":
        expected = as_tuple(OPS[op].reference(*args))[0]
    while True:
        yield
        if special and op == "fake_quantize_backward":  # its sums may be arbitrary
            assert_same_bits(run_out(op, out_impl(op), args)[0], expected, op)
        else:
            check_sample(op, out_impl(op), sample)
        views(op, args, drawn)


@checks("quantization_error")
def _error(op: str, drawn: Drawn) -> Iterator[None]:
    *tensors, moments, constants = drawn.sample(special=drawn.draw.random() < 0.3).args(op)
    args = (*tensors, drawn.draw.choice((None, moments)), constants)
    while True:
        yield
        check_error(out_impl(op), args)


@checks("reset_")
def _reset(op: str, drawn: Drawn) -> Iterator[None]:
    args = (*drawn.sample(special=drawn.draw.random() < 0.3).args(op)[:-1], drawn.draw.choice((0.0, 0.4, 1.0)))
    while True:
        yield
        check_in_place(op, IMPLS[op].get("cpp", OPS[op].reference), args)


@checks("perturb_", "perturb_swap_", "perturbation_norms")
def _perturb(op: str, drawn: Drawn) -> Iterator[None]:
    draw, shape = drawn.draw, (drawn.size(30), drawn.size(900))
    g_dtype = draw.choice(FLOATS)
    narrow = g_dtype == torch.float32 and op != "perturb_swap_"
    w_dtype = draw.choice((g_dtype, torch.bfloat16, torch.float16)) if narrow else g_dtype
    w, g = drawn.normal(*shape, dtype=w_dtype), drawn.normal(*shape, dtype=g_dtype)
    eta = draw.choice((None, 0.0, 0.01))
    while True:
        yield
        if op == "perturbation_norms":
            asam = eta is not None and w_dtype != torch.float16 and g_dtype != torch.float16
            check_norms(out_impl(op), g, w if asam else None, (eta or 0.0) if asam else 0.0)
        else:
            factor = torch.tensor(draw.uniform(-5, 5))
            check_in_place(op, IMPLS[op].get("cpp", OPS[op].reference), (w, g, factor, eta))


@checks("dequantize")
def _dequantize(op: str, drawn: Drawn) -> Iterator[None]:
    sample = drawn.sample()
    codes = drawn.whole(sample.grid.code_min, sample.grid.code_max, *sample.w.shape).to(sample.grid.code_dtype)
    scale, zero = (None if t is None else t.float() for t in (sample.scale, sample.zero_point))
    args = (codes, scale, zero, list(sample.grid.constants), drawn.draw.choice(FLOATS))
    while True:
        yield
        same_bits(op, args)
        views(op, args, drawn)


@checks("fake_quantize_dynamic")
def _dynamic(op: str, drawn: Drawn) -> Iterator[None]:
    x = drawn.normal(drawn.size(20), drawn.size(3000), dtype=drawn.dtype())
    x = drawn.spoil(x, share=0.001) if drawn.draw.random() < 0.3 else x
    args = (x, drawn.draw.randint(2, 8))
    while True:
        yield
        same_bits(op, args)
        views(op, args, drawn)


@checks("normal")
def _normal(op: str, drawn: Drawn) -> Iterator[None]:
    seed = torch.tensor(drawn.draw.getrandbits(64) - 2**63)
    args = (
        seed,
        drawn.draw.choice((0, drawn.size(20000))),
        drawn.draw.choice((noise.WEIGHT_STREAM, noise.SCALE_STREAM)),
    )
    while True:
        yield
        same_bits(op, args)


@checks("pack", "unpack")
def _pack(op: str, drawn: Drawn) -> Iterator[None]:
    bits = drawn.draw.randint(1, 8)
    low = drawn.draw.choice((0, drawn.draw.randint(-128, min(0, 128 - (1 << bits)))))
    shape = [drawn.size(12) for _ in range(drawn.draw.randint(0, 2))] + [drawn.draw.choice((0, drawn.size(1200)))]
    unsigned = drawn.whole(0, (1 << bits) - 1, *shape)
    codes = (unsigned + low).to(torch.uint8 if low + (1 << bits) - 1 > 127 else torch.int8)
    string = (unsigned.numpy()[..., None] >> np.arange(bits)) & 1
    string = string.reshape(*shape[:-1], shape[-1] * bits).astype(np.uint8)
    packed = torch.from_numpy(np.packbits(string, axis=-1, bitorder="little"))
    args = (codes, low, bits) if op == "pack" else (packed, low, bits, shape[-1])
    while True:
        yield
        assert_same_bits(run_out(op, out_impl(op), args)[0], packed if op == "pack" else codes, op)
        views(op, args, drawn)


@checks("cross_entropy", "cross_entropy_jvp", "cross_entropy_backward", "cross_entropy_hvp", "cross_entropy_dual")
def _cross_entropy(op: str, drawn: Drawn) -> Iterator[None]:
    args = drawn.logits(op)
    while True:
        yield
        check_rows(op, out_impl(op), args)
        views(op, args, drawn)


@checks("gram_schmidt")
def _gram_schmidt(op: str, drawn: Drawn) -> Iterator[None]:
    draw, rows, cols = drawn.draw, drawn.size(40), drawn.size(9000)
    basis = drawn.normal(rows, cols, dtype=draw.choice((torch.float32, torch.bfloat16, torch.float64)))
    w = drawn.normal(cols, dtype=draw.choice((torch.float32, torch.float64)))
    h = draw.choice((None, torch.randn(rows, generator=drawn.generator, dtype=torch.float64)))
    while True:
        yield
        check_gram_schmidt(out_impl(op), (basis, w, h))


@checks("quant_linear_dual")
def _linear_dual(op: str, drawn: Drawn) -> Iterator[None]:
    sample, tokens = drawn.sample(dims=2), drawn.size(40)
    transposed = drawn.draw.random() < 0.5
    while True:
        yield
        check_linear_dual(out_impl(op), sample, tokens, transposed)


@checks("quant_linear_backward")
def _linear_backward(op: str, drawn: Drawn) -> Iterator[None]:
    sample, tokens = drawn.sample(dims=2), drawn.size(300)
    while True:
        yield
        check_linear_backward(out_impl(op), sample, tokens)


@checks("lowbit_linear", "lowbit_linear_transposed")
def _lowbit(op: str, drawn: Drawn) -> Iterator[None]:
    draw, grid, dtype = drawn.draw, drawn.draw.choice(_GRIDS), drawn.dtype()
    tokens, rows, cols = drawn.size(40), drawn.size(80), drawn.size(900)
    experts = draw.choice((None, None, draw.randint(1, 5)))
    weight = drawn.weight(grid, *(() if experts is None else (experts,)), rows, cols)
    offsets = None if experts is None else drawn.ends(tokens, experts)
    bias = drawn.normal(rows, dtype=draw.choice(FLOATS)) if experts is None and draw.random() < 0.4 else None
    x = activations((tokens, cols), dtype, draw.getrandbits(60)) * 10.0 ** draw.uniform(-2, 1)
    case = Case("random", weight, x, bias, offsets, draw.choice((None, 8, draw.randint(2, 8))))
    args, expected, bound = case.call(op)
    # A NaN or infinite value in a token changes the results of that token only.
    spoiled, row = args[0].clone(), draw.randrange(tokens)
    spoiled[row, draw.randrange(spoiled.shape[1])] = torch.nan
    others = torch.arange(tokens) != row
    while True:
        yield
        (actual,) = run_out(op, out_impl(op), args)
        assert_within(actual, expected, bound, op)
        views(op, args, drawn)
        (beside,) = run_out(op, out_impl(op), (spoiled, *args[1:]))
        assert_same_bits(beside[others], actual[others], f"{op} beside a token that is NaN")
        if offsets is None or row < int(offsets[-1]):
            assert bool(beside[row].isnan().all()), f"{op} of a token that is NaN"


@checks("grouped_linear", "grouped_linear_transposed", "grouped_outer")
def _grouped(op: str, drawn: Drawn) -> Iterator[None]:
    tokens, experts, n, k = drawn.size(40), drawn.draw.randint(1, 6), drawn.size(60), drawn.size(60)
    dtype, ends = drawn.draw.choice(FLOATS), drawn.ends(tokens, experts)
    x, g = (torch.randn(tokens, size, generator=drawn.generator).to(dtype) for size in (k, n))
    w = torch.randn(experts, n, k, generator=drawn.generator).to(dtype)
    a, b = {"grouped_linear": (x, w), "grouped_linear_transposed": (g, w), "grouped_outer": (g, x)}[op]

    def meaning(a: Tensor, b: Tensor) -> Tensor:
        if op != "grouped_outer":
            return by_expert(a, b if op == "grouped_linear" else b.mT, ends)
        parts = [slice(start, end) for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
        return torch.stack([a[part].T @ b[part] for part in parts])

    expected, size = meaning(a.double(), b.double()), meaning(a.double().abs(), b.double().abs())
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    while True:
        yield
        (actual,) = run_out(op, out_impl(op), (a, b, ends))
        assert_within(actual, expected, rounded_bound(expected, 16 * unit * size, dtype) * 2, op)


@checks("linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_jvp", "linear_cross_entropy_hvp")
def _linear_cross_entropy(op: str, drawn: Drawn) -> Iterator[None]:
    """Compare in float64, where torch's derivatives of the plain formula are nearly exact."""
    tokens, features, vocabulary = drawn.size(20), drawn.size(30), drawn.size(300)
    hidden, weight, th, tw = (
        torch.randn(rows, features, generator=drawn.generator, dtype=torch.float64)
        for rows in (tokens, vocabulary, tokens, vocabulary)
    )  # fmt: skip
    targets, chunk = drawn.whole(0, vocabulary - 1, tokens), drawn.size(tokens + 2)
    if drawn.draw.random() < 0.3:
        targets[drawn.draw.randrange(tokens)] = -100
    g, tg = (torch.randn(tokens, generator=drawn.generator, dtype=torch.float64) for _ in range(2))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.T, targets, ignore_index=-100, reduction="none")

    def gradients(h: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(loss, h, w)[1](g)

    lse = torch.logsumexp(hidden @ weight.T, 1).masked_fill(targets == -100, 0.0)
    point = (hidden, weight, lse, targets, -100, chunk)
    args, expected = {
        "linear_cross_entropy": lambda: ((hidden, weight, targets, -100, chunk), (loss(hidden, weight), lse)),
        "linear_cross_entropy_backward": lambda: ((g, *point, True, True), gradients(hidden, weight, g)),
        "linear_cross_entropy_jvp": lambda: (
            (th, tw, *point), (torch.func.jvp(loss, (hidden, weight), (th, tw))[1],)
        ),
        "linear_cross_entropy_hvp": lambda: (
            (th, tw, tg, g, *point, True, True),
            (*torch.func.jvp(gradients, (hidden, weight, g), (th, tw, tg))[1],
             torch.func.jvp(loss, (hidden, weight), (th, tw))[1]),
        ),
    }[op]()  # fmt: skip
    size = 1e-12 * (tokens + vocabulary) * max(float((hidden.abs() @ weight.abs().T).max()), 1.0) ** 2
    while True:
        yield
        for actual, wanted in zip(as_tuple(getattr(torch.ops.qatkernels, op)(*args)), expected, strict=True):
            assert_within(actual, wanted, torch.full_like(wanted, size), op)


def run(campaign: Campaign) -> None:
    """Draw calls of each op and run each on every ISA. The ops share the time equally."""
    torch.set_num_threads(1)
    if missing := [op for op in OPS if op not in CHECKS]:
        raise RuntimeError(f"{missing[0]} has no check here: add one")
    here = isas()
    if campaign.seconds is not None:
        campaign.seconds /= len(campaign.chosen(OPS))
    campaign.say(f"on {', '.join(here)}")
    first = extension().build_info()["isa"] if here else ""
    try:
        campaign.each(OPS, lambda op: _called(campaign, op, here))
    finally:
        if here:
            use(first)


def _called(campaign: Campaign, op: str, here: list[str]) -> dict[str, Any]:
    began, cases, before = time.monotonic(), 0, len(campaign.failures)
    for case in campaign.numbers(op, CASES):
        cases += 1
        made = CHECKS[op](Drawn(campaign.draw(op, case)))
        isa = "drawing"
        try:
            next(made)
            for isa in here or [""]:
                use(isa) if here else None
                next(made)
        except Exception as error:
            campaign.fail(op, case, f"{isa}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    wrong = len(campaign.failures) - before
    return {"cases": cases, "isas": here, "wrong": wrong, "seconds": round(time.monotonic() - began, 1)}
