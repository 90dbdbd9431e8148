"""qatkernels: train and run neural networks at 1 to 8 bits."""

from . import backends, grids
from ._moved import moved
from .files import CheckpointError
from .formats import load_packed, save_packed
from .nn import (
    GroupedPackedLinear,
    GroupedQuantLinear,
    PackedEmbedding,
    PackedLinear,
    QuantConfig,
    QuantConv1D,
    QuantEmbedding,
    QuantizationReport,
    QuantLinear,
    check,
    compile_kernels,
    load_weights,
    pack_model,
    param_groups,
    quantization_report,
    quantize_model,
    quantized_modules,
    quantized_weights,
    scales_at_floor,
    to_plain,
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
    "GroupedPackedLinear",
    "GroupedQuantLinear",
    "PackedEmbedding",
    "PackedLinear",
    "PackedWeight",
    "QuantConfig",
    "QuantConv1D",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizationReport",
    "check",
    "compile_kernels",
    "dequantize",
    "empty_cache",
    "fake_quantize",
    "fake_quantize_dynamic",
    "grids",
    "grouped_lowbit_linear",
    "load_packed",
    "load_weights",
    "lowbit_linear",
    "pack",
    "pack_model",
    "param_groups",
    "quantization_report",
    "quantize",
    "quantize_model",
    "quantized_modules",
    "quantized_weights",
    "save_packed",
    "scales_at_floor",
    "to_plain",
    "unpack",
]

backends.install()
empty_cache = backends.empty_cache

_GRIDS = ("Grid", "affine", "binary", "lsq", "make_grid", "paretoq", "seq", "ternary")
__getattr__ = moved(__name__, dict.fromkeys(_GRIDS, "qatkernels.grids"), renamed={"warm_up": "compile_kernels"})


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "formats", "nn", "ops"])
