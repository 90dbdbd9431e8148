"""qatkernels: train and run neural networks at 1 to 8 bits."""

from . import backends
from .grid import Grid, affine, binary, lsq, make_grid, paretoq, seq, ternary
from .ops import dequantize, fake_quantize, fake_quantize_dynamic, quantize

__version__ = "0.1.0"
backends.install()
