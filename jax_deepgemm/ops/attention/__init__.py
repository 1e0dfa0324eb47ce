"""Attention of ragged sequences to keys and values in a cache."""

from __future__ import annotations

from jax_deepgemm.ops.attention.api import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
