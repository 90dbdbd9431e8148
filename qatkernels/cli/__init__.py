"""The `qatkernels` command."""

from .common import BAD_USAGE, BROKEN
from .main import COMMANDS, main, run

__all__ = ["BAD_USAGE", "BROKEN", "COMMANDS", "main", "run"]
