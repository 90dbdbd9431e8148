"""What every op means: schema, reference, shape rule, derivatives."""

from .dynamic import fake_quantize_dynamic
from .fake_quantize import fake_quantize
from .lowbit_linear import grouped_lowbit_linear, lowbit_linear
from .noise import normal
from .packing import PackedWeight, pack, unpack
from .quantize import dequantize, quantize

__all__ = [
    "PackedWeight",
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "grouped_lowbit_linear",
    "lowbit_linear",
    "normal",
    "pack",
    "quantize",
    "unpack",
]
