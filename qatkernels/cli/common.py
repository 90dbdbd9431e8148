"""What the commands share: exit codes, and how they end on an error of the user's."""

from __future__ import annotations

import sys

#: Exit codes: something is broken; a command line or an input cannot be used.
BROKEN, BAD_USAGE = 1, 2


def fail(message: object) -> int:
    """Print an error on one line, and return the exit code of bad usage."""
    print(f"qatkernels: {message}", file=sys.stderr)
    return BAD_USAGE
