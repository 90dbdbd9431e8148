"""`qatkernels generate`."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from ..methods.values import check_seed
from ..options import AT_LEAST_0, AT_LEAST_1, ConfigError, check, option
from ..units import human
from .arguments import add_options, from_arguments
from .common import fail

LONG = "Generate text with a trained model, packed or not."


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of `qatkernels generate`."""

    model: str = option(
        MISSING, "file that `pack` wrote, or a folder such as runs/demo/w2", metavar="MODEL", positional=True
    )
    prompt: str = option("def ", "text to continue")
    tokens: int = option(200, "tokens (bytes) to generate", AT_LEAST_1)
    temperature: float = option(
        0.0, "0 takes the most likely byte, 1 draws from the distribution of the model", AT_LEAST_0, metavar="T"
    )
    seed: int = option(0, "seed of the draws")

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


def run(args: argparse.Namespace) -> int:
    """Write text to the standard output, and the speed to the standard error."""
    from ..trainer import CheckpointError
    from ..trainer import generate as job

    try:
        config = from_arguments(args, GenerateConfig)
        model = job.load(Path(config.model))
    except (ConfigError, CheckpointError) as error:
        return fail(error)
    # Neither the bytes on the command line nor those of the model need be valid UTF-8.
    prompt, decoder = os.fsencode(config.prompt), codecs.getincrementaldecoder("utf-8")("replace")
    _show(decoder.decode(prompt))
    draws = torch.Generator().manual_seed(config.seed)
    began = time.perf_counter()
    for token, _ in job.generate(model, prompt, config.tokens, temperature=config.temperature, generator=draws):
        _show(decoder.decode(bytes([token])))
    seconds = time.perf_counter() - began
    _show(decoder.decode(b"", final=True) + "\n")
    print(f"{config.tokens} tokens, {human(config.tokens / seconds)} tokens/s", file=sys.stderr)
    return 0


def _show(text: str) -> None:
    """Print text immediately; characters that the terminal's encoding lacks are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
