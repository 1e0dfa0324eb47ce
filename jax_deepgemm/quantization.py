"""Block-scaled FP8: the array type, quantise and dequantise, scale layouts, conversions."""

from jax_deepgemm.ops.quantize import *  # noqa: F403
from jax_deepgemm.ops.quantize import __all__ as __all__
