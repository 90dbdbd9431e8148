"""`qatkernels check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .common import BROKEN, fail


def run(argv: Sequence[str]) -> int:
    """Look for what makes training go wrong without an error."""
    from ..files import CheckpointError
    from ..nn import check as look
    from ..trainer import generate as job
    from ..trainer import models

    parser = argparse.ArgumentParser(
        prog="qatkernels check",
        description=f"{run.__doc__} Runs a model that `qatkernels train` or `pack` left forward and backward on "
        f"random tokens, and prints a table of its quantized layers. The exit code is {BROKEN} if there is a problem.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of `pack`, or a folder such as runs/demo/w2")
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="tokens to run it on (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.tokens < 1:
        return fail(f"--tokens is {args.tokens}, must be at least 1")
    try:
        model, described = job.opened(args.model)
        vocabulary, longest = models.limits(described)
        tokens = args.tokens if longest is None else min(args.tokens, longest)
        drawn = torch.randint(vocabulary or 2, (2, tokens), generator=torch.Generator().manual_seed(0))
        report = look(model, drawn)
    except (CheckpointError, ValueError) as error:
        return fail(error)
    print(report)
    return 0 if report.ok else BROKEN
