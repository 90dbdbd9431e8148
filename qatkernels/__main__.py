"""`python -m qatkernels` is the `qatkernels` command."""

import sys

from .cli import run

sys.exit(run())
