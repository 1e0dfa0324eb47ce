"""Dense GEMMs with FP8 and BF16 operands, and the FP8 linear layer made of them."""

from jax_deepgemm.ops.gemm import *  # noqa: F403
from jax_deepgemm.ops.gemm import __all__ as __all__
