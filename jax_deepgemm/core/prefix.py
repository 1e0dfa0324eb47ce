"""Sums of sizes that only the device knows."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def prefix_ends(sizes: jax.Array, rows: int) -> jax.Array:
    """Where each group ends if it starts where the one before ended; also if int32 cannot hold their sum."""
    if isinstance(rows, int) and sizes.shape[-1] * rows < 2**31:
        sizes = jnp.clip(sizes, 0, rows)
        return jnp.minimum(jnp.cumsum(sizes, axis=-1, dtype=jnp.int32), rows)
    last = jnp.asarray(rows, jnp.int32)  # of symbolic rows, as jax.export has them, only the run knows
    sizes = jnp.clip(sizes, 0, last)
    return jax.lax.associative_scan(lambda x, y: jnp.minimum(x, last - y) + y, sizes, axis=-1)
