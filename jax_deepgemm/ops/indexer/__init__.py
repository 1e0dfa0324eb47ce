"""Sparse attention's indexer: scores of keys for tokens, of which the best are attended to."""

from __future__ import annotations

from jax_deepgemm.ops.indexer.api import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.family import IndexerConfig

__all__ = ["IndexerConfig", "bf16_mqa_logits", "mqa_logits"]
