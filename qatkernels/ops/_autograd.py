"""Derivatives of ops, stated once and used in eager mode and under torch.compile.

A subclass of :class:`OpFunction` states the gradients of its op (:meth:`OpFunction.gradients`) and, for forward mode,
the tangents of its outputs (:meth:`OpFunction.tangent`). Everything has the names that the op's schema gives it.

Eager calls use the class as an autograd Function. torch.compile does not support Functions with a ``jvp``, so compiled
calls use the op directly, and the same rules are registered on it with ``torch.library``.
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
    """Append one element of zeros along a dimension."""
    return torch.cat([t, t.new_zeros([1 if i == dim % t.ndim else n for i, n in enumerate(t.shape)])], dim)


class OpFunction(torch.autograd.Function):
    """The autograd Function of an op.

    Under vmap the op is called once for each element of the batch, so results equal those of separate calls, noise
    included. A subclass sets ``op``.
    """

    #: The op.
    op: ClassVar[Op]
    #: Names of the inputs and outputs to save for derivatives; None saves all tensor inputs.
    saves: ClassVar[tuple[str, ...] | None] = None
    #: Whether absent gradients and tangents are passed as zeros (True) or as None.
    zeros_for_none: ClassVar[bool] = False

    _names: ClassVar[tuple[str, ...]]
    _tensors: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "op" not in vars(cls):
            return  # a base class
        op = cls.op
        object.__setattr__(op, "function", cls)  # a plain attribute of a frozen dataclass, as `define` sets others
        cls._names = tuple(op.parameters)
        cls._tensors = tuple(i for i, kind in enumerate(op.parameters.values()) if kind.startswith("Tensor"))
        if cls.saves is None:
            cls.saves = tuple(cls._names[i] for i in cls._tensors)

        def forward(*args: Any) -> Any:
            return cls.run(*args)

        # apply() computes the signature at every call; a stored one costs nothing.
        forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        cls.forward = staticmethod(forward)  # type: ignore[method-assign]
        torch.library.register_autograd(f"qatkernels::{op.name}", cls.backward, setup_context=cls.setup_context)

    # Stated by subclasses.

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the gradients of the differentiable inputs by name.

        Args:
            ctx: the context of the Function.
            saved: saved tensors and the other arguments, as attributes with the names of the schema.
            gs: gradients of the outputs.
        """
        raise NotImplementedError

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the tangents of the outputs. ``tangents`` has those of the inputs, as attributes."""
        raise NotImplementedError(f"{cls.op.name} has no derivative in forward mode")

    @classmethod
    def save_more(cls, ctx: Any, call: Any, output: Any) -> None:
        """Save on ``ctx`` what derivatives need beyond ``saves`` and the arguments that are not tensors."""

    # Called by rules of derivatives.

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Call the op, through autograd only if derivatives may be needed. Public functions use :meth:`Op.call`."""
        return cls.apply(*args) if differentiable(args) else cls.run(*args)

    @classmethod
    def of(cls, saved: Any, **changes: Any) -> Any:
        """Call the op with the arguments that another call saved under the same names, after ``changes``."""
        values = {**vars(saved), **changes}
        return cls.call(*map(values.__getitem__, cls._names))

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call the op without autograd."""
        with below_autograd():
            return cls.op.overload(*args)

    @classmethod
    def needs(cls, ctx: Any, *names: str) -> bool:
        """Whether the gradient of one of these inputs is needed."""
        return any(ctx.needs_input_grad[cls._names.index(name)] for name in names)

    # Called by torch.

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what derivatives need."""
        call = SimpleNamespace(**dict(zip(cls._names, inputs, strict=True)))
        ctx.set_materialize_grads(cls.zeros_for_none)
        cls.save_more(ctx, call, output)
        made = dict(zip(cls.op.outputs, (output,) if isinstance(output, Tensor) else output, strict=False))
        assert cls.saves is not None
        saved = [getattr(call, name) if hasattr(call, name) else made[name] for name in cls.saves]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.values = [None if i in cls._tensors else value for i, value in enumerate(inputs)]

    @classmethod
    def _saved(cls, ctx: Any) -> SimpleNamespace:
        assert cls.saves is not None
        values = dict(zip(cls._names, ctx.values, strict=True))
        values.update(zip(cls.saves, ctx.saved_tensors, strict=True))
        return SimpleNamespace(**values)

    @classmethod
    def backward(cls, ctx: Any, *gs: Any) -> Any:
        """Return the gradient of each input, None if it has none or it is not needed."""
        for g in gs:
            if g is not None:
                break
        else:
            return (None,) * len(cls._names)
        found = cls.gradients(ctx, cls._saved(ctx), *gs)
        for name, needs in zip(cls._names, ctx.needs_input_grad, strict=True):
            if not needs:
                found.pop(name, None)
        return tuple(map(found.get, cls._names))

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        """Return the tangents of the outputs."""
        return cls.tangent(ctx, cls._saved(ctx), SimpleNamespace(**dict(zip(cls._names, tangents, strict=True))))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Call the op for each element of the batch and stack the results."""
        size = info.batch_size
        if size == 0:  # call it for one element of zeros, to learn the shapes of the results; return none of it
            args = tuple(_with_zeros(a, d) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        results = [
            cls.apply(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(max(size, 1))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        return tuple(torch.stack(column)[:size] for column in zip(*results, strict=True)), (0,) * len(results[0])


class Composite(OpFunction):
    """An op whose derivatives are computed by torch.func from a formula in plain PyTorch."""

    zeros_for_none = True
    #: Names of the inputs with derivatives.
    differentiable: ClassVar[tuple[str, ...]]
    #: A function of the op's arguments that computes the same.
    formula: ClassVar[Callable[..., Any]]

    @classmethod
    def _function(cls, saved: Any) -> tuple[Callable[..., Any], list[str]]:
        """Return the formula as a function of the differentiable inputs that are not None, and their names."""
        present = [name for name in cls.differentiable if getattr(saved, name) is not None]

        def call(*primals: Tensor) -> Any:
            values = {**vars(saved), **dict(zip(present, primals, strict=True))}
            return cls.formula(*(values[name] for name in cls._names))

        return call, present

    @classmethod
    def gradients(cls, ctx: Any, saved: Any, *gs: Any) -> dict[str, Tensor | None]:
        """Return the vector-Jacobian product of the formula."""
        call, present = cls._function(saved)
        pull = torch.func.vjp(call, *(getattr(saved, name) for name in present))[1]
        return dict(zip(present, pull(gs if len(gs) > 1 else gs[0]), strict=True))

    @classmethod
    def tangent(cls, ctx: Any, saved: Any, tangents: Any) -> Any:
        """Return the Jacobian-vector product of the formula."""
        call, present = cls._function(saved)
        # contiguous, because forward mode does not accept expanded tensors
        primals = tuple(getattr(saved, name).contiguous() for name in present)
        along = [getattr(tangents, name) for name in present]
        filled = tuple(
            torch.zeros_like(p) if t is None else t.contiguous() for t, p in zip(along, primals, strict=True)
        )
        return torch.func.jvp(call, primals, filled)[1]
