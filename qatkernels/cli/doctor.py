"""`qatkernels doctor`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .common import BROKEN


def run(argv: Sequence[str]) -> int:
    """Say which backend serves which op here, what is missing, and how to get it."""
    from .. import doctor as job

    parser = argparse.ArgumentParser(
        prog="qatkernels doctor", description=f"{run.__doc__} The exit code is {BROKEN} if something is broken."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = job.diagnosis()
    print(json.dumps(found, indent=2) if args.json else job.prescription(found))
    return BROKEN if found["broken"] else 0
