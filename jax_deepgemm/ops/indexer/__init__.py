"""Sparse attention's indexer: scores of keys for tokens, of which the best are attended to."""

from __future__ import annotations

from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer.paged import get_paged_mqa_logits_metadata, paged_mqa_logits
from jax_deepgemm.ops.quantize.fp4 import Fp4Array, dequantize_fp4, quantize_fp4

__all__ = [
    "Fp4Array",
    "IndexerConfig",
    "bf16_mqa_logits",
    "dequantize_fp4",
    "get_paged_mqa_logits_metadata",
    "mqa_logits",
    "paged_mqa_logits",
    "quantize_fp4",
]
