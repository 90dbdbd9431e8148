"""The command line: subcommands, each in the module of its name, with ``run(arguments)`` that returns the exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__

#: Subcommands by name, and their line in `qatkernels --help`. A module is imported when its command is called, since
#: some need what others do without.
COMMANDS = {
    "train": "Train in full precision and at low bit widths, and compare.",
    "plan": "Say how many tokens to train in full precision and how many quantized.",
    "spectrum": "Estimate the Hessian's spectrum at checkpoints.",
    "pack": "Pack a trained model into a small file.",
    "generate": "Write text with a trained model, packed or not.",
    "check": "Look for what makes training go wrong without an error.",
    "doctor": "Say which backend serves which op here, what is missing, and how to get it.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 if something is broken, 2 for bad usage or input, 128 + n where signal n stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="qatkernels", description="Train and run neural networks at 1 to 8 bits.",
        epilog="commands:\n" + "\n".join(f"  {name:<8} {line}" for name, line in COMMANDS.items())
        + "\n\n`qatkernels COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"qatkernels {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args(argv)
    try:
        code: int = importlib.import_module(f".{args.command}", __package__).run(args.arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def run() -> int:
    """Be the command `qatkernels`: run the command line, and end well after training with other processes too."""
    code = main()
    parallel = sys.modules.get("qatkernels.trainer.parallel")  # not imported: nothing has trained
    if parallel is not None and parallel.joined_any():
        parallel.leave(code)
    return code
