"""`qatkernels train`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from .arguments import add_options, settings_in
from .common import Answer, fail

USAGE = "qatkernels train [--SETTING VALUE ...] [--config TOML] [--resume | --restart]"
LONG = """\
Train a small byte-level transformer on real text in full precision. From that
checkpoint, train it quantized (QAT) at each bit width, and compare QAT with
rounding the weights to the nearest level without training.

The defaults take about five minutes on two CPU cores and download nothing: the
text is the source code of Python's standard library, with some files held out.
Ctrl-C stops at a checkpoint. The same command resumes from there, and skips
finished phases. `--resume` does the same without repeating other options.
"""
EPILOG = """\
written to --out:
  report.html                  table, curves, histograms of codes, settings and
                               machine: one file, opens without a network
  report.json                  the same as numbers
  log.jsonl                    losses over the steps
  fp/, w4/, w2/, w1.58/, w1/   model.safetensors and phase.json of each model;
                               transformers reads the folders of its models

examples:
  qatkernels train
  qatkernels train --data novels/ --bits 4 2 --steps 5000 --out runs/novels
  qatkernels train --resume --out runs/novels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, and the options to resume and to restart a run."""
    from ..trainer import TrainConfig

    add_options(parser, TrainConfig, title="run")
    resuming = parser.add_argument_group("resuming")
    resuming.add_argument(
        "--config", metavar="TOML", help="file with any of these settings; command-line options override it"
    )
    exclusive = resuming.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in --out, with its settings"
    )
    exclusive.add_argument(
        "--restart", action="store_true", default=False, help="delete the run in --out and start over"
    )


def run(args: argparse.Namespace) -> Answer | int:
    """Train, and return the report; only the first process has one to print."""
    from .. import trainer
    from ..trainer import toml
    from ..trainer.parallel import ParallelError

    try:
        given = toml.read(args.config) if "config" in args else {}
        given |= settings_in(args, trainer.TrainConfig)
        config = trainer.resumed(given) if args.resume else trainer.TrainConfig(**given)
        report = trainer.train(config, restart=args.restart)
    except trainer.Interrupted as stop:
        command = f"qatkernels train --resume --out {shlex.quote(config.out)}"
        print(f"{stop}; `{command}` continues from here", file=sys.stderr)
        return 128 + stop.number
    except (
        trainer.ConfigError, trainer.DataError, trainer.CheckpointError, trainer.DivergedError, ParallelError,
    ) as error:  # fmt: skip
        return fail(error)
    if os.environ.get("RANK", "0") != "0":
        return 0
    return Answer(report, lambda: trainer.show(report, config.out))
