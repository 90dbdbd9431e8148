"""The command line. Each subcommand is in the module of its name.

Such a module has ``LONG``, a description; optionally ``USAGE`` and ``EPILOG``; ``add_arguments(parser)``; and
``run(args)``, which returns an Answer, or an exit code if there was an error. Every command has ``--json``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence

from ..extras import MissingExtraError
from ..version import __version__
from .arguments import Parser
from .common import Answer, as_json, fail

#: Subcommands by name, with their line in `qatkernels --help`. The module of a command is imported when the command is
#: called, because some commands need packages that others do not.
COMMANDS = {
    "train": "Train in full precision and at low bit widths, and compare.",
    "plan": "Compute how many tokens to train in full precision and how many quantized.",
    "spectrum": "Estimate the spectrum of the Hessian at checkpoints.",
    "pack": "Pack a trained model into a small file.",
    "export": "Write a trained model for another runtime, such as llama.cpp.",
    "generate": "Generate text with a trained model, packed or not.",
    "check": "Find problems in a model that would spoil training without an error.",
    "doctor": "Show which backend serves which op here, what is missing, and how to get it.",
}


def parsers(argv: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """Return the main parser, and the parser of each command by name.

    Only the parser of the command in ``argv`` gets its arguments, so that only its module is imported.
    """
    parser = Parser(
        prog="qatkernels", description="Train and run neural networks at 1 to 8 bits.",
        epilog="`qatkernels COMMAND --help` explains a command.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"qatkernels {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    commands: dict[str, Parser] = {}
    command = next((word for word in argv if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=line, description=line)
        if name == command:
            module = importlib.import_module(f".{name}", __package__)
            commands[name].description = module.LONG
            commands[name].epilog = getattr(module, "EPILOG", None)
            commands[name].usage = getattr(module, "USAGE", None)
            module.add_arguments(commands[name])
            commands[name].add_argument(
                "--json", action="store_true", default=False, help="print the answer as one JSON object"
            )
            commands[name].set_defaults(run=module.run)
    return parser, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 if the command found a problem; 2 for bad usage or input; 128 + n if signal n stopped it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser, commands = parsers(argv)
        args, rest = parser.parse_known_args(argv)
        if rest:
            commands[args.command].unknown(rest)
        answer: Answer | int = args.run(args)
        if isinstance(answer, int):
            return answer
        if args.json:
            print(json.dumps(as_json(answer.result), indent=2, allow_nan=False))
        else:
            answer.show()
        return answer.code
    except MissingExtraError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader closed the pipe, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run() -> int:
    """Run the command line as the entry point of `qatkernels`, and return the exit code.

    After training with other processes, this ends the process itself (:func:`qatkernels.trainer.parallel.leave`).
    """
    code = main()
    parallel = sys.modules.get("qatkernels.trainer.parallel")  # absent if this command did not train
    if parallel is not None and parallel.has_joined():
        parallel.leave(code)
    return code
