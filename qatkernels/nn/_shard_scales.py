"""Scales that FSDP2 does not manage, so that its mixed precision does not round them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .._torch_compat import joined_meshes
from ..dtensor import is_dtensor, is_fsdp
from ..float32_scales import Float32Scales

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def shard_scales(model: nn.Module, mesh: DeviceMesh | None = None) -> set[nn.Parameter]:
    """Shard the scales and zero points of a model, in place, and return them as FSDP2's ``ignored_params``.

    ``fully_shard`` with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` casts every parameter that it manages.
    A scale in bfloat16 would be off by up to 1/256, and so would every weight of its row. Parameters in
    ``ignored_params`` are not cast. Every forward gathers them in float32, and every backward reduces their gradients
    in float32 to the mean over the processes, as FSDP2 does with the others.

        ignored = shard_scales(model, mesh)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)

    Scales are then DTensors like the other parameters, so that optimizers, the clipping of gradients and
    ``torch.distributed.checkpoint`` treat them alike. Learned scales of inputs and outputs are included.

    Args:
        model: a quantized model, after ``parallelize_module``, if that is called, and before any ``fully_shard``.
        mesh: the mesh that is given to ``fully_shard``; all processes in one dimension if None. With two dimensions,
            scales are replicated along the first and sharded along the second, as FSDP2 does (HSDP). Scales that
            tensor or expert parallel has sharded stay so, and are replicated along this mesh.

    Returns:
        The new Parameters. Make the optimizer after this call.

    Without ``ignored_params`` ``fully_shard`` takes the new Parameters too, and fails on them.

    Raises:
        TypeError: if ``mesh`` is no DeviceMesh.
        ValueError: if the model has no scale, ``fully_shard`` has been called already, or tensor or expert parallel
            has sharded the model and ``mesh`` is None.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    modules = [m for m in model.modules() if isinstance(m, Float32Scales) and m._parameters.get("scale") is not None]
    if not modules:
        raise ValueError("the model has no quantized layer: call quantize_model first")
    if any(map(is_fsdp, model.modules())) or any(module.scales_apart for module in modules):
        raise ValueError("the model is sharded already: call shard_scales before fully_shard")
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is {mesh!r}, must be a DeviceMesh, the one that fully_shard is given, or None")
    if mesh is None and any(map(is_dtensor, model.parameters())):
        raise ValueError(
            "mesh is None with a model that is sharded by tensor or expert parallel, must be the mesh that fully_shard "
            'is given, such as mesh["dp"]'
        )
    if mesh is None:
        mesh = init_device_mesh(modules[0].scale.device.type, (dist.get_world_size(),))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        module.scales_apart = mesh.ndim
        for name in ("scale", "zero_point"):
            if (old := module._parameters.get(name)) is None:
                continue
            if old not in new:
                values = old.detach()
                sharded = _on_both(values, mesh) if is_dtensor(values) else distribute_tensor(values, mesh, placements)
                new[old] = nn.Parameter(sharded, requires_grad=old.requires_grad)
            module._parameters[name] = new[old]
    return set(new.values())


def _on_both(scale: DTensor, mesh: DeviceMesh) -> DTensor:
    """Return scales on the mesh of FSDP2 and that on which they are, as the other parameters will be."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [*[Replicate()] * mesh.ndim, *scale.placements]
    return DTensor.from_local(
        scale.to_local(), joined_meshes([mesh, scale.device_mesh]), placements, run_check=False, shape=scale.shape,
        stride=scale.stride(),
    )  # fmt: skip
