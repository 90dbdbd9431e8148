"""The `qatkernels` command."""

from ._main import COMMANDS, main, run
from .common import BAD_USAGE, BROKEN

__all__ = ["BAD_USAGE", "BROKEN", "COMMANDS", "main", "run"]
