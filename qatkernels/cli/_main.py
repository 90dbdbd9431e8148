"""The command line: subcommands, each in the module of its name.

A module has ``LONG``, a description; maybe ``USAGE`` and ``EPILOG``; ``add_arguments(parser)``; and ``run(args)``,
which returns the exit code.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from ..extras import MissingExtraError
from ..version import __version__
from .arguments import Parser
from .common import fail

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


def parsers(argv: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and that of each command; only that of the command in ``argv`` has its arguments."""
    parser = Parser(
        prog="qatkernels", description="Train and run neural networks at 1 to 8 bits.",
        epilog="`qatkernels COMMAND --help` explains one.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"qatkernels {__version__}")
    below = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    found: dict[str, Parser] = {}
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        found[name] = below.add_parser(name, help=line, description=line)
        if name == asked:
            module = importlib.import_module(f".{name}", __package__)
            found[name].description = module.LONG
            found[name].epilog = getattr(module, "EPILOG", None)
            found[name].usage = getattr(module, "USAGE", None)
            module.add_arguments(found[name])
            found[name].set_defaults(run=module.run)
    return parser, found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 if something is broken, 2 for bad usage or input, 128 + n where signal n stopped it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser, commands = parsers(argv)
        args, rest = parser.parse_known_args(argv)
        if rest:
            commands[args.command].unknown(rest)
        code: int = args.run(args)
    except MissingExtraError as error:
        return fail(error)
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
    if parallel is not None and parallel.has_joined():
        parallel.leave(code)
    return code
