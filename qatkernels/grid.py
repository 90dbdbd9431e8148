"""The old place of :mod:`qatkernels.grids`."""

from ._moved import moved

_NAMES = ("Grid", "affine", "binary", "lsq", "make_grid", "paretoq", "seq", "ternary")
__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "qatkernels.grids"))
