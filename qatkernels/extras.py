"""Packages that only some parts need: extras of the installation, and the error that says which one is missing."""

from __future__ import annotations


class MissingExtraError(ImportError):
    """Packages of an extra are not installed; the message says which extra to install."""


def missing(part: str, extra: str, error: ImportError) -> MissingExtraError:
    """Return the error of a part whose packages are not installed.

    Args:
        part: what was imported.
        extra: the extra that installs what it needs.
        error: what the import said.
    """
    return MissingExtraError(
        f"{part} needs more packages ({error}): pip install 'qatkernels[{extra}]'", name=error.name
    )
