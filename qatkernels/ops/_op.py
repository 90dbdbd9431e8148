"""How an op is declared: a schema, a contract, a reference; any number of faster implementations.

An op is a plain function in PyTorch (the *reference*: its meaning, and the kernel that runs where nothing faster is
installed) and a *contract* (`contract.py`): what its arguments must be and what its outputs are. Both go to
``torch.library``. Every op has a twin named ``<op>_out`` that writes into tensors the caller supplies; ops that change
their arguments in place have no outputs, a name that ends in ``_``, and no twin.

`qatkernels/backends` overrides the reference per device. A kernel is written in one form only: the ``_out`` twin, or
the op itself if it works in place. :class:`Kernel` puts it behind the contract, makes its inputs contiguous, and makes
the op that allocates its outputs out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
        arguments: argument list of the schema; what the op changes is marked ``Tensor(a!)``.
        contract: what the arguments must be and what the outputs are.
        reference: the meaning, in plain PyTorch.
        overload: what torch calls, once the op is declared.
        tensors_end: how many arguments there are up to the last tensor.
        functions: the autograd Function of the op, if it has derivatives; it enters itself here.
    """

    name: str
    arguments: str
    contract: Contract
    reference: Callable[..., Outputs | None]
    overload: Any = None
    tensors_end: int = 0
    functions: list[Any] = field(default_factory=list)

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

    def call(self, *args: Any) -> Any:
        """Call the op from a public function: with derivatives where somebody can ask for them."""
        if torch.compiler.is_compiling():
            return self.overload(*args)  # the rules of its derivatives are registered with torch
        if differentiable(args[: self.tensors_end]):
            return self.functions[0].apply(*args)
        with below_autograd():
            return self.overload(*args)

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


def differentiable(args: tuple[Any, ...]) -> bool:
    """Whether anybody can ask for derivatives of a call: gradients, forward mode or a transform of torch.func."""
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return True
    return in_forward_mode() or in_transform()


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
    # Plain attributes: Dynamo traces no cached property.
    object.__setattr__(op, "overload", getattr(torch.ops.qatkernels, name).default)
    tensors = [i for i, kind in enumerate(op.parameters.values()) if kind.startswith("Tensor")]
    object.__setattr__(op, "tensors_end", tensors[-1] + 1)
    return op


def _not_a_view(tensor: Tensor) -> Tensor:
    return tensor.clone() if is_view(tensor) else tensor


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
