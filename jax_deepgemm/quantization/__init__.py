"""Block-scaled FP8: the array type, quantise and dequantise, scale layouts, conversions."""

from __future__ import annotations

from jax_deepgemm.quantization.api import dequantize, quantize
from jax_deepgemm.quantization.array import QuantizedArray, scales_shape, scales_spec

__all__ = ["QuantizedArray", "dequantize", "quantize", "scales_shape", "scales_spec"]
