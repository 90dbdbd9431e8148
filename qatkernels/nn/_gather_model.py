"""Whole copies of models that fully_shard or parallelize_module has sharded."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor, is_fsdp, whole
from .quantized import Quantized

#: Where the hooks of torch's engines come from, and how their attributes of modules begin.
_ENGINES = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed._composable")
_ATTRIBUTES = (
    "__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module", "_levels",
)  # fmt: skip


def gather_model(model: nn.Module) -> nn.Module:
    """Return a copy of a sharded model that is whole in every process and knows nothing of the others.

    Use it for what needs whole weights, such as :func:`qatkernels.hessian.hvp`. The sharded model stays as it is. Every
    parameter is gathered, so each process needs the memory of the whole model. :func:`pack_model` gathers one quantized
    weight at a time, and :class:`qatkernels.hessian.HessianOperator` one layer, so give them the sharded model itself.

    Args:
        model: a model after ``fully_shard`` (FSDP2) or ``parallelize_module``. All processes must call this.

    Raises:
        ValueError: if the model is not sharded.
    """
    if not is_sharded(model):
        raise ValueError("the model is not sharded: it is whole already")
    return copy_whole(model, {})


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` manages a module of a model, or a parameter or buffer (packed codes) is a DTensor."""
    return any(map(is_fsdp, model.modules())) or any(map(is_dtensor, (*model.parameters(), *model.buffers())))


def whole_in_every_process(model: nn.Module) -> str:
    """Return what to call, for an error of something that takes whole models only."""
    call = "pack_model(model)" if any(isinstance(m, Quantized) for m in model.modules()) else "nn.gather_model(model)"
    return f"call qatkernels.{call} in every process, which returns a whole copy"


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop gathered parameters, which may be in another dtype; a root keeps them after a forward."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def copy_whole(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], parameters: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """Return a whole copy of a sharded model, with other modules in the place of some.

    Args:
        model: the model, resharded.
        replacements: new modules by old ones, whose parameters are not gathered. They are changed in place: their
            parameters and modules that the old ones had become copies too.
        parameters: what the copy has in the place of parameters, by their id; these are not gathered.
    """
    reshard(model)
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()} | dict(parameters or {})
    left_out = {id(m) for old in replacements for m in old.modules()}
    modules = [m for m in model.modules() if id(m) not in left_out]
    kept = [*modules, *replacements.values()]
    kept += [child for new in replacements.values() for child in new.modules()]
    for module in kept:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if is_dtensor(tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _whole_copy(tensor)
    managed = [m for m in dict.fromkeys(kept) if m not in replacements.values() and _is_managed(m)]
    for module in managed:
        cls = _class_of(module)
        memo[id(module)] = cls.__new__(cls)
    for module in managed:
        memo[id(module)].__dict__.update(copy.deepcopy(_without_engines(module), memo))
    for new in replacements.values():
        state = _without_engines(new)
        weight = new._modules.get("weight")  # packed, and new: no copy of it
        if weight is not None:
            memo[id(weight)] = weight
        new.__dict__.update(copy.deepcopy(state, memo))
    return copy.deepcopy(model, memo)


def _whole_copy(tensor: Tensor) -> Tensor:
    full = whole(tensor.detach()).clone()
    return nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


def _is_managed(module: nn.Module) -> bool:
    return any(name.startswith(_ATTRIBUTES) for name in vars(module)) or any(
        _is_engines(hook) for name, hooks in vars(module).items() if "hooks" in name for hook in _values(hooks)
    )


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before ``fully_shard`` put one of its own in front."""
    mro = type(module).__mro__
    return mro[mro.index(sys.modules["torch.distributed.fsdp"].FSDPModule) + 1] if is_fsdp(module) else mro[0]


def _without_engines(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module without those, and without the hooks, that torch's engines put there."""
    state = {name: value for name, value in vars(module).items() if not name.startswith(_ATTRIBUTES)}
    registries = [name for name, value in state.items() if "hooks" in name and isinstance(value, dict)]
    theirs = {key for name in registries for key, hook in state[name].items() if _is_engines(hook)}
    for name in registries:
        state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in theirs)
    return state


def _is_engines(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_ENGINES)


def _values(hooks: Any) -> list[Any]:
    return list(hooks.values()) if isinstance(hooks, dict) else []
