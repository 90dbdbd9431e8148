"""`qatkernels spectrum`."""

from __future__ import annotations

import argparse

from .arguments import add_options, from_arguments
from .common import Answer, fail

LONG = """\
Estimate the spectrum of the Hessian of the training loss with respect to the
quantized weights, at checkpoints of `qatkernels train`, by stochastic Lanczos
quadrature.
"""
EPILOG = """\
written to --out:
  report.json    extreme eigenvalues, masses, traces, sharpness, and the density in bins
  report.html    table and densities, and near-zero mass and extreme eigenvalues over
                 training: one file, opens without a network. If --out is in the folder of
                 a run of `qatkernels train`, its report.html shows them too
  ritz/          Ritz values and weights of each checkpoint; a second call computes only missing checkpoints

examples:
  qatkernels spectrum runs/demo/w4 runs/demo/w2 runs/demo/w1
  qatkernels spectrum runs/demo/w2 --probes 5 --steps 40 --windows 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    from ..trainer.spectra import SpectrumConfig

    add_options(parser, SpectrumConfig)


def run(args: argparse.Namespace) -> Answer | int:
    """Compute the spectra."""
    from ..hessian import NotFiniteError
    from ..trainer import CheckpointError, ConfigError, DataError, spectra

    try:
        config = from_arguments(args, spectra.SpectrumConfig)
        report = spectra.run(config)
    except (ConfigError, DataError, CheckpointError, NotFiniteError) as error:
        return fail(error)
    return Answer(report, lambda: spectra.show(report, config.out))
