"""Ops as autograd Functions, with arguments that have names, and derivatives that are given by name.

A subclass of :class:`OpFunction` says what the gradients of its op are (:meth:`OpFunction.gradients`) and, for forward
mode, its tangent (:meth:`OpFunction.tangent`). Both get what was kept of the call as an object with the names of the
schema. The rules serve eager calls, as an autograd Function, and compiled ones, where torch.compile traces the op: it
takes no Function that has a rule for forward mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._torch_compat import below_autograd
from ._op import Op, differentiable


def _with_zeros(t: Tensor, dim: int) -> Tensor:
    """Return an empty batch with one element of zeros."""
    return torch.cat([t, t.new_zeros([1 if i == dim % t.ndim else n for i, n in enumerate(t.shape)])], dim)


class OpFunction(torch.autograd.Function):
    """An op with derivatives; its vmap rule is a loop, so that a vmapped call equals calls one by one, noise included.

    A subclass sets ``op``.
    """

    #: The op.
    op: ClassVar[Op]
    #: Tensors that derivatives need, inputs or outputs by name; all inputs if None.
    saves: ClassVar[tuple[str, ...] | None] = None
    #: Whether gradients and tangents that are not there arrive as zeros, and not as None.
    materializes: ClassVar[bool] = False

    _names: ClassVar[tuple[str, ...]]
    _tensors: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "op" not in vars(cls):
            return  # a base of others
        op = cls.op
        object.__setattr__(op, "function", cls)  # a plain attribute of a frozen dataclass, as `define` sets others
        cls._names = tuple(op.parameters)
        cls._tensors = tuple(i for i, kind in enumerate(op.parameters.values()) if kind.startswith("Tensor"))
        if cls.saves is None:
            cls.saves = tuple(cls._names[i] for i in cls._tensors)

        def forward(*args: Any) -> Any:
            return cls.run(*args)

        # apply() asks for the signature at every call; a stored one makes that free.
        forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        cls.forward = staticmethod(forward)  # type: ignore[method-assign]
        torch.library.register_autograd(f"qatkernels::{op.name}", cls.backward, setup_context=cls.setup_context)

    # What a subclass says.

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return gradients of the inputs by name, of those that have one, from gradients of the outputs."""
        raise NotImplementedError

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """Return the tangents of the outputs from those of the inputs, an object with their names."""
        raise NotImplementedError(f"{cls.op.name} has no derivative in forward mode")

    @classmethod
    def keep(cls, ctx: Any, call: Any, output: Any) -> None:
        """Note what derivatives need beside ``saves`` and the arguments that are no tensors."""

    # How it is called.

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Call the op, differentiable where somebody can ask for it. Public functions call :meth:`Op.call`."""
        return cls.apply(*args) if differentiable(args) else cls.run(*args)

    @classmethod
    def of(cls, kept: Any, **changes: Any) -> Any:
        """Call the op with arguments of another call that have the same names, some of them replaced."""
        values = {**vars(kept), **changes}
        return cls.call(*map(values.__getitem__, cls._names))

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call the op where autograd has nothing to do, or a Function does it."""
        with below_autograd():
            return cls.op.overload(*args)

    @classmethod
    def needs(cls, ctx: Any, *names: str) -> bool:
        """Whether the gradient of one of these inputs is needed."""
        return any(ctx.needs_input_grad[cls._names.index(name)] for name in names)

    # What torch calls.

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what derivatives need."""
        call = SimpleNamespace(**dict(zip(cls._names, inputs, strict=True)))
        ctx.set_materialize_grads(cls.materializes)
        cls.keep(ctx, call, output)
        made = dict(zip(cls.op.outputs, (output,) if isinstance(output, Tensor) else output, strict=False))
        assert cls.saves is not None
        saved = [getattr(call, name) if hasattr(call, name) else made[name] for name in cls.saves]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.values = [None if i in cls._tensors else value for i, value in enumerate(inputs)]

    @classmethod
    def _kept(cls, ctx: Any) -> SimpleNamespace:
        assert cls.saves is not None
        values = dict(zip(cls._names, ctx.values, strict=True))
        values.update(zip(cls.saves, ctx.saved_tensors, strict=True))
        return SimpleNamespace(**values)

    @classmethod
    def backward(cls, ctx: Any, *gs: Any) -> Any:
        """Return the gradients of all inputs, None for those that have none."""
        for g in gs:
            if g is not None:
                break
        else:
            return (None,) * len(cls._names)
        found = cls.gradients(ctx, cls._kept(ctx), *gs)
        for name, needs in zip(cls._names, ctx.needs_input_grad, strict=True):
            if not needs:
                found.pop(name, None)
        return tuple(map(found.get, cls._names))

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        """Return the tangents of the outputs."""
        return cls.tangent(ctx, cls._kept(ctx), SimpleNamespace(**dict(zip(cls._names, tangents, strict=True))))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Apply to each element of the batch and stack."""
        size = info.batch_size
        if size == 0:  # an element of zeros says what an element's results look like; none of it is returned
            args = tuple(_with_zeros(a, d) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        results = [
            cls.apply(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(max(size, 1))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        return tuple(torch.stack(column)[:size] for column in zip(*results, strict=True)), (0,) * len(results[0])


class Composite(OpFunction):
    """An op whose own derivatives are those of a formula in plain PyTorch, logits and all."""

    materializes = True
    #: Inputs with derivatives, and the formula, which takes the arguments of the op.
    differentiable: ClassVar[tuple[str, ...]]
    formula: ClassVar[Callable[..., Any]]

    @classmethod
    def _function(cls, kept: Any) -> tuple[Callable[..., Any], list[str]]:
        """Return the formula as a function of the differentiable inputs that are there, and their names."""
        present = [name for name in cls.differentiable if getattr(kept, name) is not None]

        def call(*primals: Tensor) -> Any:
            values = {**vars(kept), **dict(zip(present, primals, strict=True))}
            return cls.formula(*(values[name] for name in cls._names))

        return call, present

    @classmethod
    def gradients(cls, ctx: Any, kept: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Pull gradients back through the formula."""
        call, present = cls._function(kept)
        pull = torch.func.vjp(call, *(getattr(kept, name) for name in present))[1]
        return dict(zip(present, pull(gs if len(gs) > 1 else gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, kept: Any, tangents: Any) -> Any:
        """Push tangents through the formula."""
        call, present = cls._function(kept)
        # Contiguous, because forward mode takes no expanded tensors.
        primals = tuple(getattr(kept, name).contiguous() for name in present)
        along = [getattr(tangents, name) for name in present]
        filled = tuple(
            torch.zeros_like(p) if t is None else t.contiguous() for t, p in zip(along, primals, strict=True)
        )
        return torch.func.jvp(call, primals, filled)[1]
