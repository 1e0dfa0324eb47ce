"""SwiGLU: plain in bfloat16, and fused with the quantisation of its result and of its gradient."""

from __future__ import annotations

from jax_deepgemm.ops.quantize.activation import GPT_OSS, Activation
from jax_deepgemm.ops.swiglu.api import swiglu, swiglu_grad_quantize, swiglu_quantize

__all__ = ["GPT_OSS", "Activation", "swiglu", "swiglu_grad_quantize", "swiglu_quantize"]
