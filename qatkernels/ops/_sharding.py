"""How ops are computed on DTensors: which arguments may be sharded together, along one dimension of the mesh.

A weight may be sharded along any dimension. Scales and zero points are sharded with it where they follow its rows or
groups, and every process needs all of them where a row is split. Then each process has a part of their gradient, and
the sum is the gradient. Noise is a function of the element's position in the whole weight, so calls with a seed are
not sharded: torch gathers the weight.

torch is given these rules when the library sees the first DTensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..dtensor import RULES, Shardings, follows
from ._fake_quantize import BACKWARD, DUAL, FORWARD, JVP
from ._op import Op
from ._quantize import DEQUANTIZE, QUANTIZE
from .dynamic import DYNAMIC

#: Arguments that are like the weight, and that are like the scale.
_WEIGHTS, _SCALES = ("w", "codes", "g", "tangent_w"), ("scale", "zero_point", "tangent_scale", "tangent_zero_point")


def _placements(weight: Any, scale: Any, seed: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield placements of the weight, of its scales, and of the gradients of the scales."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    yield Replicate(), Replicate(), Replicate()
    for dim in range(weight.ndim if seed is None else 0):
        split = follows(scale.shape, weight.shape, dim, weight.mesh.size())
        if split is not None:
            yield (Shard(dim), Shard(dim), Shard(dim)) if split else (Shard(dim), Replicate(), Partial())


def _of_weight(op: Op, *args: Any) -> Shardings:
    """Return how a call of an op with a weight and scales may be sharded."""
    from torch.distributed.tensor import Replicate

    names = list(op.parameters)
    given = dict(zip(names, args, strict=False))
    weight = given["codes"] if op is DEQUANTIZE else given["w"]
    found: Shardings = []
    for w, s, ds in _placements(weight, given["scale"], given.get("seed")):
        inputs = [
            None if not kind.startswith("Tensor") or given.get(name) is None
            else w if name in _WEIGHTS
            else s if name in _SCALES
            else Replicate()
            for name, kind in op.parameters.items()
        ]  # fmt: skip
        if op is BACKWARD:
            outputs = [w, ds, Replicate() if given["zero_point"] is None else ds]  # the former is empty
        else:
            outputs = [w] * len(op.outputs)
        found.append((outputs, inputs))
    return found


def _of_tokens(x: Any, bits: int) -> Shardings:
    """Return how tokens, each with a scale of its own, may be sharded: between tokens."""
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, None]) for p in (Replicate(), *(Shard(i) for i in range(x.ndim - 1)))]


def _rule(op: Op) -> Any:
    return lambda *args: _of_weight(op, *args)


for _op in (FORWARD, BACKWARD, JVP, DUAL, QUANTIZE, DEQUANTIZE):
    RULES[_op.overload] = _rule(_op)
RULES[DYNAMIC.overload] = _of_tokens
