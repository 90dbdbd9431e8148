"""Trainings that start from the same phase in full precision, each in a folder of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qatkernels.trainer import TrainConfig, data, loop, models, run_folder, saving
from qatkernels.trainer.phases import Phase


def run(
    config: TrainConfig, corpus: data.Corpus, plan: list[Phase], shared: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Run phases in the folder of a configuration, and return the result of the last one.

    Args:
        config: the resolved configuration.
        corpus: the text.
        plan: the phases.
        shared: folder of the first phase, finished in another run of the same model and text. It is linked, not copied.
        say: called with each line about the progress.
    """
    out = Path(config.out)
    with run_folder.exclusive(out):
        if shared is not None and (shared / models.MARKER).exists() and not (out / shared.name).exists():
            saving.open_run(out, config, corpus)
            shutil.copytree(shared, out / f"{shared.name}.tmp", dirs_exist_ok=True, copy_function=_linked)
            run_folder.rename(out / f"{shared.name}.tmp", out / shared.name)
        return loop.run_phases(config, corpus, plan, say)[0][-1]


def _linked(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links. Files are replaced as wholes, never changed."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
