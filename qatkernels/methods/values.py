"""Validators for values that users give: bools are not numbers, counts are integers, a closure is a function."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value is an integer."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_seed(name: str, value: int) -> None:
    """Raise ValueError if torch's generators do not accept a seed."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} is {value}, must be -2**63 to 2**64 - 1")


def check_count(name: str, value: Any, least: int, otherwise: str = "") -> None:
    """Raise ValueError unless a value is an integer of at least ``least``.

    Args:
        name: name of the argument, for the message.
        value: its value.
        least: smallest value that is allowed.
        otherwise: end of the message, which names other allowed values.
    """
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} is {value!r}, must be a whole number and at least {least}{otherwise}")


def check_size(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a finite number of at least 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, must be finite and >= 0")


def check_closure(call: str, closure: Any) -> Callable[[], Any]:
    """Return ``closure``, or raise ValueError if it cannot be called.

    Args:
        call: the method that was called, for the message.
        closure: a function without arguments.
    """
    if not callable(closure):
        raise ValueError(
            f"closure is {type(closure).__name__}, must be a function without arguments that zeroes the gradients, "
            f"computes the loss, calls backward() on it and returns it: {call} runs it once or several times"
        )
    return closure
