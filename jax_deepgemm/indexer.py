"""Sparse attention's indexer: scores of keys for tokens, with FP8 and BF16 operands, and the way there."""

from jax_deepgemm.ops import indexer as _logits
from jax_deepgemm.ops import indexer_quantize as _quantize
from jax_deepgemm.ops import indexer_topk as _topk
from jax_deepgemm.ops.indexer import *  # noqa: F403
from jax_deepgemm.ops.indexer_quantize import *  # noqa: F403
from jax_deepgemm.ops.indexer_topk import *  # noqa: F403

__all__ = [*_logits.__all__, *_quantize.__all__, *_topk.__all__]
