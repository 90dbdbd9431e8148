"""Quantization grids. A grid is a row of numbers; a scheme is a named family of grids.

With ``r = w / scale`` a grid maps a weight to an integer code and back:

    code = round(clamp(r, low, high) * steps - offset)        half to even
    y    = (code + offset) * (scale / steps)

A grid also has its straight-through rule: the range of r in which the gradient passes to w, and the derivative with
respect to the scale inside and outside that range. Kernels get these numbers (`Grid.constants`), not the name of a
scheme. So a new scheme needs a function and an entry in this file, and nothing else.

The rules of ``binary``, ``ternary``, ``seq`` and ``lsq`` are those of the code that the authors of ParetoQ released
(Liu et al., 2025); ``lsq`` is Learned Step Size Quantization (Esser et al., 2020). Their asymmetries are kept on
purpose, see docs/algorithms.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import (
    check_bools,
    check_integers,
    check_optional_integers,
    check_reals,
    check_strings,
    check_tensors,
    is_real,
    wrong_type,
)
from .arithmetic import quotient

#: Every kernel clamps scales to at least this. The gradient of the scale ignores that clamp (as ParetoQ's code does).
MIN_SCALE = 1e-5


def code_dtype(code_max: int) -> torch.dtype:
    """Return the dtype of codes whose largest one is ``code_max``."""
    return torch.uint8 if code_max > 127 else torch.int8


class GridConstants(NamedTuple):
    """The numbers of a grid that kernels get, as floats in this order."""

    by_sign: float  #: 1: the code is the sign of w (binary), and the clamp is not used
    steps: float  #: codes per scale
    offset: float  #: added to a code before it is scaled
    low: float  #: clamp of r
    high: float
    pass_low: float  #: the gradient reaches w where pass_low <= r <= pass_high
    pass_high: float
    below: float  #: d y / d scale where r < pass_low
    above: float  #: d y / d scale where r > pass_high
    residual: float  #: between them d y / d scale is y / scale - residual * r


@dataclass(frozen=True)
class Grid:
    """A quantization grid. :func:`paretoq`, :func:`make_grid` and the functions named like schemes return one.

    Attributes:
        scheme: name of the scheme in ``SCHEMES``.
        bits: nominal bit width (1.58 for ternary).
        code_min: smallest integer code.
        code_max: largest integer code.
        steps: codes per scale, ``m`` in docs/algorithms.md.
        offset: ``c`` in docs/algorithms.md; a half-integer for grids without the level zero.
        clamp: range that ``w / scale`` is clamped to.
        passes: pass-through range: the gradient passes to ``w`` if ``w / scale`` is in it.
        saturated: derivatives with respect to the scale below and above ``passes``.
        residual: whether the derivative with respect to the scale inside ``passes`` contains ``- w / scale``.
        by_sign: whether the code is the sign of the weight.
        has_zero_point: whether codes may be shifted by a zero point.
        qmax: the ``Q_p`` in the gradient scale.
        reach: ``w / scale`` of the weight with the largest magnitude, after :meth:`init_scale` by ``"max"``.
        scale_init: default method of :meth:`init_scale`.

    Raises:
        TypeError: if a field has another type, naming it.
        ValueError: if a field has a value that kernels cannot use: not finite, steps that are not positive, a range
            whose low end is above its high end, codes that do not fit a byte, or a clamp that reaches beyond the codes.
    """

    scheme: str
    bits: float
    code_min: int
    code_max: int
    steps: float
    offset: float
    clamp: tuple[float, float]
    passes: tuple[float, float]
    saturated: tuple[float, float]
    residual: bool = True
    by_sign: bool = False
    has_zero_point: bool = False
    qmax: int = 1
    reach: float = 1.0
    scale_init: str = "max"

    def __post_init__(self) -> None:
        check_strings(scheme=self.scheme, scale_init=self.scale_init)
        check_integers(code_min=self.code_min, code_max=self.code_max, qmax=self.qmax)
        check_bools(residual=self.residual, by_sign=self.by_sign, has_zero_point=self.has_zero_point)
        ranges = {name: _as_range(name, getattr(self, name)) for name in ("clamp", "passes", "saturated")}
        numbers = {name: getattr(self, name) for name in ("bits", "steps", "offset", "reach")}
        check_reals(**numbers)
        for name, value in (*numbers.items(), *((name, end) for name, ends in ranges.items() for end in ends)):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite")
        for name in ("bits", "steps", "reach", "qmax"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")
        for name in ("clamp", "passes"):
            low, high = ranges[name]
            if low > high:
                raise ValueError(f"{name} is {(low, high)}, must be (low, high) with low <= high")
        self._check_codes()

    def _check_codes(self) -> None:
        """Raise ValueError unless all codes fit a byte, and the clamp reaches only codes of the grid."""
        low, high = self.code_min, self.code_max
        if not (-128 <= low <= high <= 127 or 0 <= low <= high <= 255):
            raise ValueError(
                f"code_min is {low} and code_max is {high}, must ascend within -128 to 127 (int8) or 0 to 255 (uint8)"
            )
        if self.by_sign:
            if (low, high) != (-1, 0):
                raise ValueError(f"codes are {low} to {high} with by_sign, must be -1 to 0")
            return
        reached = tuple(round(end * self.steps - self.offset) for end in self.clamp)
        if reached[0] < low or reached[1] > high:
            raise ValueError(
                f"clamp is {self.clamp}, which reaches codes {reached[0]} to {reached[1]} at {self.steps} steps and an "
                f"offset of {self.offset}, must stay within code_min and code_max, {low} to {high}"
            )

    @property
    def constants(self) -> GridConstants:
        """The numbers that kernels get."""
        ends = (*self.clamp, *self.passes, *self.saturated)
        return GridConstants(*[float(x) for x in (self.by_sign, self.steps, self.offset, *ends, self.residual)])

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return self.code_max - self.code_min + 1

    @property
    def storage_bits(self) -> int:
        """Number of bits that can store every code."""
        return (self.levels - 1).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of codes: int8, or uint8 if a code is above 127."""
        return code_dtype(self.code_max)

    @property
    def values(self) -> tuple[float, ...]:
        """Every representable value divided by the scale, ascending (zero point 0)."""
        return tuple((k + self.offset) / self.steps for k in range(self.code_min, self.code_max + 1))

    def grad_scale(self, numel: int) -> float:
        """Return the gradient scale ``1 / sqrt(numel * qmax)`` of the step size.

        Args:
            numel: number of elements of the whole weight, even if scales are per row or per group.

        Returns:
            The factor that multiplies the gradient of the scale (Esser et al., 2020, section 2.2).
        """
        check_integers(numel=numel)
        return 1.0 / math.sqrt(max(numel, 1) * self.qmax)

    def init_scale(
        self, w: Tensor, group_size: int | None = None, *, per_tensor: bool = False, method: str | None = None
    ) -> Tensor:
        """Return initial scales for a weight.

        Args:
            w: weight ``[..., K]``; a row is along the last dimension.
            group_size: number of consecutive elements of a row that share a scale; must divide ``K``. None for one
                scale per row.
            per_tensor: whether the whole weight has one scale.
            method: ``"max"`` (largest magnitude over ``reach``), ``"mean"`` (mean magnitude), ``"lsq"``
                (``2 * mean / sqrt(qmax)``) or ``"range"`` (from minimum to maximum, including zero); the default of the
                scheme if None.

        Returns:
            float32 scales (float64 for float64 weights) of shape ``[]``, ``[...]`` or ``[..., K / group_size]``, at
            least ``MIN_SCALE``.

        Raises:
            TypeError: if an argument has another type, naming it.
            ValueError: if ``group_size`` does not divide ``K``, or ``method`` is unknown.
        """
        if method is not None:
            check_strings(method=method)
        check_bools(per_tensor=per_tensor)
        blocks = _blocks(w, group_size, per_tensor)
        method = method or self.scale_init
        if method == "max":
            scale = quotient(blocks.abs().amax(-1), self.reach)
        elif method == "mean":
            scale = blocks.abs().mean(-1)
        elif method == "lsq":
            scale = quotient(2 * blocks.abs().mean(-1), math.sqrt(self.qmax))
        elif method == "range":
            span = blocks.amax(-1).clamp_min(0) - blocks.amin(-1).clamp_max(0)
            scale = span * (self.steps / (self.levels - 1))
        else:
            raise ValueError(f"method is {method!r}, must be 'max', 'mean', 'lsq' or 'range'")
        return scale.clamp_min(MIN_SCALE)

    def init_zero_point(self, w: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
        """Return zero points such that the smallest weight that shares a scale gets the smallest code.

        Args:
            w: weight ``[..., K]``.
            scale: scales from :meth:`init_scale`.
            group_size: the argument of :meth:`init_scale`.

        Returns:
            Integral zero points with the shape and dtype of ``scale``.

        Raises:
            ValueError: if the scheme has no zero point.
        """
        check_tensors(w=w, scale=scale)
        if not self.has_zero_point:
            raise ValueError(f"scheme {self.scheme!r} has no zero point, only 'affine' has")
        low = _blocks(w, group_size, per_tensor=scale.ndim == 0).amin(-1).clamp_max(0)
        return (self.code_min - low / scale).round().clamp(self.code_min, self.code_max)


def _as_range(name: str, value: object) -> tuple[float, float]:
    """Return a pair of numbers, or raise TypeError."""
    if not (isinstance(value, tuple) and len(value) == 2 and all(map(is_real, value))):
        raise wrong_type(name, value, "a tuple of two numbers")
    return value


def _blocks(w: Tensor, group_size: int | None, per_tensor: bool) -> Tensor:
    """Return w such that the elements of the last dimension share a scale, in float32 or float64."""
    check_tensors(w=w)
    check_optional_integers(group_size=group_size)
    if not w.is_floating_point() or w.ndim == 0 or w.numel() == 0:
        raise ValueError(f"w is {w.dtype} of shape {tuple(w.shape)}, must be a floating point tensor with elements")
    w = w.detach()
    w = w if w.dtype == torch.float64 else w.float()
    if per_tensor:
        if group_size is not None:
            raise ValueError(f"group_size is {group_size} with per_tensor=True, give one of them")
        return w.reshape(-1)
    if group_size is None:
        return w
    check_group_size(group_size, w.shape[-1])
    return w.reshape(*w.shape[:-1], w.shape[-1] // group_size, group_size)


def check_grid(grid: object) -> None:
    """Raise TypeError unless this is a Grid."""
    if not isinstance(grid, Grid):
        raise wrong_type("grid", grid, "a Grid such as qatkernels.grids.lsq(4)")


def check_group_size(group_size: int, features: int) -> None:
    """Raise TypeError or ValueError unless ``group_size`` is a positive divisor of ``features``."""
    check_integers(group_size=group_size)
    if group_size < 1 or features % group_size:
        raise ValueError(f"group_size is {group_size}, must be a positive divisor of the input features ({features})")


def binary(bits: float = 1) -> Grid:
    """1 bit: the sign of the weight. Zero becomes +1; ParetoQ's code gives 0, which one bit cannot store."""
    _check_bits("binary", bits, (1,))
    one = (-1.0, 1.0)
    return Grid("binary", 1, -1, 0, 0.5, 0.5, one, one, one, residual=False, by_sign=True, scale_init="mean")


def ternary(bits: float = 1.58) -> Grid:
    """1.58 bits: the levels -2/3, 0 and 2/3 times the scale."""
    _check_bits("ternary", bits, (1.58,))
    edge = (-0.99, 0.99)
    return Grid("ternary", 1.58, -1, 1, 1.5, 0.0, edge, edge, (-1.0, 1.0))


def seq(bits: float = 2) -> Grid:
    """Stretched elastic quantization: ``2**bits`` levels, symmetric about zero but without zero.

    At 2 bits they are -3/4, -1/4, 1/4 and 3/4 times the scale.
    """
    width: int = _check_bits("seq", bits, range(2, 9))
    half = 2 ** (width - 1)
    edge, outermost = (-0.99, 0.99), (half - 0.5) / half
    return Grid("seq", width, -half, half - 1, float(half), 0.5, edge, edge, (-outermost, outermost), qmax=half - 1)


def lsq(bits: float) -> Grid:
    """Learned step size quantization: the integers from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1`` times the scale."""
    width: int = _check_bits("lsq", bits, range(2, 9))
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    ends = (float(low), float(high))
    return Grid("lsq", width, low, high, 1.0, 0.0, ends, ends, ends, qmax=high, reach=float(high))


def affine(bits: float) -> Grid:
    """Integers from 0 to ``2**bits - 1`` minus a zero point (0 if none is given), times the scale.

    Without a zero point this is LSQ's unsigned grid for activations. With a learned zero point it is LSQ+ (Bhalgat et
    al., 2020).
    """
    width: int = _check_bits("affine", bits, range(2, 9))
    high = 2**width - 1
    ends = (0.0, float(high))
    return Grid(
        "affine", width, 0, high, 1.0, 0.0, ends, ends, ends,
        has_zero_point=True, qmax=high, reach=float(high), scale_init="range",
    )  # fmt: skip


#: All schemes by name. A new scheme needs a function above and an entry here.
SCHEMES: dict[str, Callable[[float], Grid]] = {
    "binary": binary,
    "ternary": ternary,
    "seq": seq,
    "lsq": lsq,
    "affine": affine,
}


def paretoq(bits: float) -> Grid:
    """Return ParetoQ's grid for a bit width: binary at 1, ternary at 1.58, seq at 2, lsq above (Liu et al., 2025).

    Args:
        bits: 1, 1.58, 2, 3, 4, 5, 6 or 8.

    Raises:
        ValueError: for any other bit width.
    """
    _check_bits("paretoq", bits, (1, 1.58, 2, 3, 4, 5, 6, 8))
    small: dict[float, Callable[[float], Grid]] = {1: binary, 1.58: ternary, 2: seq}
    return small.get(bits, lsq)(bits)


def make_grid(scheme: str, bits: float) -> Grid:
    """Return the grid of a named scheme: a key of ``SCHEMES``, or ``"paretoq"``.

    Raises:
        TypeError: if ``scheme`` is not a string, or ``bits`` not a number.
        ValueError: if the scheme is unknown or does not exist at this bit width.
    """
    check_strings(scheme=scheme)
    if scheme == "paretoq":
        return paretoq(bits)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}, must be 'paretoq' or one of {sorted(SCHEMES)}")
    return SCHEMES[scheme](bits)


def _check_bits(scheme: str, bits: float, allowed: Iterable[float]) -> Any:
    """Return ``bits``, as an int if it is integral. Raise TypeError or ValueError if the scheme does not have it."""
    check_reals(bits=bits)
    allowed = tuple(allowed)
    if bits not in allowed:
        raise ValueError(f"bits is {bits!r}, {scheme!r} exists for {', '.join(map(str, allowed))} bits")
    return int(bits) if bits == int(bits) else bits
