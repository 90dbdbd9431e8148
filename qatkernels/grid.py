"""The old import path of :mod:`qatkernels.grids`."""

from ._moved import moved

_NAMES = (
    "MIN_SCALE",
    "SCHEMES",
    "Grid",
    "GridConstants",
    "affine",
    "binary",
    "lsq",
    "make_grid",
    "paretoq",
    "seq",
    "ternary",
)
__all__ = list(_NAMES)
__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "qatkernels.grids"))
