"""Latent attention: many heads that share one key, of which a part is the value."""

from __future__ import annotations

from jax_deepgemm.ops.mla.api import mla_append, paged_mla_attention, sparse_mla_attention

__all__ = ["mla_append", "paged_mla_attention", "sparse_mla_attention"]
