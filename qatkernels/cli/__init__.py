"""The `qatkernels` command."""

from .main import COMMANDS, main, run

__all__ = ["COMMANDS", "main", "run"]
