"""`qatkernels check`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from ..options import AT_LEAST_1, check, option
from .arguments import add_options, made
from .common import BROKEN, fail

LONG = f"""\
Look for what makes training go wrong without an error. Runs a model that
`qatkernels train` or `pack` left forward and backward on random tokens, and
prints a table of its quantized layers. The exit code is {BROKEN} if there is a
problem.
"""


@dataclass(frozen=True)
class CheckConfig:
    """What `qatkernels check` is asked for."""

    model: str = option(MISSING, "file of `pack`, or a folder such as runs/demo/w2", metavar="MODEL", positional=True)
    tokens: int = option(64, "tokens to run it on", AT_LEAST_1)

    def __post_init__(self) -> None:
        check(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, CheckConfig)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from .. import check as look
    from ..trainer import CheckpointError, generate, models

    try:
        config = made(args, CheckConfig)
        model, described = generate.open_model(Path(config.model))
        vocabulary, longest = models.limits(described)
        tokens = config.tokens if longest is None else min(config.tokens, longest)
        drawn = torch.randint(vocabulary or 2, (2, tokens), generator=torch.Generator().manual_seed(0))
        report = look(model, drawn)
    except (CheckpointError, ValueError) as error:
        return fail(error)
    print(report)
    return 0 if report.ok else BROKEN
