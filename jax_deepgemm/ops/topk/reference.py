"""The largest numbers of rows in jax.numpy: by integers of their order, whose ties lax.top_k gives to the
lower index, and which no platform takes for other ones (XLA's CPU flushes denormal numbers)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NONE = np.iinfo(np.int32).min
"""What is no candidate ranks as this."""


def topk(
    x: jax.Array, *windows: jax.Array, k: int, by_index: bool = False, values: bool = True
) -> list[jax.Array]:
    """x [m, n], or x, start [m], end [m] -> values [m, k] (where wanted), indices int32 [m, k].

    >>> [one.tolist() for one in topk(jnp.array([[1.0, 3.0, jnp.nan, 3.0]]), k=2)]
    [[[3.0, 3.0]], [[1, 3]]]
    """
    rank = ranks(x)
    if windows:
        start, end = (one[:, None] for one in windows)
        column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        rank = jnp.where((column >= start) & (column < end), rank, NONE)
    found, indices = largest(rank, k)
    if by_index:
        indices = jnp.sort(jnp.where(found == NONE, np.int32(np.iinfo(np.int32).max), indices), axis=-1)
        indices = jnp.where(indices == np.iinfo(np.int32).max, -1, indices)
    else:
        indices = jnp.where(found == NONE, -1, indices)
    return [*([at(x, indices)] if values else []), indices]


def ranks(x: jax.Array) -> jax.Array:
    """int32 of the order of floats. Both zeros are one; NaN and -infinity are NONE."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    bits = jnp.where(bits == NONE, 0, bits)  # -0
    rank = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    infinity = np.float32(np.inf).view(np.int32)
    return jnp.where((rank > infinity) | (rank <= np.int32(-0x7F800001)), NONE, rank)


def largest(rank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest integers of each row and their columns; NONE behind those that there are."""
    n = rank.shape[-1]
    found, indices = lax.top_k(rank, min(k, n))
    missing = [(0, 0)] * (rank.ndim - 1) + [(0, k - min(k, n))]
    return jnp.pad(found, missing, constant_values=NONE), jnp.pad(indices.astype(jnp.int32), missing)


def at(x: jax.Array, indices: jax.Array, fill: Any = -np.inf) -> jax.Array:
    """x[i, indices[i, j]], and `fill` where the index is -1."""
    if not x.shape[-1]:
        return jnp.full(indices.shape, fill, x.dtype)
    taken = jnp.take_along_axis(x, jnp.maximum(indices, 0), axis=-1, mode="promise_in_bounds")
    return jnp.where(indices < 0, jnp.asarray(fill, x.dtype), taken)
