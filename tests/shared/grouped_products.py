"""What grouped GEMMs must give: float32 products group by group, independent of the package's references.

Group sizes become starts and counts on the host, in the plainest Python; products run on the default device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = jnp.float32


@dataclass(frozen=True)
class Rows:
    """Where the groups lie, in every description of it (int32).

    Attributes:
      sizes: [g], as given: perhaps negative, perhaps too many.
      starts, counts: [g], what they mean.
      ends: [g], starts + counts.
      index: [rows], group of each row, or -1.
    """

    sizes: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    index: np.ndarray


def place(sizes: Any, rows: int, alignment: int = 1) -> Rows:
    """Groups one after the other, each start a multiple of `alignment`; negative sizes are 0, and what
    would lie behind the last row is cut off.

    >>> place([3, -1, 9], 8).counts.tolist(), place([3, 2], 8, alignment=4).index.tolist()
    ([3, 0, 5], [0, 0, 0, -1, 1, 1, -1, -1])
    """
    starts, counts, index, end = [], [], np.full(rows, -1), 0
    for group, size in enumerate(sizes):
        start = min(-(-end // alignment) * alignment, rows)
        end = min(start + max(int(size), 0), rows)
        index[start:end] = group
        starts.append(start)
        counts.append(end - start)
    arrays = (sizes, starts, counts, np.add(starts, counts), index)
    return Rows(*(np.asarray(x, np.int32) for x in arrays))


def inside(starts: jax.Array, counts: jax.Array, rows: int) -> jax.Array:
    """[rows], whether a row is in one of the groups."""
    row = jnp.arange(rows)
    return jnp.any((row >= starts[:, None]) & (row < (starts + counts)[:, None]), axis=0)


def same(x: Any, y: Any) -> bool:
    """Whether two arrays are equal bit by bit."""
    return x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def dot32(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [m, k] times b [n, k], in float32."""
    return lax.dot_general(
        a.astype(F32), b.astype(F32), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


def dequantised(q: Any) -> jax.Array:
    """The values times their blocks' scales, in float32."""
    values = q.values.astype(F32)
    rows, cols = jnp.arange(values.shape[-2]) // q.block[0], jnp.arange(values.shape[-1]) // q.block[1]
    return values * jnp.take(jnp.take(q.scales, rows, axis=-2), cols, axis=-1)


def m_grouped(a: jax.Array, b: jax.Array, starts: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """D [m, n] of a [m, k] and b [g, n, k]; rows of no group are 0. No group has more than `most` rows."""
    m, n = a.shape[0], b.shape[1]
    padded = jnp.pad(a, ((0, most), (0, 0)))
    row = jnp.arange(most)[:, None]

    def add(group: jax.Array, d: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(padded, starts[group], most)
        product = dot32(jnp.where(row < counts[group], rows, 0), b[group])
        before = lax.dynamic_slice_in_dim(d, starts[group], most)
        return lax.dynamic_update_slice_in_dim(d, before + product, starts[group], 0)

    return lax.fori_loop(0, b.shape[0], add, jnp.zeros((m + most, n), F32))[:m]


def masked(a: jax.Array, b: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """D [g, m, n] of a [g, m, k] and b [g, n, k]; rows from counts[g] on are 0."""
    row = jnp.arange(most)[:, None]
    d = lax.map(lambda x: dot32(jnp.where(row < x[2], x[0], 0), x[1]), (a[:, :most], b, counts))
    return jnp.pad(d, ((0, 0), (0, a.shape[1] - most), (0, 0)))


def k_grouped(a: jax.Array, b: jax.Array, starts: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """D [g, m, n], the sums over each group's rows of a [k, m] and b [k, n]."""
    a, b = (jnp.pad(x, ((0, most), (0, 0))) for x in (a, b))
    row = jnp.arange(most)[:, None]

    def one(group: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, count = group
        left, right = (
            jnp.where(row < count, lax.dynamic_slice_in_dim(x, start, most), 0).astype(F32) for x in (a, b)
        )
        return lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    return lax.map(one, (starts, counts))
