"""Declares ops: each has a schema, a contract and a reference.

The *reference* is a function in plain PyTorch. It defines what the op computes, and it runs where no faster kernel is
installed. The *contract* (`contract.py`) says what the arguments must be and what the outputs are. Both are registered
with ``torch.library``. Every op has a twin named ``<op>_out`` that writes into tensors of the caller. The exception are
ops that change their arguments in place: they have no outputs and no twin, and their names end in ``_``.

Kernels of `qatkernels/backends` replace the reference on their devices. A kernel is written in one form only: as the
``_out`` twin, or as the op itself if that works in place. :class:`Kernel` checks the contract before a call, makes
inputs contiguous, and derives from the ``_out`` form the op that allocates its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import below_autograd, in_forward_mode, in_transform, is_view
from .contract import Contract

LIBRARY = torch.library.Library("qatkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """A declared op.

    Attributes:
        name: name in ``torch.ops.qatkernels``.
        arguments: argument list of the schema; tensors that the op changes are marked ``Tensor(a!)``.
        contract: what the arguments must be and what the outputs are.
        reference: the definition of the op, in plain PyTorch.
        overload: the op as torch calls it; set when the op is declared.
        tensors_end: number of arguments up to and including the last tensor.
        function: the autograd Function of the op, None if the op has no derivatives; `OpFunction` sets it.
        trained: the op with its gradients in C++, for calls that need nothing else; None if there is none.
    """

    name: str
    arguments: str
    contract: Contract
    reference: Callable[..., Outputs | None]
    overload: Any = None
    tensors_end: int = 0
    function: Any = None
    trained: Any = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs; empty if the op works in place."""
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
        """Types of the arguments by name, as in the schema: ``Tensor``, ``Tensor?``, ``Tensor(a!)``, ``int``."""
        return _parameters(self.arguments)

    def call(self, *args: Any) -> Any:
        """Call the op from a public function, through its autograd Function only if derivatives may be needed."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.overload(*args)  # the derivatives are registered with torch.library
        if differentiable(args[: self.tensors_end]):
            if self.trained is None or in_forward_mode() or in_transform():
                return self.function.apply(*args)
            return self.trained(*args)
        with below_autograd():
            return self.overload(*args)

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Split the arguments of the ``_out`` twin into the arguments of the op and the outputs."""
        return args[: len(self.parameters)], args[len(self.parameters) :]

    def meta(self, *args: Any) -> Any:
        """Check the arguments, as every call does, and return uninitialized outputs."""
        return self.contract.meta(*args)

    def meta_out(self, *args: Any) -> None:
        """Check the arguments of the ``_out`` twin."""
        self.contract.check_outputs(*self.split(args))

    def run_reference(self, *args: Any) -> Outputs | None:
        """Check the arguments and run the reference.

        Outputs are never views, like the outputs of a kernel, because autograd does not allow in-place changes of some
        views.
        """
        self.contract.check(args)
        outputs = self.reference(*args)
        if isinstance(outputs, tuple):
            return tuple(_not_a_view(t) for t in outputs)
        return None if outputs is None else _not_a_view(outputs)

    def run_reference_out(self, *args: Any) -> None:
        """Check the arguments, run the reference, and copy its results into the outputs at the end of ``args``."""
        inputs, out = self.split(args)
        self.contract.check_outputs(inputs, out)
        for destination, source in zip(out, as_tuple(self.reference(*inputs)), strict=True):
            destination.copy_(source)


#: All declared ops by name.
OPS: dict[str, Op] = {}


def differentiable(args: tuple[Any, ...]) -> bool:
    """Whether derivatives of a call may be needed: gradients, forward mode or a transform of torch.func."""
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return True
    return in_forward_mode() or in_transform()


def _parameters(arguments: str) -> dict[str, str]:
    return {name: kind for kind, name in (part.split() for part in arguments.split(", "))}


def as_tuple(outputs: Outputs | None) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple, even if there is only one or none."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())


def define(name: str, arguments: str, contract: str, *, reference: Callable[..., Outputs | None]) -> Op:
    """Declare an op and its ``_out`` twin in ``torch.ops.qatkernels``. The reference serves every device.

    Args:
        name: name of the op.
        arguments: argument list of the schema.
        contract: what the arguments must be and what the outputs are, in the language of `contract.py`.
        reference: the definition of the op, in plain PyTorch.
    """
    op = Op(name, arguments, Contract(contract, _parameters(arguments)), reference)
    if bool(op.outputs) == name.endswith("_"):
        raise ValueError(
            f"op {name!r} has outputs {op.outputs}: the name must end in '_' if and only if there are no outputs"
        )
    OPS[name] = op
    implementations = (op.run_reference, op.meta), (op.run_reference_out, op.meta_out)
    for (op_name, schema), (reference_of_form, meta) in zip(op.schemas.items(), implementations, strict=False):
        LIBRARY.define(schema, tags=_TAGS)
        LIBRARY.impl(op_name, reference_of_form, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qatkernels::{op_name}", meta, lib=LIBRARY)
    # Set as plain attributes, because Dynamo cannot trace cached properties.
    object.__setattr__(op, "overload", getattr(torch.ops.qatkernels, name).default)
    tensors = [i for i, kind in enumerate(op.parameters.values()) if kind.startswith("Tensor")]
    object.__setattr__(op, "tensors_end", tensors[-1] + 1)
    return op


def _not_a_view(tensor: Tensor) -> Tensor:
    return tensor.clone() if is_view(tensor) else tensor


class Kernel:
    """A kernel written in Python, with the checks of its op's contract.

    For such kernels this is the only place that handles strides: it makes inputs contiguous. Outputs, and tensors that
    the op changes in place, must be contiguous already; the contract checks that.

    Args:
        op: the op.
        run: the kernel: the ``_out`` form, or the op itself if it works in place.
    """

    def __init__(self, op: Op, run: Callable[..., None]) -> None:
        kinds = op.parameters
        strided = op.contract.strided
        self.op, self.run = op, run
        self._inputs = [i for i, n in enumerate(kinds) if kinds[n] in ("Tensor", "Tensor?") and n not in strided]

    def launch(self, *args: Any) -> None:
        """Run the kernel with arguments that were checked already."""
        contiguous = list(args)
        for i in self._inputs:
            if contiguous[i] is not None:
                contiguous[i] = contiguous[i].contiguous()
        self.run(*contiguous)

    def allocating(self, *args: Any) -> Any:
        """Run the op: check the arguments, and return new outputs or change arguments in place."""
        outputs = self.op.contract.meta(*args)
        self.launch(*args, *as_tuple(outputs))
        return outputs

    def writing(self, *args: Any) -> None:
        """Run the ``_out`` twin: check the arguments and write into the outputs at the end of ``args``."""
        self.op.contract.check_outputs(*self.op.split(args))
        self.launch(*args)
