"""Keys and values in pages, and writing to them."""

from __future__ import annotations

from jax_deepgemm.ops.paged_append.api import paged_append
from jax_deepgemm.ops.paged_append.cache import PagedKVCache

__all__ = ["PagedKVCache", "paged_append"]
