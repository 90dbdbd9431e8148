"""Whether DDP or FSDP wraps a model: they know only the parameters that existed when they were made."""

from __future__ import annotations

import gc
import sys

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model that DDP or FSDP wraps, as a whole or in part.

    A wrapper knows only the parameters that exist when it is made. It would not reduce the gradients of the new scales,
    so every process would train scales of its own.

    Raises:
        ValueError: if there is such a wrapper in the model, or around it.
    """
    kinds = _wrappers()
    modules = set(model.modules())
    inside = next((m for m in modules if isinstance(m, kinds)), None)
    found = inside if inside is not None else _wrapper_around(modules, kinds)
    if found is None:
        return
    kind = next(k.__name__ for k in kinds if isinstance(found, k))
    where = "holds a module that is wrapped" if inside is not None and inside is not model else "is wrapped"
    raise ValueError(
        f"the model {where} in {kind} already, which does not know parameters that come later: each process would "
        f"train scales of its own. Quantize first, then wrap: model = quantize_model(model, ...), then {kind}(model)"
    )


def _wrappers() -> tuple[type, ...]:
    """Return the wrapper classes of torch that have been imported; others cannot wrap anything."""
    kinds: list[type] = [DistributedDataParallel]
    for module, names in (
        ("torch.distributed.fsdp", ("FullyShardedDataParallel", "FSDPModule")),
        ("torch.distributed._composable.replicate", ("DDP",)),
    ):
        kinds += [getattr(sys.modules[module], n) for n in names if hasattr(sys.modules.get(module), n)]
    return tuple(kinds)


def _wrapper_around(modules: set[nn.Module], kinds: tuple[type, ...]) -> nn.Module | None:
    """Return a live wrapper that holds one of these modules; modules do not know who wraps them."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for sweep in (False, True):  # a wrapper that is found may only be waiting for the garbage collector
        if sweep:
            gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), kinds)]
        found = next((wrapper for wrapper in alive if not modules.isdisjoint(wrapper.modules())), None)
        if found is None:
            return None
    return found
