"""What every op means: schema, reference, shape rule, derivatives."""

from .cross_entropy import cross_entropy
from .dynamic import fake_quantize_dynamic
from .fake_quantize import fake_quantize
from .krylov import gram_schmidt
from .linear_cross_entropy import linear_cross_entropy
from .noise import normal
from .quant_linear import quant_linear_dual
from .quantize import dequantize, quantize

__all__ = [
    "cross_entropy",
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "gram_schmidt",
    "linear_cross_entropy",
    "normal",
    "quant_linear_dual",
    "quantize",
]
