"""KVCache: the keys and values of a batch, each sequence with as many slots as any other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.ops.paged_append.cache import PAGE_SIZES, PagedKVCache
from jax_deepgemm.ops.paged_append.checks import positive

_CREATE = "KVCache.create"
LARGEST_PAGE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of a batch of sequences, all of which have room for equally many tokens.

    It is a `PagedKVCache` whose pages lie in order: page i belongs to sequence i // (capacity / page_size).
    What is said there of types, layers, scales and donation holds here. `attend_with_cache` reads and writes
    it.

    Args:
      paged: the pages.
      capacity: tokens of a sequence, a multiple of the page, static.

    Raises nothing: functions that take it check it.

    >>> cache = KVCache.create(batch=2, capacity=100, kv_heads=4, head_dim=64)
    >>> cache.batch, cache.capacity, cache.paged.k.shape
    (2, 112, (1, 14, 4, 16, 64))
    """

    paged: PagedKVCache
    capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        layers: int | None = None,
        v_head_dim: int | None = None,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        sharding: Any = None,
    ) -> KVCache:
        """A cache of zeros.

        >>> KVCache.create(2, 64, 8, 128, layers=4).paged.k.shape
        (4, 2, 8, 64, 128)

        Args:
          batch: sequences.
          capacity: tokens that each has room for; rounded up to a multiple of 16.
          kv_heads, head_dim, dtype, layers, v_head_dim, k_scale, v_scale, sharding: as those of
            `PagedKVCache.create`.

        Raises:
          TypeError, ValueError: as `PagedKVCache.create`.
        """
        rounded = -(-positive(_CREATE, "capacity", capacity) // PAGE_SIZES[0]) * PAGE_SIZES[0]
        page = max(size for size in PAGE_SIZES if size <= LARGEST_PAGE and rounded % size == 0)
        pages = positive(_CREATE, "batch", batch) * (rounded // page)
        form: dict[str, Any] = {"layers": layers, "v_head_dim": v_head_dim, "sharding": sharding}
        form |= {"k_scale": k_scale, "v_scale": v_scale}
        return cls(PagedKVCache.create(pages, page, kv_heads, head_dim, dtype, **form), rounded)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.paged.pages * self.paged.page_size // self.capacity

    @property
    def block_tables(self) -> jax.Array:
        """int32 [batch, capacity / page_size]: the pages of each sequence."""
        return jnp.arange(self.paged.pages, dtype=jnp.int32).reshape(self.batch, -1)


jax.tree_util.register_dataclass(KVCache, data_fields=("paged",), meta_fields=("capacity",))
