"""Quantized layers: drop-in modules over the ops."""

from .activation import DynamicActivation, LearnedActivation, calibrate
from .config import QuantConfig
from .grouped_quant_linear import GroupedQuantLinear
from .load_weights import load_weights
from .pack_model import PACKERS, model_bytes, pack_model, packed_modules, warm_up
from .packed_file import load_packed, save_packed
from .packed_linear import GroupedPackedLinear, PackedBuffers, PackedLinear
from .quant_linear import QuantLinear
from .quantize_model import quantize_model, quantized_modules, quantized_weights

__all__ = [
    "PACKERS",
    "DynamicActivation",
    "GroupedPackedLinear",
    "GroupedQuantLinear",
    "LearnedActivation",
    "PackedBuffers",
    "PackedLinear",
    "QuantConfig",
    "QuantLinear",
    "calibrate",
    "load_packed",
    "load_weights",
    "model_bytes",
    "pack_model",
    "packed_modules",
    "quantize_model",
    "quantized_modules",
    "quantized_weights",
    "save_packed",
    "warm_up",
]
