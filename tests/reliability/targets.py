"""All kinds of files that are mutated, by name."""

from __future__ import annotations

import hashlib

from qatkernels import cli

from .other_targets import External, Law, Runs, Toml
from .run_targets import Configuration, Log, Packed, Result, Ritz, Sharded, State
from .target import Target

TARGETS: dict[str, type[Target]] = {
    "packed": Packed, "state": State, "sharded": Sharded, "result": Result, "ritz": Ritz, "law": Law,
    "run": Configuration, "toml": Toml, "runs": Runs, "external": External, "log": Log,
}  # fmt: skip


def warm() -> None:
    """Import what readers import in their first call, so that the memory is not counted for a case."""
    import transformers  # noqa: F401

    hashlib.sha256(b"")
    cli.COMMANDS.keys()
