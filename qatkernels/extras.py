"""Optional packages (extras of the installation), and the error that names the extra to install."""

from __future__ import annotations


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra to install."""


def missing(part: str, extra: str, error: ImportError) -> MissingExtraError:
    """Return the error for a part of the library whose packages are not installed.

    Args:
        part: what needs the packages, such as a module.
        extra: the extra that installs them.
        error: the error of the import.
    """
    return MissingExtraError(
        f"{part} needs more packages ({error}): pip install 'qatkernels[{extra}]'", name=error.name
    )
