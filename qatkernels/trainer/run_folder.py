"""The folder of a run: a lock that admits one run at a time, and deleting a run.

It also exports the functions of `qatkernels.files`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..files import (
    CheckpointError,
    DamagedError,
    digest,
    explained,
    header,
    load,
    read_json,
    rename,
    save,
    sweep,
    write,
    write_json,
)
from .hf_folder import COPIED

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CheckpointError",
    "DamagedError",
    "digest",
    "exclusive",
    "explained",
    "header",
    "load",
    "read_json",
    "remove_run",
    "rename",
    "save",
    "sweep",
    "write",
    "write_json",
]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against other runs. The lock ends with the process, even if it is killed.

    Temporary files that a killed process left in the folder are deleted.

    Raises:
        CheckpointError: if another run uses the folder, or it cannot be created.
    """
    with explained("written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is in use by another run; wait for it or give another --out"
                ) from error
            sweep(folder)
        yield


#: Names of the folders of phases: those of `qatkernels.trainer.phases`, and those that studies/ gives its phases.
_PHASE = re.compile(r"fp\d*|cooled\d+|w\d(\.\d+)?(a\d)?(-.*)?")


def files_of_run(out: Path) -> list[Path]:
    """Return the files that the phases of a run wrote into its folder."""
    names = ("phase.json", "config.json", *COPIED, "model.safetensors", "state*", "step-*.safetensors")
    folders = [folder for folder in sorted(out.glob("*")) if _PHASE.fullmatch(folder.name)]
    return [path for folder in folders for name in names for path in folder.glob(name)]


def remove_run(out: Path) -> None:
    """Delete the checkpoints and the log of the run in a folder. Other files stay.

    Raises:
        CheckpointError: if a file cannot be deleted.
    """
    if not (out / "run.json").exists():
        return
    with explained("deleted", out):
        for path in files_of_run(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / "log.jsonl").unlink(missing_ok=True)
        # Last, so that a kill before this line leaves run.json: without it the next run would take phases that are
        # left for its own finished ones.
        (out / "run.json").unlink()
