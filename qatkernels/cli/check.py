"""`qatkernels check`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from ..options import AT_LEAST_1, check, option
from .arguments import add_options, from_arguments
from .common import BROKEN, Answer, fail

LONG = f"""\
Find problems in a model that would spoil training without an error. Runs a
model that `qatkernels train` or `pack` wrote forward and backward on random
tokens, and prints a table of its quantized layers. The exit code is {BROKEN} if
there is a problem.
"""


@dataclass(frozen=True)
class CheckConfig:
    """The settings of `qatkernels check`."""

    model: str = option(
        MISSING, "file that `pack` wrote, or a folder such as runs/demo/w2", metavar="MODEL", positional=True
    )
    tokens: int = option(64, "random tokens to run the model on", AT_LEAST_1)

    def __post_init__(self) -> None:
        check(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, CheckConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Return the table."""
    from .. import check as check_model
    from ..trainer import CheckpointError, generate, models

    try:
        config = from_arguments(args, CheckConfig)
        model, described = generate.open_model(Path(config.model))
        vocabulary, longest = models.limits(described)
        tokens = config.tokens if longest is None else min(config.tokens, longest)
        batch = torch.randint(vocabulary or 2, (2, tokens), generator=torch.Generator().manual_seed(0))
        report = check_model(model, batch)
    except (CheckpointError, ValueError) as error:
        return fail(error)
    return Answer(report.to_dict(), lambda: print(report), 0 if report.ok else BROKEN)
