"""Checks of argument types. Errors name the argument, its value and what is allowed.

Without these checks a wrong type fails somewhere inside torch, with a message about something else. Values and shapes
are checked by the functions that use them.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

#: What to do about torch.fx, which calls a model with placeholders for tensors.
TRACED = (
    "torch.fx.symbolic_trace goes into layers of qatkernels: use torch.export.export, or a torch.fx.Tracer whose "
    "is_leaf_module is True for them"
)


def wrong_type(name: str, value: object, allowed: str) -> TypeError:
    """Return the error for an argument of a type that is not allowed."""
    if isinstance(value, Tensor):
        shown = f"a tensor, {value.dtype} of shape {tuple(value.shape)}"
    else:
        shown = " ".join(repr(value).split())[:80]  # the repr of a module has many lines
    hint = f". {TRACED}" if isinstance(value, torch.fx.Proxy) else ""
    return TypeError(f"{name} is {shown}, must be {allowed}{hint}")


def check_tensors(**values: Any) -> None:
    """Raise TypeError unless all are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise wrong_type(name, value, "a tensor")


def check_optional_tensors(**values: Any) -> None:
    """Raise TypeError unless all are tensors or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise wrong_type(name, value, "a tensor or None")


def is_integer(value: object) -> bool:
    """Whether a value is an integer: of Python, of numpy, or traced by torch.compile. A bool is not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, torch.SymInt, numbers.Integral))


def is_real(value: object) -> bool:
    """Whether a value is a real number. A bool is not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (float, int, torch.SymInt, torch.SymFloat, numbers.Real))


def check_integers(**values: Any) -> None:
    """Raise TypeError unless all are integers."""
    for name, value in values.items():
        if not is_integer(value):
            raise wrong_type(name, value, "an integer")


def check_optional_integers(**values: Any) -> None:
    """Raise TypeError unless all are integers or None."""
    for name, value in values.items():
        if value is not None and not is_integer(value):
            raise wrong_type(name, value, "an integer or None")


def check_reals(**values: Any) -> None:
    """Raise TypeError unless all are real numbers."""
    for name, value in values.items():
        if not is_real(value):
            raise wrong_type(name, value, "a number")


def check_optional_reals(**values: Any) -> None:
    """Raise TypeError unless all are real numbers or None."""
    for name, value in values.items():
        if value is not None and not is_real(value):
            raise wrong_type(name, value, "a number or None")


def check_bools(**values: Any) -> None:
    """Raise TypeError unless all are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise wrong_type(name, value, "True or False")


def check_strings(**values: Any) -> None:
    """Raise TypeError unless all are strings."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise wrong_type(name, value, "a string")


def check_dtype(dtype: Any, *, name: str = "dtype") -> None:
    """Raise TypeError unless this is a dtype of torch."""
    if not isinstance(dtype, torch.dtype):
        raise wrong_type(name, dtype, "a torch.dtype such as torch.float32")
