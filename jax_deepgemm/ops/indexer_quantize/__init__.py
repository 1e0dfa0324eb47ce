"""Queries and keys of an indexer, rotated and in FP8."""

from __future__ import annotations

from jax_deepgemm.ops.indexer_quantize.api import hadamard, indexer_quantize

__all__ = ["hadamard", "indexer_quantize"]
