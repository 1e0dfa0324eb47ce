"""The plan of a dispatch in jax.numpy: by a sort."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def plan(ids: jax.Array, *, experts: int, capacity: int | None = None) -> list[jax.Array]:
    """Copies sorted by expert; those of one expert stay in their order.

    Args:
      ids: int32 [t, s]. Copies with an id outside [0, experts) are dropped.
      experts: number of experts.
      capacity: rows of every expert, used or not; its first copies get them, the others are dropped. None:
        experts have as many rows as copies, one behind the other, and a tail of empty rows follows.

    Returns:
      [rows used of each expert [experts], the copy of each row [r] (t * s: none), the row of each copy
      [t, s] (r: dropped)], int32; r is t * s, or experts * capacity.
    """
    copies = ids.size
    flat = ids.reshape(copies)
    expert = jnp.where((flat >= 0) & (flat < experts), flat, experts).astype(jnp.uint32)
    expert, source = sort_copies(expert, experts)
    starts = count_below(expert, experts)
    row = jnp.arange(copies, dtype=jnp.int32)
    filled = row < starts[-1]
    position = jnp.zeros_like(source).at[source].set(jnp.where(filled, row, copies), unique_indices=True)
    position, source = position.reshape(ids.shape), jnp.where(filled, source, copies)
    if capacity is None:
        return [jnp.diff(starts), source, position]
    return _with_capacity(ids, starts, source, position, capacity)


def _with_capacity(
    ids: jax.Array, starts: jax.Array, source: jax.Array, position: jax.Array, capacity: int
) -> list[jax.Array]:
    """Row (expert, i) is expert * capacity + i."""
    copies, experts = source.shape[0], starts.shape[0] - 1
    sizes = jnp.minimum(jnp.diff(starts), capacity)
    slot = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    row = jnp.where(slot < sizes[:, None], starts[:-1, None] + slot, copies).reshape(-1)
    rank = position - starts.at[ids].get(mode="fill", fill_value=0)
    kept = (position < copies) & (rank < capacity)
    position = jnp.where(kept, ids * capacity + rank, experts * capacity)
    padded = jnp.append(source, jnp.full((1,), copies, source.dtype))  # which has a row for the empty ones
    return [sizes, padded[row], position]


def sort_copies(expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """(sorted experts, where each was), stable. One 32-bit key, where it fits: the fast sort of GPUs."""
    copies = expert.shape[0]
    index = lax.iota(jnp.uint32, copies)
    if is_known(copies) and (experts + 1) * copies <= 2**32:
        packed = lax.sort(expert * jnp.uint32(copies) + index, is_stable=False)  # no two are equal
        expert, index = packed // max(copies, 1), packed % max(copies, 1)
    else:
        expert, index = lax.sort((expert, index), num_keys=2)
    return expert, index.astype(jnp.int32)


def count_below(expert: jax.Array, experts: int) -> jax.Array:
    """int32 [experts + 1]: how many of the sorted experts are less than 0, 1, .. experts.

    A binary search of gathers that every mesh takes; XLA makes one kernel of it.
    """
    copies = expert.shape[0]
    edges = lax.iota(jnp.uint32, experts + 1)
    low = jnp.zeros_like(edges)  # unsigned, as indices that cannot be negative are used as they are
    high = low + jnp.asarray(copies, jnp.uint32)
    for _ in range(copies.bit_length() if is_known(copies) else 31):
        middle = (low + high) >> 1
        above = expert.at[middle].get(mode="promise_in_bounds") >= edges
        low, high = jnp.where(above, low, middle), jnp.where(above, middle, high)
    return high.astype(jnp.int32)


def is_known(size: Any) -> bool:
    """Whether a size is a number; in `jax.export` it can be a symbol."""
    return isinstance(size, int)
