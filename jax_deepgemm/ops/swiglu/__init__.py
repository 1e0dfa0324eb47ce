"""SwiGLU: plain in bfloat16, and fused with the quantisation of its result and of its gradient."""

from __future__ import annotations

from jax_deepgemm.ops.swiglu.api import swiglu, swiglu_grad_quantize, swiglu_quantize

__all__ = ["swiglu", "swiglu_grad_quantize", "swiglu_quantize"]
