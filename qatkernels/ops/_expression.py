"""Expressions in contracts: the part of Python that the extension evaluates too (csrc/bindings/expression.cpp).

Python compiles an expression, the extension parses the same text. So an expression is refused here, when its op is
declared, if the extension would refuse it or could give it another value.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection
from functools import cache
from types import CodeType
from typing import Any, NamedTuple


def row_bytes(cols: int, bits: int) -> int:
    """Return how many bytes a row of codes takes."""
    return (cols * bits + 7) // 8


#: The functions, and how many arguments each has.
_ARITY = {"numel": 1, "len": 1, "min": 2, "row_bytes": 2}
#: What `eval` gets as globals.
FUNCTIONS: dict[str, Any] = {
    "numel": math.prod, "len": len, "min": min, "row_bytes": row_bytes, "inf": math.inf, "__builtins__": {},
}  # fmt: skip

_NODES = (
    ast.Expression, ast.Load, ast.Name, ast.Constant, ast.Call, ast.IfExp,
    ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Mod, ast.Pow,
    ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.Is, ast.IsNot,
)  # fmt: skip


def compiled(text: str, names: Collection[str], reals: Collection[str] = ()) -> CodeType:
    """Compile an expression.

    Args:
        text: the expression.
        names: the names that it may use: arguments, and sizes that earlier statements define.
        reals: those of them that are floating point numbers, which arithmetic does not take.

    Raises:
        ValueError: if it is not an expression of the language.
    """
    read = _read(text.strip())
    for name in read.names:
        if name not in names:
            raise ValueError(
                f"the contract's {text!r} has the name {name}, must be an argument or a size from an earlier statement"
            )
    for name in read.in_arithmetic:
        if name in reals or name == "inf":
            raise ValueError(f"the contract's {text!r} has arithmetic with {name}, must be of integers")
    return read.code


class _Read(NamedTuple):
    code: CodeType
    names: frozenset[str]
    in_arithmetic: frozenset[str]


@cache  # contracts repeat each other's expressions, and compiling takes a good part of the import
def _read(text: str) -> _Read:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise ValueError(f"the contract's {text!r} is not an expression") from None
    names, in_arithmetic = set(), set()
    for node in ast.walk(tree):
        if (wrong := _wrong(node)) is not None:
            raise ValueError(f"the contract's {text!r} has {wrong}")
        if isinstance(node, ast.Name) and node.id not in FUNCTIONS:
            names.add(node.id)
        if isinstance(node, ast.BinOp):
            in_arithmetic |= {side.id for side in (node.left, node.right) if isinstance(side, ast.Name)}
    for number in re.findall(r"(?<![\w.])\d[\w.]*", text):
        if re.fullmatch(r"\d+(\.\d+)?", number) is None:
            raise ValueError(f"the contract's {text!r} has the number {number}, must be digits, or digits.digits")
    return _Read(compile(tree, "<contract>", "eval"), frozenset(names), frozenset(in_arithmetic))


def _wrong(node: ast.AST) -> str | None:
    """Return what is wrong with a node by itself, or None."""
    if not isinstance(node, _NODES):
        return f"{type(node).__name__}, which the language does not have"
    if isinstance(node, ast.Constant) and (isinstance(node.value, bool) or not _is_number_or_none(node.value)):
        return f"the constant {node.value!r}, must be a number or None"
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in _ARITY or node.keywords or len(node.args) != _ARITY[name]:
            return f"the call {ast.unparse(node)}, must be of {', '.join(_ARITY)}"
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        right = node.comparators[0]
        if len(node.ops) > 1 or not isinstance(right, ast.Constant) or right.value is not None:
            return f"{ast.unparse(node)}: `is` compares with None only"
    if isinstance(node, ast.BinOp):
        for side in (node.left, node.right):
            if isinstance(side, ast.Constant) and not isinstance(side.value, int):
                return f"arithmetic with {side.value!r}, must be of integers"
    return None


def _is_number_or_none(value: object) -> bool:
    return value is None or isinstance(value, (int, float))
