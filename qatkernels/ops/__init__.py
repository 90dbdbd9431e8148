"""The ops: schema, contract, reference and derivatives of each, and the public functions that call them."""

from . import _sharding as _sharding  # the rules for DTensors
from ._cross_entropy import cross_entropy
from ._fake_quantize import fake_quantize
from ._grouped_linear import grouped_linear
from ._linear_cross_entropy import linear_cross_entropy
from ._quantization_error import quantization_error
from ._quantize import dequantize, quantize
from .dynamic import fake_quantize_dynamic
from .krylov import gram_schmidt
from .noise import normal
from .packed_weight import PackedWeight, grouped_lowbit_linear, lowbit_linear
from .packing import pack, unpack
from .perturb import perturb_, perturb_swap_, perturbation_norms
from .quant_linear import quant_linear_dual
from .reset import reset_

__all__ = [
    "PackedWeight",
    "cross_entropy",
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "gram_schmidt",
    "grouped_linear",
    "grouped_lowbit_linear",
    "linear_cross_entropy",
    "lowbit_linear",
    "normal",
    "pack",
    "perturb_",
    "perturb_swap_",
    "perturbation_norms",
    "quant_linear_dual",
    "quantization_error",
    "quantize",
    "reset_",
    "unpack",
]
