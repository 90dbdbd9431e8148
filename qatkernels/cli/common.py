"""Exit codes of the commands, and the output for an error of the user."""

from __future__ import annotations

import sys

#: Exit codes: the command found a problem; the command line or an input cannot be used.
BROKEN, BAD_USAGE = 1, 2


def fail(message: object) -> int:
    """Print an error on one line, and return the exit code of bad usage."""
    print(f"qatkernels: {message}", file=sys.stderr)
    return BAD_USAGE
