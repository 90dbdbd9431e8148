"""All private functions of torch that this package uses. Each has a test in tests/test_compat.py.

They work with torch 2.11 to 2.13. If another version has moved one, the import of this file or that test fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "TorchDispatchMode", "any_autocast", "assume_constant_result", "below_autograd", "in_dispatch_mode",
    "in_forward_mode", "in_transform", "innermost_transform_is_jvp", "integer_product", "is_fake", "is_view",
    "joined_meshes", "preserve_version_counter", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten",
    "without_autocast", "without_transforms",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])

# A context in which ops skip autograd. For the forward of an autograd Function, which computes gradients itself.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
# Whether autocast is on for any device. Ten times faster than torch.is_autocast_enabled(device).
any_autocast: Any = torch._C._is_any_autocast_enabled
# A context in which in-place changes of tensors do not count as new versions, so that autograd accepts saved ones.
preserve_version_counter: Any = torch.autograd._unsafe_preserve_version_counter
# The product of int8 matrices with an int32 result.
integer_product: Any = torch._int_mm
# A context in which autocast casts nothing, on any device.
without_autocast: Any = torch._C._DisableAutocast


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode is active, which sees every call of an op."""
    return bool(torch._C._len_torch_dispatch_stack())


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active."""
    return _functorch.peek_interpreter_stack() is not None


def innermost_transform_is_jvp() -> bool:
    """Whether the innermost active transform of torch.func is jvp."""
    level = _functorch.peek_interpreter_stack()
    return level is not None and level.key() == _functorch.TransformType.Jvp


def without_transforms(t: Tensor) -> Tensor:
    """Return the plain tensor under the wrappers of torch.func; that of vmap has its batch dimension."""
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def fsdp_has_run(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has prepared itself for a first forward of a model."""
    states = [getattr(module, "_get_fsdp_state", None) for module in model.modules()]
    return any(state is not None and state()._is_root is not None for state in states)


def joined_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """Return the mesh with the dimensions of several meshes that were taken out of one."""
    return type(meshes[0])._concatenate(meshes)


def is_view(t: Tensor) -> bool:
    """Whether autograd treats a tensor as a view of another one."""
    return bool(t._is_view())


def assume_constant_result(function: F) -> F:
    """Mark a function as torch.compiler.assume_constant_result does, without importing torch._dynamo (a second)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
