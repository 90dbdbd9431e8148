"""Packed products of several bit widths in one race: the speedup of fewer bits at one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from qatkernels.grids import paretoq
from qatkernels.ops import PackedWeight, lowbit_linear
from qatkernels.testing.samples import weights

from ..case import Call, Case, Settings
from .lowbit import TOLERANCE, product


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """Yield the builder of the only case."""
    yield partial(build, settings)


def build(settings: Settings) -> Case:
    """Return the case: weights larger than any cache, one token."""
    features = 64 if settings.quick else 16384
    w = weights((features, features), torch.float32, settings.device)
    x = torch.randn(1, features, generator=torch.Generator().manual_seed(3)).to(settings.device, torch.bfloat16)
    calls = []
    for bits in (4, 2, 1):
        packed = PackedWeight.from_float(w, paretoq(bits).init_scale(w), paretoq(bits))
        kind: Literal["ours", "baseline"] = "baseline" if bits == 4 else "ours"
        note = f"{packed.nbytes / 1e6:.1f} MB"
        calls += [
            Call(f"{bits} bits", lambda p=packed: lowbit_linear(x, p), kind,  # type: ignore[misc]
                 expected=lambda p=packed: (product(x, p.dequantize()),), note=note),  # type: ignore[misc]
            Call(f"{bits} bits, A8", lambda p=packed: lowbit_linear(x, p, act_bits=8), kind,  # type: ignore[misc]
                 unchecked="activations of 8 bits", note=note),
        ]  # fmt: skip
    return Case(
        "widths in turn", (features, features), x.dtype, calls, lambda: (None,), (TOLERANCE[x.dtype],),
        features**2 // 2, flops=2 * features**2, product_dtype=x.dtype, grid="paretoq", granularity="per row",
        variant="1 tokens",
    )  # fmt: skip
