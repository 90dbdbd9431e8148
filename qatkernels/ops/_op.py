"""How an op is declared: one schema, one reference, one shape rule; any number of faster implementations.

An op is a plain function in PyTorch (the *reference*: its meaning, and the kernel that runs where nothing faster is
installed) and a *fake rule* that checks shapes and dtypes and returns empty outputs. Both go to ``torch.library``.
Every op has a twin named ``<op>_out`` that writes into tensors the caller supplies; ops that change their arguments in
place have no outputs, a name that ends in ``_``, and no twin.

`backends.py` overrides the reference per device. Kernels only implement the ``_out`` twin; :func:`allocating` makes the
op itself out of it and the fake rule. An op in place is what a kernel implements as it is. A kernel that was given to
:func:`canonical` never sees strides: its inputs are contiguous, and what it writes is refused unless it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("qatkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """A declared op.

    Attributes:
        name: name in ``torch.ops.qatkernels``.
        arguments: argument list of the schema; what the op changes is marked ``Tensor(a!)``.
        outputs: names of the outputs; none if it works in place.
        reference: the meaning, in plain PyTorch.
        fake: shape and dtype rule; allocates empty outputs.
    """

    name: str
    arguments: str
    outputs: tuple[str, ...]
    reference: Callable[..., Outputs | None]
    fake: Callable[..., Outputs | None]

    @property
    def schemas(self) -> dict[str, str]:
        """Schema of the op, and of its ``_out`` twin if it has outputs, by name."""
        if not self.outputs:
            return {self.name: f"{self.name}({self.arguments}) -> ()"}
        returns = ", ".join("Tensor" for _ in self.outputs)
        written = ", ".join(f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(self.outputs))
        return {
            self.name: f"{self.name}({self.arguments}) -> {returns if len(self.outputs) == 1 else f'({returns})'}",
            f"{self.name}_out": f"{self.name}_out({self.arguments}, {written}) -> ()",
        }

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Types of the arguments by name, as the schema has them: ``Tensor``, ``Tensor?``, ``Tensor(a!)``, ``int``."""
        return {name: kind for kind, name in (part.split() for part in self.arguments.split(", "))}

    def reference_out(self, *args: Any) -> None:
        """Write what the reference returns into the outputs at the end of ``args``."""
        inputs, out = args[: -len(self.outputs)], args[-len(self.outputs) :]
        check_outputs(self, out, self.fake(*inputs))
        for destination, source in zip(out, as_tuple(self.reference(*inputs)), strict=True):
            destination.copy_(source)


#: Every declared op by name.
OPS: dict[str, Op] = {}


def as_tuple(outputs: Outputs | None) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple, also where there is one."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())


def define(
    name: str,
    arguments: str,
    outputs: tuple[str, ...],
    *,
    reference: Callable[..., Outputs | None],
    fake: Callable[..., Outputs | None],
) -> Op:
    """Declare an op and its ``_out`` twin in ``torch.ops.qatkernels``, with the reference as their fallback."""
    if bool(outputs) == name.endswith("_"):
        raise ValueError(f"op {name!r} has outputs {outputs}: ops in place, and only they, end in '_' and have none")
    op = OPS[name] = Op(name, arguments, outputs, reference, fake)

    def fake_out(*args: Any) -> None:
        check_outputs(op, args[-len(outputs) :], fake(*args[: -len(outputs)]))

    for op_name, schema in op.schemas.items():
        LIBRARY.define(schema, tags=_TAGS)
        meaning = checked(op, reference) if op_name == name else op.reference_out
        LIBRARY.impl(op_name, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qatkernels::{op_name}", fake if op_name == name else fake_out, lib=LIBRARY)
    return op


def allocating(op: Op, out_impl: Callable[..., None]) -> Callable[..., Outputs | None]:
    """Return the allocating form of an ``_out`` implementation."""

    def impl(*args: Any) -> Outputs | None:
        outputs = op.fake(*args)
        out_impl(*args, *as_tuple(outputs))
        return outputs

    return impl


def checked(op: Op, impl: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation behind the checks of the fake rule, for those that do not allocate by it.

    Its outputs are never views, as those of a kernel never are: autograd refuses to change a view in place.
    """

    def run(*args: Any) -> Any:
        op.fake(*args)
        outputs = impl(*args)
        if isinstance(outputs, tuple):
            return tuple(_not_a_view(t) for t in outputs)
        return _not_a_view(outputs) if isinstance(outputs, Tensor) else outputs

    return run


def _not_a_view(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor._is_view() else tensor


def canonical(op: Op, impl: Callable[..., None], any_strides: tuple[str, ...] = ()) -> Callable[..., None]:
    """Return an implementation that gets contiguous tensors whatever it is called with, so that it needs no strides.

    This is the one place that sees to it. What the op changes in place is not copied: it must be contiguous, and so
    must the outputs.

    Args:
        op: the op.
        impl: its ``_out`` form, or the op itself if it works in place.
        any_strides: names of arguments that ``impl`` takes as they are, because it reads their strides.
    """
    kinds = op.parameters
    unknown = set(any_strides) - set(kinds)
    if unknown:
        raise ValueError(f"{op.name} has no argument {sorted(unknown)}, it has {list(kinds)}")
    copied = [i for i, name in enumerate(kinds) if kinds[name] in ("Tensor", "Tensor?") and name not in any_strides]
    written = {i: name for i, (name, kind) in enumerate(kinds.items()) if "!" in kind}
    written |= {len(kinds) + i: name for i, name in enumerate(op.outputs)}

    @functools.wraps(impl)
    def run(*args: Any) -> None:
        given = list(args)
        for i, name in written.items():
            if not given[i].is_contiguous():
                raise ValueError(f"{name} has strides {given[i].stride()}, must be contiguous")
        for i in copied:
            if given[i] is not None:
                given[i] = given[i].contiguous()
        impl(*given)

    return run


def writing(op: Op, out_impl: Callable[..., None]) -> Callable[..., None]:
    """Return an ``_out`` implementation behind the checks of the fake rule, which allocate nothing."""

    def impl(*args: Any) -> None:
        inputs, out = args[: len(op.parameters)], args[len(op.parameters) :]
        device = check_one_device(op, inputs)
        described = (a.to("meta") if isinstance(a, Tensor) else a for a in inputs)
        check_outputs(op, out, op.fake(*described), device)
        out_impl(*args)

    return impl


def check_one_device(op: Op, inputs: tuple[Any, ...]) -> torch.device:
    """Return the device of an op's inputs, or raise RuntimeError if they are on several."""
    (first, like), *others = ((n, a) for n, a in zip(op.parameters, inputs, strict=True) if isinstance(a, Tensor))
    for name, t in others:
        torch._check(
            t.device == like.device,
            lambda name=name, t=t: f"{name} is on {t.device}, must be on {like.device} like {first}",
        )
    return like.device


def check_outputs(op: Op, out: tuple[Tensor, ...], wanted: Outputs | None, device: torch.device | None = None) -> None:
    """Raise ValueError unless the outputs are contiguous and like the wanted ones, on ``device`` if it is given."""
    for name, given, w in zip(op.outputs, out, as_tuple(wanted), strict=True):
        check_out(name, given, w.shape, w.dtype, device or w.device)


def check_out(name: str, given: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless ``given`` is a contiguous tensor of this shape, dtype and device."""
    if given.shape != shape or given.dtype != dtype or given.device != device:
        raise ValueError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}, "
            f"must be {dtype} of shape {tuple(shape)} on {device}"
        )
    if not given.is_contiguous():
        raise ValueError(f"{name} has strides {given.stride()}, must be contiguous")


def nothing_to_differentiate(*tensors: Tensor | None) -> bool:
    """Whether a Function around these tensors would only cost time: no gradient, no forward mode, no transform."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def _with_zeros(t: Tensor, dim: int) -> Tensor:
    """Return an empty batch with one element of zeros."""
    return torch.cat([t, t.new_zeros([1 if i == dim % t.ndim else n for i, n in enumerate(t.shape)])], dim)


class Function(torch.autograd.Function):
    """An autograd Function whose vmap rule is a loop: a vmapped call equals the calls one by one, noise included."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            # apply() asks for the signature at every call; a stored one makes that free.
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @staticmethod
    def run(op: Any, *args: Any) -> Any:
        """Call an op from a forward, where autograd has nothing left to do."""
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

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


class Composite(Function):
    """Functions whose own derivatives are those of their formula in plain PyTorch, logits and all."""

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], tensors: int) -> None:
        """Save the inputs; the first ``tensors`` are differentiable."""
        ctx.differentiable, ctx.count = tensors, sum(t is None or isinstance(t, Tensor) for t in inputs)
        ctx.save_for_backward(*inputs[: ctx.count])
        ctx.save_for_forward(*inputs[: ctx.count])
        ctx.settings = inputs[ctx.count :]

    @staticmethod
    def function(ctx: Any, formula: Any) -> tuple[Any, list[int]]:
        """Return the formula as a function of the differentiable inputs that are there, and where they are."""
        saved = list(ctx.saved_tensors)
        present = [i for i in range(ctx.differentiable) if saved[i] is not None]

        def call(*primals: Tensor) -> Any:
            given = list(saved)
            for i, p in zip(present, primals, strict=True):
                given[i] = p
            return formula(*given, *ctx.settings)

        return call, present

    @staticmethod
    def pulled(ctx: Any, formula: Any, gs: Any) -> tuple[Any, ...]:
        """Gradients of all inputs."""
        call, present = Composite.function(ctx, formula)
        grads: list[Any] = [None] * (ctx.count + len(ctx.settings))
        pull = torch.func.vjp(call, *(ctx.saved_tensors[i] for i in present))[1]
        for i, grad in zip(present, pull(gs), strict=True):
            grads[i] = grad
        return tuple(grads)

    @staticmethod
    def pushed(ctx: Any, formula: Any, tangents: Any) -> Any:
        """Tangents of the outputs."""
        call, present = Composite.function(ctx, formula)
        # Contiguous, because forward mode takes no expanded tensors.
        primals = tuple(ctx.saved_tensors[i].contiguous() for i in present)
        along = tuple(
            torch.zeros_like(p) if tangents[i] is None else tangents[i].contiguous()
            for i, p in zip(present, primals, strict=True)
        )
        return torch.func.jvp(call, primals, along)[1]
