"""What the arguments of an op must be and what its outputs are, stated once for everything that runs it.

A contract is a text. Python reads it here, for the meta rule (fake and compiled calls), the reference and Triton; the
extension reads the same text (csrc/bindings/contract.cpp), for calls that never enter Python. Both check in the same
order with the same messages: tests/ops/test_contract.py compares them for all ops, and for random expressions. A text
that the extension cannot read is refused here. One statement a line, in the order in which they are checked::

    x: float [*T, K]                                  a tensor: allowed dtypes, shape
    packed: uint8 [E if offsets, N, row_bytes(K, bits)]   optional dimensions, expressions
    zero_point: float32 [*S]                          skipped where the argument is None
    dtype: narrow(w)                                  a dtype
    require 1 <= bits <= 8; bits is {bits}, must be 1 to 8
    let K = cols                                      a name for an expression
    -> out: like(x) [*T, N]                           an output

*Dtypes*: names of torch, joined by ``|``; ``float`` for any of float32, bfloat16, float16 and float64; ``like(a)``,
that of argument a; ``narrow(a)``, that of a, or a 16-bit float where a is float32; ``wide(a)``, float64 where a is
float64, else float32; ``scale(a)``, float32, or float64 where a is float64. Outputs also have ``default(a, b)``, the
dtype a, or that of b where a is None; and ``code(n)``, uint8 if n exceeds 127, else int8.

*Shapes*: a new name takes the size of its dimension, a known one must equal it; ``*T`` stands for any number of
dimensions at the front; ``one`` in place of a shape is a tensor with one element. An output may have two shapes,
``[*S] if zero_point else [0]``. The expressions of optional dimensions and of two shapes have no ``if`` of their own:
give them a name with ``let`` before.

*Expressions* are Python's (`_expression.py`): comparisons and ``and``, ``or``, ``not``, ``if`` of integers, floats,
``inf`` and None, and ``+ - * % **`` of integers that are not negative. They may use arguments (a tensor counts as
True), sizes that earlier statements named, ``numel(S)``, ``len(S)``, ``min(a, b)`` and ``row_bytes(cols, bits)``.

All tensors must be on the device of the first one. A tensor that is changed in place must be contiguous. Other inputs
are made contiguous before a kernel sees them, unless their line ends in ``strided``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..grids import code_dtype
from ._expression import FUNCTIONS, compiled

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


#: Dtypes that a contract may name.
_FIXED = {dtype_name(dtype): dtype for dtype in (*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64)}
#: Dtypes that depend on arguments, and of how many.
_DEPENDENT = {"like": 1, "narrow": 1, "wide": 1, "scale": 1, "default": 2}


class Output(NamedTuple):
    """What an output is: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Dim:
    """A dimension: a name or an expression; ``star`` if the name is that of any number of dimensions."""

    text: str
    star: bool = False
    code: CodeType | None = None
    condition: CodeType | None = None

    @classmethod
    def parse(cls, text: str, scope: _Scope) -> _Dim:
        if text.startswith("*"):
            return cls(scope.define(text[1:]), star=True)
        optional = re.fullmatch(r"(.*) if ((?:(?! else ).)*)", text)
        if optional and " else " in optional[1]:
            raise ValueError(f"the contract's dimension {text!r} has an if of its own, must be named by a let before")
        condition = scope.compiled(optional[2]) if optional else None
        text = optional[1] if optional else text
        if re.fullmatch(r"[A-Z]\w*", text):
            return cls(scope.define(text), condition=condition)
        return cls(text, code=scope.compiled(text), condition=condition)


class _Scope:
    """The names that an expression may use: arguments, and what the statements before it define.

    Args:
        parameters: names of the op's arguments and their types.
    """

    def __init__(self, parameters: dict[str, str]) -> None:
        self.names = set(parameters)
        self.reals = {name for name, kind in parameters.items() if kind.removesuffix("?") == "float"}

    def define(self, name: str) -> str:
        self.names.add(name)
        return name

    def compiled(self, text: str) -> CodeType:
        return compiled(text, self.names, self.reals)


class _Shape(NamedTuple):
    dims: tuple[_Dim, ...]
    one: bool = False

    @classmethod
    def parse(cls, text: str, scope: _Scope) -> _Shape | None:
        if text == "one":
            return cls((), one=True)
        if not text:
            return None
        dims = tuple(_Dim.parse(part, scope) for part in _split(text.removeprefix("[").removesuffix("]")))
        if any(dim.star for dim in dims[1:]):
            raise ValueError(f"the contract's {text} has a * that is not in front")
        return cls(dims)

    def here(self, names: dict[str, Any]) -> list[_Dim]:
        """The dimensions that this call has."""
        return [dim for dim in self.dims if dim.condition is None or eval(dim.condition, FUNCTIONS, names)]

    def size(self, names: dict[str, Any]) -> tuple[int, ...]:
        """The shape, all of whose names are known."""
        sizes: list[int] = []
        for dim in self.here(names):
            if dim.star:
                sizes += names[dim.text]
            else:
                sizes.append(names[dim.text] if dim.code is None else eval(dim.code, FUNCTIONS, names))
        return tuple(sizes)

    def show(self, names: dict[str, Any]) -> str:
        """The shape as a message has it, names that are not known as they are."""
        parts: list[str] = []
        for dim in self.here(names):
            if dim.star:
                parts += map(str, names[dim.text]) if dim.text in names else ["..."]
            elif dim.code is None:
                parts.append(str(names.get(dim.text, dim.text)))
            else:
                try:
                    parts.append(str(eval(dim.code, FUNCTIONS, names)))
                except NameError:  # of sizes that are not known yet
                    parts.append(dim.text)
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses; leave out empty parts."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class _Dtypes:
    """Allowed dtypes: fixed ones, and those that depend on arguments. ``number`` is the expression of ``code``."""

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    number: CodeType | None = None

    @classmethod
    def parse(cls, text: str, scope: _Scope) -> _Dtypes:
        found, number = [], None
        for part in text.split("|"):
            kind, _, rest = part.strip().partition("(")
            arguments = tuple(_split(rest.removesuffix(")")))
            if kind == "code":
                number = scope.compiled(arguments[0])
            elif len(arguments) != _DEPENDENT.get(kind, 0) or not set(arguments) <= scope.names:
                raise ValueError(f"the contract's dtype {part.strip()} must be of {_DEPENDENT.get(kind, 0)} arguments")
            elif not arguments and kind not in ("float", *_FIXED):
                raise ValueError(f"the contract has no dtype {kind}, must be float or one of {', '.join(_FIXED)}")
            found.append((kind, arguments))
        return cls(tuple(found), number)

    def allowed(self, dtypes: dict[str, torch.dtype | None], names: dict[str, Any]) -> tuple[torch.dtype, ...]:
        """The dtypes, for outputs one."""
        found: list[torch.dtype] = []
        for kind, arguments in self.parts:
            of: Any = dtypes.get(arguments[0]) if arguments else None
            if kind == "float":
                found += FLOATS
            elif kind == "like":
                found.append(of)
            elif kind == "narrow":
                found += (of, *_NARROW) if of == torch.float32 else (of,)
            elif kind == "wide":
                found.append(torch.float64 if of == torch.float64 else torch.float32)
            elif kind == "scale":
                found += (torch.float32, torch.float64) if of == torch.float64 else (torch.float32,)
            elif kind == "default":
                found += [dtype for dtype in (of, dtypes[arguments[1]]) if dtype is not None][:1]
            elif kind == "code":
                assert self.number is not None
                found.append(code_dtype(eval(self.number, FUNCTIONS, names)))
            else:
                found.append(_FIXED[kind])
        return tuple(found)


def _one_of(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = map(str, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class _Argument:
    name: str
    dtypes: _Dtypes
    shape: _Shape | None
    strided: bool


@dataclass(frozen=True)
class _Requirement:
    condition: CodeType
    message: tuple[tuple[str, CodeType | None], ...]

    @classmethod
    def parse(cls, text: str, scope: _Scope) -> _Requirement:
        condition, message = text.split("; ", 1)
        parts = re.split(r"\{(.*?)\}", message)
        shown = tuple((part, scope.compiled(part) if i % 2 else None) for i, part in enumerate(parts))
        return cls(scope.compiled(condition), shown)

    def show(self, names: dict[str, Any]) -> str:
        return "".join(text if code is None else str(eval(code, FUNCTIONS, names)) for text, code in self.message)


class _Let(NamedTuple):
    name: str
    expression: CodeType


@dataclass(frozen=True)
class _Output:
    name: str
    dtypes: _Dtypes
    shape: _Shape
    condition: CodeType | None
    otherwise: _Shape | None

    @classmethod
    def parse(cls, text: str, scope: _Scope) -> _Output:
        name, rest = text.split(": ", 1)
        dtypes, _, shape = rest.partition(" [")
        first, _, second = f"[{shape}".partition("] if ")
        condition, _, otherwise = second.partition(" else ")
        main, other = _Shape.parse(first, scope), _Shape.parse(otherwise, scope)
        assert main is not None
        code = scope.compiled(condition) if condition else None
        return cls(name, _Dtypes.parse(dtypes, scope), main, code, other)


class Contract:
    """A contract, read.

    Args:
        text: the statements.
        parameters: names of the op's arguments and their types, as the schema has them.

    Attributes:
        text: the statements, a line each.
        outputs: names of the outputs.
        strided: names of the inputs that kernels take with any strides.
    """

    def __init__(self, text: str, parameters: dict[str, str]) -> None:
        self.text = "\n".join(line for line in map(str.strip, text.splitlines()) if line)
        self.parameters = parameters
        self._statements: list[_Argument | _Requirement | _Let] = []
        self._outputs: list[_Output] = []
        scope = _Scope(parameters)
        for line in self.text.splitlines():
            if line.startswith("require "):
                self._statements.append(_Requirement.parse(line.removeprefix("require "), scope))
            elif line.startswith("let "):
                name, expression = line.removeprefix("let ").split(" = ")
                self._statements.append(_Let(name, scope.compiled(expression)))
                scope.define(name)
            elif line.startswith("-> "):
                self._outputs.append(_Output.parse(line.removeprefix("-> "), scope))
            else:
                self._statements.append(self._argument(line, scope))
        stated = {statement.name for statement in self._statements if isinstance(statement, _Argument)}
        silent = [name for name, kind in parameters.items() if kind.startswith("Tensor") and name not in stated]
        if silent:
            raise ValueError(f"the contract says nothing of {silent}, and a kernel would take any tensor there")
        self.outputs = tuple(output.name for output in self._outputs)
        self.strided = frozenset(s.name for s in self._statements if isinstance(s, _Argument) and s.strided)

    def _argument(self, line: str, scope: _Scope) -> _Argument:
        found = re.fullmatch(r"(\w+): ([^\[]*?)(?: (\[.*\]|one))?( strided)?", line)
        if found is None or found[1] not in self.parameters:
            raise ValueError(f"the contract's line {line!r} is of no argument of {list(self.parameters)}")
        shape = _Shape.parse(found[3] or "", scope)
        return _Argument(found[1], _Dtypes.parse(found[2], scope), shape, bool(found[4]))

    def check(self, args: Sequence[Any]) -> dict[str, Any]:
        """Raise RuntimeError unless the arguments fit, naming the one that does not; return what names stand for."""
        given = dict(zip(self.parameters, args, strict=True))
        names = {name: True if isinstance(value, Tensor) else value for name, value in given.items()}
        dtypes = {name: getattr(value, "dtype", value) for name, value in given.items()}
        first = next(name for name, value in given.items() if isinstance(value, Tensor))
        for statement in self._statements:
            if isinstance(statement, _Requirement):
                torch._check(eval(statement.condition, FUNCTIONS, names), lambda s=statement: s.show(names))
            elif isinstance(statement, _Let):
                names[statement.name] = eval(statement.expression, FUNCTIONS, names)
            elif given[statement.name] is not None:
                self._check_argument(statement, given[statement.name], dtypes, names, (first, given[first].device))
        for name, kind in self.parameters.items():
            if "!" in kind:
                torch._check(
                    given[name].is_contiguous(),
                    lambda name=name: f"{name} has strides {tuple(given[name].stride())}, must be contiguous",
                )
        return names

    def _check_argument(
        self, argument: _Argument, value: Any, dtypes: Any, names: dict[str, Any], first: tuple[str, torch.device]
    ) -> None:
        name, allowed = argument.name, argument.dtypes.allowed(dtypes, names)
        torch._check(dtypes[name] in allowed, lambda: f"{name} is {dtypes[name]}, must be {_one_of(allowed)}")
        if not isinstance(value, Tensor):
            return
        torch._check(
            value.device == first[1], lambda: f"{name} is on {value.device}, must be on {first[1]} like {first[0]}"
        )
        if argument.shape is not None:
            _match(name, value, argument.shape, names)

    def specs(self, args: Sequence[Any]) -> list[Output]:
        """Check the arguments and return what the outputs are."""
        names = self.check(args)
        dtypes = {name: getattr(value, "dtype", value) for name, value in zip(self.parameters, args, strict=True)}
        found = []
        for output in self._outputs:
            shape = output.shape
            if output.condition is not None and not eval(output.condition, FUNCTIONS, names):
                assert output.otherwise is not None
                shape = output.otherwise
            found.append(Output(output.name, shape.size(names), output.dtypes.allowed(dtypes, names)[0]))
        return found

    def meta(self, *args: Any) -> Any:
        """Check the arguments and return new outputs that nothing was written into: one, a tuple, or None."""
        device = next(value.device for value in args if isinstance(value, Tensor))
        made = tuple(torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in self.specs(args))
        return made[0] if len(made) == 1 else made or None

    def check_outputs(self, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the arguments fit, and ValueError unless the outputs that are written into do."""
        device = next(value.device for value in args if isinstance(value, Tensor))
        for spec, out in zip(self.specs(args), outputs, strict=True):
            check_out(spec.name, out, torch.Size(spec.shape), spec.dtype, device)


def _match(name: str, value: Tensor, shape: _Shape, names: dict[str, Any]) -> None:
    """Raise RuntimeError unless a tensor has a shape; give names that are new the sizes that they stand for."""
    if shape.one:
        torch._check(value.numel() == 1, lambda: f"{name} has shape {tuple(value.shape)}, must have one element")
        return
    dims = shape.here(names)
    sizes, known = list(value.shape), dict(names)

    def message() -> str:
        return f"{name} has shape {tuple(value.shape)}, must be {shape.show(known)}"

    if dims and dims[0].star:
        leading = max(len(sizes) - len(dims) + 1, 0)
        before, sizes = tuple(sizes[:leading]), sizes[leading:]
        wanted = names.setdefault(dims[0].text, before)
        torch._check(len(wanted) == len(before), message)
        for a, b in zip(before, wanted, strict=True):
            torch._check(a == b, message)
        dims = dims[1:]
    torch._check(len(sizes) == len(dims), message)
    for dim, size in zip(dims, sizes, strict=True):
        wanted_size = names.setdefault(dim.text, size) if dim.code is None else eval(dim.code, FUNCTIONS, names)
        torch._check(size == wanted_size, message)


def check_out(name: str, given: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless ``given`` is a contiguous tensor of this shape, dtype and device."""
    if given.shape != shape or given.dtype != dtype or given.device != device:
        raise ValueError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}, "
            f"must be {dtype} of shape {tuple(shape)} on {device}"
        )
    if not given.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(given.stride())}, must be contiguous")
