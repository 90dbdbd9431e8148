"""qatkernels: train and run neural networks at 1 to 8 bits."""

from . import backends
from .files import CheckpointError
from .formats import load_packed, save_packed
from .grids import Grid, affine, binary, lsq, make_grid, paretoq, seq, ternary
from .nn import (
    GroupedPackedLinear,
    GroupedQuantLinear,
    PackedLinear,
    QuantConfig,
    QuantConv1D,
    QuantizationReport,
    QuantLinear,
    check,
    load_weights,
    pack_model,
    param_groups,
    quantization_report,
    quantize_model,
    quantized_modules,
    quantized_weights,
    scales_at_floor,
    warm_up,
)
from .ops import (
    PackedWeight,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    grouped_lowbit_linear,
    lowbit_linear,
    pack,
    quantize,
    unpack,
)
from .version import __version__ as __version__

__all__ = [
    "CheckpointError",
    "Grid",
    "GroupedPackedLinear",
    "GroupedQuantLinear",
    "PackedLinear",
    "PackedWeight",
    "QuantConfig",
    "QuantConv1D",
    "QuantLinear",
    "QuantizationReport",
    "affine",
    "binary",
    "check",
    "dequantize",
    "empty_cache",
    "fake_quantize",
    "fake_quantize_dynamic",
    "grouped_lowbit_linear",
    "load_packed",
    "load_weights",
    "lowbit_linear",
    "lsq",
    "make_grid",
    "pack",
    "pack_model",
    "param_groups",
    "paretoq",
    "quantization_report",
    "quantize",
    "quantize_model",
    "quantized_modules",
    "quantized_weights",
    "save_packed",
    "scales_at_floor",
    "seq",
    "ternary",
    "unpack",
    "warm_up",
]

backends.install()
empty_cache = backends.empty_cache
