"""SwiGLU: plain in bfloat16, and fused with the quantisation of its result and of its gradient."""

from jax_deepgemm.ops.swiglu import *  # noqa: F403
from jax_deepgemm.ops.swiglu import __all__ as __all__
