"""Sparse attention's indexer: scores of keys for tokens, with FP8 and BF16 operands."""

from jax_deepgemm.ops.indexer import *  # noqa: F403
from jax_deepgemm.ops.indexer import __all__ as __all__
