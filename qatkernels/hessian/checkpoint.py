"""Activation checkpointing that also saves memory in a second derivative.

``torch.utils.checkpoint`` recomputes a module in the backward, but if that backward is differentiated, its graph keeps
the recomputed activations. Here the backward is an autograd Function too. It saves its inputs only, and recomputes the
module again when it is differentiated. A kept gradient graph then holds only the inputs of each module and the gradient
of its outputs. A product takes half as much time again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import tree_flatten, tree_unflatten
from ..nn.replay import RandomState

Run = Callable[..., Any]


class _Call:
    """A call of a module as a function of tensors: the tensors among its arguments, then its parameters."""

    def __init__(self, forward: Run, parameters: Sequence[Tensor], args: Any, kwargs: Any) -> None:
        leaves, self.spec = tree_flatten((args, kwargs))
        self.forward = forward
        self.other_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.inputs = [leaves[i] for i in self.places]
        self.parameters = list(parameters)
        self.random = RandomState((*self.inputs, *self.parameters))
        device = next((t.device.type for t in self.inputs), "cpu")
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def __call__(self, *inputs: Tensor) -> Any:
        leaves = list(self.other_leaves)
        for place, tensor in zip(self.places, inputs, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled):
            return self.forward(*args, **kwargs)

    def rerun(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the module again on detached inputs, with the same random numbers.

        Args:
            tensors: the inputs, possibly followed by the parameters.
            needed: for each input and parameter, whether its gradient is needed.

        Returns:
            The outputs, and the inputs and parameters whose gradient is needed.
        """
        count = len(self.places)
        inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors[:count], needed, strict=False)]
        with self.random.replayed():
            outputs = tree_flatten(self(*inputs))[0]
        leaves = [t for t, n in zip((*inputs, *self.parameters), needed, strict=True) if n]
        return outputs, leaves


class _Checkpoint(torch.autograd.Function):
    """The outputs of a module, without its activations."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs, ctx.spec = tree_flatten(call(*tensors[: len(call.places)]))
        call.spec_out = ctx.spec  # type: ignore[attr-defined]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        needed = tuple(ctx.needs_input_grad[1:])
        return None, *_CheckpointBackward.apply(ctx.call, needed, len(needed), *ctx.saved_tensors, *g)


class _CheckpointBackward(torch.autograd.Function):
    """The gradients of a module's inputs and parameters, from a recomputed forward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, needed: tuple[bool, ...], count: int, *tensors: Any) -> Any:
        ctx.call, ctx.needed, ctx.count = call, needed, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            grads = _gradients(call, needed, tensors[:count], tensors[count:], create_graph=False)[0]
        remaining = iter(grads)
        return tuple(next(remaining) if n else None for n in needed)

    @staticmethod
    def backward(ctx: Any, *v: Any) -> Any:
        tensors = ctx.saved_tensors
        upstream = [None if g is None else g.detach().requires_grad_() for g in tensors[ctx.count :]]
        with torch.enable_grad():
            grads, leaves = _gradients(ctx.call, ctx.needed, tensors[: ctx.count], upstream, create_graph=True)
        along = [t for t, n in zip(v, ctx.needed, strict=True) if n]
        live = [
            (g, t) for g, t in zip(grads, along, strict=True) if g is not None and t is not None and g.requires_grad
        ]
        upstream_tensors = [g for g in upstream if g is not None]
        second: Iterator[Any] = iter(())
        if live:
            outputs, tangents = zip(*live, strict=True)
            second = iter(torch.autograd.grad(outputs, (*leaves, *upstream_tensors), tangents, allow_unused=True))
        for_tensors = [next(second, None) if n else None for n in ctx.needed]
        for_upstream = [None if g is None else next(second, None) for g in upstream]
        return None, None, None, *for_tensors, *for_upstream


def _gradients(
    call: _Call, needed: Sequence[bool], tensors: Sequence[Tensor], g: Sequence[Any], *, create_graph: bool
) -> tuple[list[Any], list[Tensor]]:
    """Run the module again; return the gradients of the tensors that need one, and these tensors."""
    outputs, leaves = call.rerun(tensors, needed)
    pairs = [(y, t) for y, t in zip(outputs, g, strict=True) if t is not None and y.requires_grad]
    if not pairs:
        return [None] * len(leaves), leaves
    ys, ts = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, leaves, ts, create_graph=create_graph, allow_unused=True)), leaves


def checkpointed_forward(module: nn.Module) -> Run:
    """Return the forward of a module with activation checkpointing; :func:`checkpointed` says which modules fit."""
    forward = module.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        call = _Call(forward, list(module.parameters()), args, kwargs)
        outputs = _Checkpoint.apply(call, *call.inputs, *call.parameters)
        return tree_unflatten(list(outputs), call.spec_out)  # type: ignore[attr-defined]

    return checkpointed


@contextlib.contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules with activation checkpointing within the context.

    Args:
        modules: the modules. Their inputs and outputs are tensors, or nested lists, tuples and dictionaries of tensors.
            From the same buffers and the same random numbers of torch they must compute the same result again.
    """
    wrapped = []
    try:
        for module in dict.fromkeys(modules):
            before = module.__dict__.get("forward")
            module.forward = checkpointed_forward(module)
            wrapped.append((module, before))
        yield
    finally:
        for module, before in reversed(wrapped):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules worth checkpointing: the outermost elements of ModuleLists and Sequentials.

    Raises:
        ValueError: if there is none.
    """
    elements: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and any(True for _ in child.parameters()):
                elements.append(child)
            else:
                visit(child)

    visit(model)
    if not elements:
        raise ValueError(
            "checkpoint is True, but the model has no ModuleList or Sequential: give a list of modules to checkpoint"
        )
    return elements
