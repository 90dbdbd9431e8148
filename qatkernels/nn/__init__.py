"""Quantized layers: drop-in modules over the ops."""

from .activation import DynamicActivation, LearnedActivation, calibrate
from .config import QuantConfig
from .quant_linear import QuantLinear
from .quantize_model import quantize_model, quantized_modules, quantized_weights

__all__ = [
    "DynamicActivation",
    "LearnedActivation",
    "QuantConfig",
    "QuantLinear",
    "calibrate",
    "quantize_model",
    "quantized_modules",
    "quantized_weights",
]
