"""`qatkernels doctor`."""

from __future__ import annotations

import argparse
import json

from .common import BROKEN

LONG = f"""\
Show which backend serves which op here, what is missing, and how to get it. The
exit code is {BROKEN} if something is broken.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis."""
    from .. import doctor

    diagnosis = doctor.diagnosis()
    print(json.dumps(diagnosis, indent=2) if args.json else doctor.prescription(diagnosis))
    return BROKEN if diagnosis["broken"] else 0
