"""`qatkernels spectrum`."""

from __future__ import annotations

from collections.abc import Sequence

from .common import fail


def run(argv: Sequence[str]) -> int:
    """Estimate the Hessian's spectrum at checkpoints."""
    from ..hessian import NotFiniteError
    from ..trainer import CheckpointError, ConfigError, DataError, spectra

    try:
        config = spectra.configured(argv)
        report = spectra.run(config)
    except (ConfigError, DataError, CheckpointError, NotFiniteError) as error:
        return fail(error)
    spectra.show(report, config.out)
    return 0
