"""`qatkernels train`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from .arguments import add_options, settings_in
from .common import fail

USAGE = "qatkernels train [--SETTING VALUE ...] [--config TOML] [--resume | --restart]"
LONG = """\
Train a small byte-level transformer in full precision on real text, then by
quantization-aware training at each bit width from that checkpoint, and compare
with rounding its weights to the nearest level without training.

The defaults take about five minutes on two CPU cores and download nothing: the
text is the source of this Python's standard library, with some files held out.
Ctrl-C stops at a checkpoint. The same command goes on from there, and finished
parts are not run again; `--resume` does so without repeating other options.
"""
EPILOG = """\
written to --out:
  report.json, curves.png      table, curves, and what they were measured on
  log.jsonl                    losses over the steps
  fp/, w4/, w2/, w1.58/, w1/   model.safetensors and config.json of each model

examples:
  qatkernels train
  qatkernels train --data novels/ --bits 4 2 --steps 5000 --out runs/novels
  qatkernels train --resume --out runs/novels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, and what is about the run itself."""
    from ..trainer import TrainConfig

    add_options(parser, TrainConfig, title="run")
    resuming = parser.add_argument_group("resuming")
    resuming.add_argument(
        "--config", metavar="TOML", help="file with any of these settings; options given here override it"
    )
    again = resuming.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in --out, with its settings"
    )
    again.add_argument("--restart", action="store_true", default=False, help="delete the run in --out and start over")


def run(args: argparse.Namespace) -> int:
    """Train, and show the table."""
    from .. import trainer
    from ..trainer import toml
    from ..trainer.parallel import ParallelError

    try:
        given = toml.read(args.config) if "config" in args else {}
        given |= settings_in(args, trainer.TrainConfig)
        config = trainer.resumed(given) if args.resume else trainer.TrainConfig(**given)
        report = trainer.train(config, restart=args.restart)
    except trainer.Interrupted as stop:
        print(f"{stop}; `qatkernels train --resume --out {shlex.quote(config.out)}` goes on from here", file=sys.stderr)
        return 128 + stop.number
    except (
        trainer.ConfigError, trainer.DataError, trainer.CheckpointError, trainer.DivergedError, ParallelError,
    ) as error:  # fmt: skip
        return fail(error)
    if os.environ.get("RANK", "0") == "0":
        trainer.show(report, config.out)
    return 0
