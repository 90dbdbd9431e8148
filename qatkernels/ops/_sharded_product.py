"""The product with a packed weight whose rows or columns are spread over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dtensor import is_dtensor
from .dynamic import fake_quantize_dynamic

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: ``product(x, packed, scale, zero_point, bias, act_bits)``, of tensors that are all here.
Product = Callable[..., Tensor]


def sharded_product(
    x: Tensor, packed: DTensor, scale: DTensor, zero_point: DTensor | None, bias: Tensor | None, act_bits: int | None,
    product: Product,
) -> Tensor:  # fmt: skip
    """Return the product as a DTensor: by rows of the weight sharded along its last dimension, by columns a sum.

    Every process multiplies with the codes that it has. Only activations are exchanged.

    Args:
        x: activations ``[..., K]``. A tensor that is no DTensor counts as the same in every process.
        packed: codes on a mesh of one dimension, whole or sharded along rows or columns.
        scale: scales, sharded with them or whole.
        zero_point: likewise, or None.
        bias: ``[N]`` or None.
        act_bits: as for ``lowbit_linear``. Where columns are sharded, tokens are quantized whole, and then multiplied
            as numbers and not as integers.
        product: computes the product of a process.

    Raises:
        ValueError: if the mesh has several dimensions, or a stack of experts is sharded.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, (placement, *others) = packed.device_mesh, packed.placements
    if others or packed.ndim != 2:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)} on a mesh of {mesh.ndim} dimensions, must be [N, bytes] on one"
        )
    if not is_dtensor(x):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    sharded: Any = x
    parts: list[Any] = [packed.to_local(), scale.to_local(), None if zero_point is None else zero_point.to_local()]
    last = x.ndim - 1
    if isinstance(placement, Shard) and placement.dim == 1:
        if act_bits is not None:
            sharded = fake_quantize_dynamic(x, act_bits)
        columns = sharded.redistribute(mesh, [Shard(last)]).to_local()
        total = DTensor.from_local(product(columns, *parts, None, None), mesh, [Partial()], run_check=False)
        return total if bias is None else total.redistribute(mesh, [Replicate()]) + bias
    by_rows = isinstance(placement, Shard)
    # Each process has a part of the gradient of x if it multiplies with some of the rows.
    given = sharded.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial() if by_rows else Replicate()])
    here = Shard(0) if by_rows else Replicate()
    if is_dtensor(bias):
        bias = bias.redistribute(mesh, [here]).to_local()
    y = product(given, *parts, bias, act_bits)
    return DTensor.from_local(y, mesh, [Shard(last) if by_rows else Replicate()], run_check=False)
