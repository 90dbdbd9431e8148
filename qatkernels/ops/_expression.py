"""Expressions in contracts: the part of Python that the extension evaluates too (csrc/bindings/expression.cpp).

Python compiles an expression, the extension parses the same text. So an expression is refused here, when its op is
declared, if the extension would refuse it or could give it another value.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection
from types import CodeType
from typing import Any


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
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"the contract's {text!r} is not an expression") from None
    for node in ast.walk(tree):
        if (wrong := _wrong(node, names, reals)) is not None:
            raise ValueError(f"the contract's {text!r} has {wrong}")
    for number in re.findall(r"(?<![\w.])\d[\w.]*", text):
        if re.fullmatch(r"\d+(\.\d+)?", number) is None:
            raise ValueError(f"the contract's {text!r} has the number {number}, must be digits, or digits.digits")
    return compile(tree, "<contract>", "eval")


def _wrong(node: ast.AST, names: Collection[str], reals: Collection[str]) -> str | None:
    """Return what is wrong with a node by itself, or None."""
    if not isinstance(node, _NODES):
        return f"{type(node).__name__}, which the language does not have"
    if isinstance(node, ast.Constant) and (isinstance(node.value, bool) or not _is_number_or_none(node.value)):
        return f"the constant {node.value!r}, must be a number or None"
    if isinstance(node, ast.Name) and node.id not in names and node.id not in FUNCTIONS:
        return f"the name {node.id}, must be an argument or a size from an earlier statement"
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
            if isinstance(side, ast.Name) and (side.id in reals or side.id == "inf"):
                return f"arithmetic with {side.id}, must be of integers"
    return None


def _is_number_or_none(value: object) -> bool:
    return value is None or isinstance(value, (int, float))
