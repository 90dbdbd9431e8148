"""How an op is declared: a schema, a contract, a reference; any number of faster implementations.

An op is a plain function in PyTorch (the *reference*: its meaning, and the kernel that runs where nothing faster is
installed) and a *contract* (`contract.py`): what its arguments must be and what its outputs are. Both go to
``torch.library``. Every op has a twin named ``<op>_out`` that writes into tensors the caller supplies; ops that change
their arguments in place have no outputs, a name that ends in ``_``, and no twin.

`backends.py` overrides the reference per device. A kernel is written in one form only: the ``_out`` twin, or the op
itself if it works in place. :class:`Kernel` puts it behind the contract, makes its inputs contiguous, and makes the op
that allocates its outputs out of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .contract import Contract

LIBRARY = torch.library.Library("qatkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """A declared op.

    Attributes:
        name: name in ``torch.ops.qatkernels``.
        arguments: argument list of the schema; what the op changes is marked ``Tensor(a!)``.
        contract: what the arguments must be and what the outputs are.
        reference: the meaning, in plain PyTorch.
    """

    name: str
    arguments: str
    contract: Contract
    reference: Callable[..., Outputs | None]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs; none if the op works in place."""
        return self.contract.outputs

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
        return _parameters(self.arguments)

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Split the arguments of the ``_out`` twin into those of the op and the outputs."""
        return args[: len(self.parameters)], args[len(self.parameters) :]

    def meta(self, *args: Any) -> Any:
        """Check the arguments, as for every call, and return outputs that nothing was written into."""
        return self.contract.meta(*args)

    def meta_out(self, *args: Any) -> None:
        """Check the arguments of the ``_out`` twin."""
        self.contract.check_outputs(*self.split(args))

    def run_reference(self, *args: Any) -> Outputs | None:
        """Check the arguments and run the reference.

        Outputs are never views, as those of a kernel never are: autograd refuses to change a view in place.
        """
        self.contract.check(args)
        outputs = self.reference(*args)
        if isinstance(outputs, tuple):
            return tuple(_not_a_view(t) for t in outputs)
        return None if outputs is None else _not_a_view(outputs)

    def run_reference_out(self, *args: Any) -> None:
        """Check the arguments and write what the reference returns into the outputs at the end of ``args``."""
        inputs, out = self.split(args)
        self.contract.check_outputs(inputs, out)
        for destination, source in zip(out, as_tuple(self.reference(*inputs)), strict=True):
            destination.copy_(source)


#: Every declared op by name.
OPS: dict[str, Op] = {}


def _parameters(arguments: str) -> dict[str, str]:
    return {name: kind for kind, name in (part.split() for part in arguments.split(", "))}


def as_tuple(outputs: Outputs | None) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple, also where there is one."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())


def define(name: str, arguments: str, contract: str, *, reference: Callable[..., Outputs | None]) -> Op:
    """Declare an op and its ``_out`` twin in ``torch.ops.qatkernels``, with the reference as their fallback.

    Args:
        name: name of the op.
        arguments: argument list of the schema.
        contract: what the arguments must be and what the outputs are, in the language of `contract.py`.
        reference: the meaning, in plain PyTorch.
    """
    op = Op(name, arguments, Contract(contract, _parameters(arguments)), reference)
    if bool(op.outputs) == name.endswith("_"):
        raise ValueError(f"op {name!r} has outputs {op.outputs}: ops in place, and only they, end in '_' and have none")
    OPS[name] = op
    twins = (op.run_reference, op.meta), (op.run_reference_out, op.meta_out)
    for (op_name, schema), (meaning, meta) in zip(op.schemas.items(), twins, strict=False):
        LIBRARY.define(schema, tags=_TAGS)
        LIBRARY.impl(op_name, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qatkernels::{op_name}", meta, lib=LIBRARY)
    return op


def _not_a_view(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor._is_view() else tensor


class Kernel:
    """A kernel that is written in Python, behind the contract of its op.

    This is the one place that sees to strides: inputs are made contiguous, whatever a call has. What the op changes in
    place must be contiguous, and so must the outputs; the contract says so.

    Args:
        op: the op.
        run: its ``_out`` form, or the op itself if it works in place.
    """

    def __init__(self, op: Op, run: Callable[..., None]) -> None:
        kinds = op.parameters
        strided = op.contract.strided
        self.op, self.run = op, run
        self._copied = [i for i, n in enumerate(kinds) if kinds[n] in ("Tensor", "Tensor?") and n not in strided]

    def launch(self, *args: Any) -> None:
        """Run with arguments that are checked already."""
        given = list(args)
        for i in self._copied:
            if given[i] is not None:
                given[i] = given[i].contiguous()
        self.run(*given)

    def allocating(self, *args: Any) -> Any:
        """Run the op: check the arguments and return new outputs, or change them in place."""
        outputs = self.op.contract.meta(*args)
        self.launch(*args, *as_tuple(outputs))
        return outputs

    def writing(self, *args: Any) -> None:
        """Run the ``_out`` twin."""
        self.op.contract.check_outputs(*self.op.split(args))
        self.launch(*args)


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
