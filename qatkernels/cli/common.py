"""What a command returns: an answer to print, or the exit code of an error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Exit codes: the command found a problem; the command line or an input cannot be used.
BROKEN, BAD_USAGE = 1, 2


@dataclass(frozen=True)
class Answer:
    """The answer of a command.

    Attributes:
        result: what ``--json`` prints, as one JSON object.
        show: prints the answer for a person.
        code: the exit code.
    """

    result: Mapping[str, Any]
    show: Callable[[], None]
    code: int = 0


def as_json(value: Any) -> Any:
    """Return a value with None in place of numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def fail(message: object) -> int:
    """Print an error on one line, and return the exit code of bad usage."""
    print(f"qatkernels: {message}", file=sys.stderr)
    return BAD_USAGE
