"""Attention of ragged sequences to keys and values in a cache."""

from __future__ import annotations

from jax_deepgemm.ops.attention.api import ragged_paged_attention
from jax_deepgemm.ops.attention.cache import KVCache
from jax_deepgemm.ops.attention.family import AttentionConfig
from jax_deepgemm.ops.attention.fixed import attend_with_cache

__all__ = ["AttentionConfig", "KVCache", "attend_with_cache", "ragged_paged_attention"]
