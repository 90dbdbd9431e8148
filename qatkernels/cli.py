"""The `qatkernels` command. A subcommand is a function that adds its parser, and a function that runs it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

USAGE_ERROR = 2

_TRAIN = """\
Train a small byte-level transformer in full precision on real text, then by quantization-aware training at each bit
width from that checkpoint, and compare with rounding its weights to the nearest level without training.

The defaults take about five minutes on two CPU cores and download nothing: the text is the source of this Python's
standard library, with some files held out. Ctrl-C stops at a checkpoint. The same command goes on from there, and
finished parts are not run again; `--resume` does so without repeating the other options.
"""

_EPILOG = """\
written to --out:
  report.json, curves.png      the table, the curves, and what they were measured on
  log.jsonl                    training loss and held-out bits per byte over the steps
  fp/, w4/, w2/, w1.58/, w1/   model.safetensors and config.json of each trained model

examples:
  qatkernels train
  qatkernels train --data novels/ --bits 4 2 --steps 5000 --out runs/novels
  qatkernels train --resume --out runs/novels
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (something is broken), 2 (bad usage) or 128 + a signal."""
    parser = argparse.ArgumentParser(prog="qatkernels", description="Quantization-aware training at 1 to 8 bits.")
    parser.add_argument("--version", action="version", version=f"qatkernels {_version('qatkernels')}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for register in (_add_train, _add_doctor, _add_bench):
        register(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.run(args, rest))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _fail(message: object) -> int:
    print(f"qatkernels: {message}", file=sys.stderr)
    return USAGE_ERROR


def _version(package: str) -> str | None:
    if package == "qatkernels":
        from . import __version__

        return __version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


# train


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train in full precision, then at 4, 2, 1.58 and 1 bits, and compare",
        description=_TRAIN, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=_train)
    try:
        from .train import TrainConfig
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "safetensors", "matplotlib"):
            raise
        return
    groups: dict[str, Any] = {}
    for entry in fields(TrainConfig):
        name = entry.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        group.add_argument(
            f"--{entry.name.replace('_', '-')}", default=argparse.SUPPRESS, metavar=_metavar(entry.default),
            type=float if isinstance(entry.default, tuple) else str if entry.default is None else type(entry.default),
            nargs="+" if isinstance(entry.default, tuple) else None,
            help=entry.metadata["help"] + _default(entry.default),
        )  # fmt: skip
    again = groups["run"].add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own options")
    again.add_argument("--restart", action="store_true", help="delete the run in --out and start over")
