"""A model whose weights stay sharded: every layer gathers its own when it runs, and again in every derivative.

FSDP2's hooks gather the weights of a module for its forward and once more for its backward. A Hessian-vector product
needs them a third and a fourth time. So the hooks are left out here, and two things take their place:

- A copy of the model shares the shards with it, as plain leaves of autograd. Where a module reads a parameter,
  `_Gather` returns the whole of it. Its derivative is `_Reduce`, which adds gradients over the processes and leaves
  each its shard. Each of the two is the other's transpose, so derivatives of any order gather and reduce.
- Autograd would keep the gathered weights, and the quantized ones. So every layer is checkpointed (``checkpoint.py``):
  of a layer autograd keeps its inputs and its shards, and both derivatives run it again, which gathers again. No more
  than one layer is whole at a time. What is read outside of its layer, such as the weight of a head by the loss, is
  kept as autograd keeps it.

Every process computes the derivative of the sum of the losses of all processes with respect to its own shards. In that
sum a vector is as it was before: what is along the shards of one process is along those elements of the whole.

The collectives of all processes match if all run the same layers in the same order. Autograd runs the nodes of one
device in one thread, the newest first, so that the same graph gives the same order in each process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..dtensor import is_dtensor, is_fsdp
from ..nn._gather_model import copy_whole, reshard
from ..nn.quantized import Quantized
from ._hvp import WEIGHT_NORM
from .checkpoint import checkpointed_forward

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: What to do instead, for errors.
WHOLE = "give it qatkernels.nn.gather_model(model), a whole copy in every process"


@dataclass(frozen=True)
class Layout:
    """How a parameter lies in the processes.

    Attributes:
        mesh: all processes.
        placements: torch's Shard or Replicate for each dimension of the mesh.
        shape: shape of the whole parameter.
        stride: its strides.
        device: where shards are.
    """

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    def gather(self, shard: Tensor) -> Tensor:
        """Return the whole of a tensor, as a new one. All processes must call this."""
        from torch.distributed.tensor import DTensor

        if not any(p.is_shard() for p in self.placements):
            return shard.clone()
        sharded = DTensor.from_local(
            shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        return sharded.full_tensor()

    def reduce(self, full: Tensor) -> Tensor:
        """Return this process's shard of the sum over the processes. All processes must call this."""
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(full.contiguous(), self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
        return parts.redistribute(placements=self.placements).to_local()

    def cut(self, full: Tensor) -> Tensor:
        """Return this process's shard of a tensor that it has as a whole."""
        for i, placement in enumerate(self.placements):
            if placement.is_shard():
                full = _chunk(full, self.mesh.size(i), self.mesh.get_local_rank(i), placement.dim)
        return full

    @functools.cached_property
    def _copies(self) -> list[int]:
        """Dimensions of the mesh along which processes hold the same."""
        return [i for i, p in enumerate(self.placements) if not p.is_shard() and self.mesh.size(i) > 1]

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """Elements of this process's shard, then of its part of them after each of the dimensions of `_copies`."""
        lengths = [self.cut(torch.empty(self.shape, device="meta")).numel()]
        for i in self._copies:
            part = _chunk(torch.empty(lengths[-1], device="meta"), self.mesh.size(i), self.mesh.get_local_rank(i))
            lengths.append(part.numel())
        return lengths

    @property
    def share_length(self) -> int:
        """Number of elements that are this process's alone."""
        return self._lengths[-1]

    def share(self, shard: Tensor) -> Tensor:
        """Return those elements of a shard, flat, that are this process's alone: others may hold the same shard."""
        flat = shard.reshape(-1)
        for i in self._copies:
            flat = _chunk(flat, self.mesh.size(i), self.mesh.get_local_rank(i))
        return flat

    def spread(self, share: Tensor) -> Tensor:
        """Return the shard, flat, from what :meth:`share` returns. All processes must call this."""
        for i, length in zip(reversed(self._copies), reversed(self._lengths[:-1]), strict=True):
            count = self.mesh.size(i)
            padded = share.new_zeros(-(-length // count))  # chunks are so long, but for the last
            padded[: share.numel()] = share
            together = share.new_empty(len(padded) * count)
            dist.all_gather_into_tensor(together, padded, self.mesh.get_group(i))
            share = together[:length]
        return share


def _chunk(tensor: Tensor, parts: int, index: int, dim: int = 0) -> Tensor:
    """Return one of the parts into which `torch.chunk` splits. It may make fewer than asked for: the rest is empty."""
    chunks = tensor.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


class _Gather(torch.autograd.Function):
    """A whole parameter from the shards of the processes. Its derivative is `_Reduce`."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.gather(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Reduce.apply(grad, ctx.layout), None


class _Reduce(torch.autograd.Function):
    """The shards of a sum over the processes. Its derivative is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.reduce(full)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gather.apply(grad, ctx.layout), None


class _Gathering:
    """Put in front of the class of a module: its parameters are gathered where they are read."""

    _layouts: dict[str, Layout]
    #: What has been gathered in this run of the layer, by name; None outside of a run, where nothing is held.
    _held: dict[str, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        layouts = self.__dict__.get("_layouts", {})
        if name not in layouts:
            return super().__getattr__(name)  # type: ignore[misc]
        shard, held = self.__dict__["_parameters"][name], self.__dict__["_held"]
        if held is None:
            return _Gather.apply(shard, layouts[name])
        if name not in held:
            held[name] = _Gather.apply(shard, layouts[name])
        return held[name]


@functools.cache
def _gathering(cls: Any) -> type:
    return type(cls.__name__, (_Gathering, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class ShardedCopy:
    """A copy of a sharded model that shares its shards and gathers each layer when it runs.

    Args:
        model: the model, resharded; see :func:`check_sharded`.
        params: its parameters to differentiate with respect to. All others are constant.
        dtype: dtype of the copy; scales stay float32.

    Attributes:
        model: the copy. Its parameters are this process's shards.
        params: those of the copy.
        layers: its modules that gather parameters. They are checkpointed.
        layouts: how each of ``params`` lies in the processes.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], dtype: torch.dtype) -> None:
        mesh = next(p.device_mesh for p in model.parameters() if is_dtensor(p))
        wanted = {id(p) for p in params}
        shards, layouts = dict[int, Tensor](), dict[int, Layout]()
        for p in model.parameters():
            if is_dtensor(p) or id(p) in wanted:
                layouts[id(p)] = _layout(p, mesh)
            shard = (p.to_local() if is_dtensor(p) else p).detach().as_subclass(Tensor)
            shards[id(p)] = nn.Parameter(shard, p.requires_grad and id(p) in wanted)
        self.model = copy_whole(model, {}, shards)
        if any(p.dtype != dtype for p in params):
            self.model.to(dtype)
        self.params = [shards[id(p)] for p in params]
        self.layouts = [layouts[id(p)] for p in params]
        of_shards = {id(shards[key]): layout for key, layout in layouts.items()}
        for module in self.model.modules():
            own = {n: of_shards[id(p)] for n, p in module._parameters.items() if id(p) in of_shards}
            if own:
                cls: Any = type(module)
                module.__class__ = _gathering(cls)
                module.__dict__.update(_layouts=own, _held=None)
        self.layers = [layer for layer in _layers(self.model) if _gatherers(layer)]
        for layer in self.layers:
            layer.forward = _holding(layer)
            # For good, and not for a forward alone: torch.utils.checkpoint around layers runs them again in backwards.
            layer.forward = checkpointed_forward(layer)


def _layout(p: Any, mesh: DeviceMesh) -> Layout:
    from torch.distributed.tensor import Replicate

    if is_dtensor(p):
        return Layout(p.device_mesh, tuple(p.placements), p.shape, p.stride(), p.device)
    return Layout(mesh, (Replicate(),) * mesh.ndim, p.shape, p.stride(), p.device)


def _gatherers(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if isinstance(m, _Gathering)]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute with parameters of their own, of which each is gathered by itself.

    A module that has parameters and modules with parameters is none of them, but for those that read the parameters of
    the modules in them: its own are gathered wherever it reads them.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        inner = any(True for child in module.children() for _ in child.parameters())
        owns = any(p is not None for p in module._parameters.values())
        reads_inner = isinstance(module, (Quantized, nn.MultiheadAttention)) or parametrize.is_parametrized(module)
        # Old hooks such as weight_norm's compute the weight before the forward, which alone is checkpointed.
        computed = any(hasattr(hook, "apply") for hook in module._forward_pre_hooks.values())
        if (reads_inner or (owns and not inner)) and not computed:
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return list(dict.fromkeys(found))


def _holding(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward of a layer; what it gathers is held until its end, so that it is gathered once."""
    forward, gatherers = layer.forward, _gatherers(layer)

    def holding(*args: Any, **kwargs: Any) -> Any:
        for module in gatherers:
            module.__dict__["_held"] = {}
        try:
            return forward(*args, **kwargs)
        finally:
            for module in gatherers:
                module.__dict__["_held"] = None

    return holding


def resharded(model: nn.Module, params: Sequence[Tensor]) -> list[Tensor]:
    """Reshard a model and check that its shards will do; return the shards of ``params``.

    After a forward a root keeps what it has gathered: then its ``parameters()`` are whole until it is resharded.

    Raises:
        ValueError: if not ``fully_shard`` alone has sharded it, over all processes.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    reshard(model)
    check_sharded(model)
    shards = dict(model.named_parameters())
    return [shards.get(names.get(id(p), ""), p) for p in params]


def check_sharded(model: nn.Module) -> None:
    """Raise ValueError unless ``fully_shard`` alone has sharded a model, over all processes.

    Args:
        model: a sharded model, resharded.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not any(map(is_fsdp, model.modules())):
        raise ValueError(f"the model is sharded by something else than fully_shard: {WHOLE}")
    processes = dist.get_world_size()
    for name, p in model.named_parameters():
        if not is_dtensor(p):
            continue
        problem = None
        if p.device_mesh.size() != processes:
            problem = f"is sharded over {p.device_mesh.size()} of {processes} processes, must be over all"
        elif [type(placement) for placement in p.placements] != [Replicate] * (p.device_mesh.ndim - 1) + [Shard]:
            problem = f"is sharded as {p.placements}, must be as fully_shard alone does"
        elif p.device.type != p.device_mesh.device_type:
            problem = f"has its shards on {p.device.type} (CPUOffloadPolicy), must have them on the mesh's device"
        if problem:
            raise ValueError(f"{name} {problem}: {WHOLE}")


def check_differentiable_twice(
    model: nn.Module, params: Sequence[Tensor], engine: str, distributed: bool | None
) -> None:
    """Raise ValueError if products with the Hessian of a sharded model cannot be computed on its shards."""
    if engine != "reverse":
        raise ValueError(f"engine is {engine!r}, must be 'reverse' for a model that is sharded; or {WHOLE}")
    if distributed is False:
        raise ValueError(
            "distributed is False, must be None or True for a model that is sharded, whose layers all processes gather "
            f"together; or {WHOLE}"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"{name or 'the model'} keeps a list of its weights, which cannot be gathered where it runs: {WHOLE}"
            )
    _check_weight_norm(model, params)


def _check_weight_norm(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Raise ValueError if ``params`` holds a direction of weight_norm, which a checkpointed layer hides elsewhere."""
    wanted = {id(p) for p in params}
    for module in model.modules():
        owned: Mapping[str, Any] = module._parameters
        hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm"]
        directions = [owned.get(f"{hook.name}_v") for hook in hooks]
        if isinstance(module, parametrize.ParametrizationList):
            directions += [owned.get("original1") for part in module if type(part).__name__ == "_WeightNorm"]
        if any(id(v) in wanted for v in directions if v is not None):
            raise ValueError(WEIGHT_NORM)
