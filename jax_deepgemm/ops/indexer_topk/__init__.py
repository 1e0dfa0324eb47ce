"""Scores of keys and the choice of the best in one op, without a matrix of scores."""

from __future__ import annotations

from jax_deepgemm.ops.indexer_topk.api import indexer_topk
from jax_deepgemm.ops.indexer_topk.paged import paged_indexer_topk

__all__ = ["indexer_topk", "paged_indexer_topk"]
