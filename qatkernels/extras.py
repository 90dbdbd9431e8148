"""Packages that only some parts need: extras of the installation, and the error that says which one is missing."""

from __future__ import annotations


def missing(part: str, extra: str, error: ImportError) -> ImportError:
    """Return the error of a part whose packages are not installed.

    Args:
        part: what was imported.
        extra: the extra that installs what it needs.
        error: what the import said.
    """
    return ImportError(f"{part} needs more packages ({error}): pip install 'qatkernels[{extra}]'", name=error.name)
