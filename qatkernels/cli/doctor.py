"""`qatkernels doctor`."""

from __future__ import annotations

import argparse

from .common import BROKEN, Answer

LONG = f"""\
Show which backend serves which op here, what is missing, and how to get it. The
exit code is {BROKEN} if something is broken.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option of its own."""


def run(args: argparse.Namespace) -> Answer:
    """Return the diagnosis."""
    from .. import doctor

    diagnosis = doctor.diagnosis()
    code = BROKEN if diagnosis["broken"] else 0
    return Answer(diagnosis, lambda: print(doctor.prescription(diagnosis)), code)
