"""The product with weights of which each process has some of the rows, columns or experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dtensor import is_dtensor, part_of_sum

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: ``product(x, *parts, bias)``, of tensors that are all here.
Product = Callable[..., Tensor]


def sharded_product(x: Tensor, parts: Sequence[DTensor | None], bias: Tensor | None, product: Product) -> Tensor:
    """Return the product: by rows of the weight sharded along its last dimension, by columns a sum, by experts as is.

    Every process multiplies with what it has of the weight. Only activations are exchanged.

    Args:
        x: activations ``[..., K]``. A tensor that is no DTensor counts as the same in every process; where experts are
            sharded it has the tokens of the experts that are here, and so has the product.
        parts: the weight ``[..., N, K]``, or its codes, on a mesh of one dimension, and what belongs to it: scales and
            zero points, sharded with it or whole. Its dimensions may be one more, the experts.
        bias: ``[N]`` or None; None for experts.
        product: computes the product of a process.

    Raises:
        ValueError: if the mesh has several dimensions.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    weight: Any = parts[0]
    mesh, (placement, *others) = weight.device_mesh, weight.placements
    if others:
        raise ValueError(f"the weight is on a mesh of {mesh.ndim} dimensions, must be on a mesh of one")
    here = [None if part is None else part.to_local() for part in parts]
    split = placement.dim - weight.ndim if isinstance(placement, Shard) else None
    if split == -3:
        return product(x, *here, bias)
    if not is_dtensor(x):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    sharded: Any = x
    last = x.ndim - 1
    if split == -1:
        columns = sharded.redistribute(mesh, [Shard(last)]).to_local()
        bias = None if bias is None else part_of_sum(bias)
        return DTensor.from_local(product(columns, *here, bias), mesh, [Partial()], run_check=False)
    by_rows = split is not None
    # Each process has a part of the gradient of x if it multiplies with some of the rows.
    given = sharded.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial() if by_rows else Replicate()])
    if is_dtensor(bias):
        bias = bias.redistribute(mesh, [Shard(0) if by_rows else Replicate()]).to_local()
    y = product(given, *here, bias)
    return DTensor.from_local(y, mesh, [Shard(last) if by_rows else Replicate()], run_check=False)
