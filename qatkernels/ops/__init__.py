"""What every op means: schema, reference, shape rule, derivatives."""

from .dynamic import fake_quantize_dynamic
from .fake_quantize import fake_quantize
from .noise import normal
from .quantize import dequantize, quantize

__all__ = ["dequantize", "fake_quantize", "fake_quantize_dynamic", "normal", "quantize"]
