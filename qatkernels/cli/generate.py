"""`qatkernels generate`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

from ..methods.values import check_seed
from ..options import AT_LEAST_0, AT_LEAST_1, ConfigError, check, option
from ..units import human
from .arguments import add_options, from_arguments
from .common import Answer, fail

LONG = "Generate text with a trained model, packed or not."


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of `qatkernels generate`."""

    model: str = option(
        MISSING, "file that `pack` wrote, or a folder such as runs/demo/w2", metavar="MODEL", positional=True
    )
    prompt: str = option("def ", "text to continue")
    tokens: int = option(200, "tokens to generate; a token of the demo model is a byte", AT_LEAST_1)
    temperature: float = option(
        0.0, "0 takes the most likely token, 1 draws from the distribution of the model", AT_LEAST_0, metavar="T"
    )
    seed: int = option(0, "seed of the draws")
    tokenizer: str | None = option(
        None, "folder of the tokenizer of a model of transformers; MODEL's own if it has one", metavar="PATH"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.prompt:
            raise ConfigError("--prompt is empty, must have at least one byte")
        try:
            check_seed("--seed", self.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add_options(parser, GenerateConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Write text to the standard output while it is generated, and the speed to the standard error."""
    from ..trainer import CheckpointError
    from ..trainer import generate as job

    try:
        config = from_arguments(args, GenerateConfig)
        model, tokenizer = job.load(Path(config.model), Path(config.tokenizer) if config.tokenizer else None)
    except (ConfigError, CheckpointError) as error:
        return fail(error)
    pieces: list[str] = []
    began = time.perf_counter()
    count = job.show_text(
        model, tokenizer, os.fsencode(config.prompt), config.tokens, pieces.append if args.json else _show,
        temperature=config.temperature, seed=config.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    result = {"text": "".join(pieces).removesuffix("\n"), "tokens": count, "seconds": seconds}
    return Answer(result, lambda: print(f"{count} tokens, {human(count / seconds)} tokens/s", file=sys.stderr))


def _show(text: str) -> None:
    """Print text immediately; characters that the terminal's encoding lacks are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
