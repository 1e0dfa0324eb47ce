"""The family of memory-bound kernels that make FP8: quantisation, alone and of what SwiGLU gives."""

from __future__ import annotations

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.quantize.problem import QuantizeProblem

FAMILY = Family("quantize", QuantizeProblem, {"9.0a": "jax_deepgemm.ops.quantize.sm90"})
