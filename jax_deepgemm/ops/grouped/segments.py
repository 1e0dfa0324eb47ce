"""Where each group's rows are: the int32 operand `group_sizes` of the grouped ops, in its formats.

    "sizes"      [G]     rows of group 0, then those of group 1, ..: as jax.lax.ragged_dot's group_sizes
    "blocks"     [G]     the same where each group begins at a multiple of 128, zeros between (k-grouped FP8)
    "segments"   [3 * S] starts | ends | groups: rows [starts[i], ends[i]) belong to group groups[i]

Segments ascend and share no row; a group has at most one of them; a group that the op does not have gives
zero rows. An op that contracts over the groups' rows (k-grouped) takes segment i as group i, in any order.

Numbers that are not known before run time are never trusted: a negative size counts as 0, and starts and ends
are cut at the number of rows. All functions are jnp on the last axis, so leading dimensions (vmap's) pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_deepgemm.core.prefix import prefix_ends
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK

FORMATS = ("sizes", "blocks", "segments")


class Segments(NamedTuple):
    """Rows [starts, ends) of each segment, and its group; int32 [.., S] each."""

    starts: jax.Array
    ends: jax.Array
    groups: jax.Array


def read(group_sizes: jax.Array, rows_format: str, rows: int) -> Segments:
    """The segments of either format, cut at the number of rows."""
    if rows_format in ("sizes", "blocks"):
        blocks = rows_format == "blocks"
        ends = prefix_ends(-(-group_sizes // SCALE_BLOCK) * SCALE_BLOCK if blocks else group_sizes, rows)
        starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
        if blocks:
            ends = jnp.clip(starts + group_sizes, starts, ends)
        return Segments(
            starts,
            ends,
            jnp.broadcast_to(jnp.arange(group_sizes.shape[-1], dtype=jnp.int32), group_sizes.shape),
        )
    starts, ends, groups = jnp.split(group_sizes, 3, axis=-1)
    starts = jnp.clip(starts, 0, rows)
    return Segments(starts, jnp.clip(ends, starts, rows), groups)


def write(segments: Segments) -> jax.Array:
    """The segments as an operand of format "segments"."""
    return jnp.concatenate([x.astype(jnp.int32) for x in segments], axis=-1)


def window(group_sizes: jax.Array, rows_format: str, rows: int, first: jax.Array, size: int) -> jax.Array:
    """`group_sizes`, in its format, for a device that has rows [first, first + size)."""
    starts, ends, groups = read(group_sizes, rows_format, rows)
    starts, ends = jnp.clip(starts - first, 0, size), jnp.clip(ends - first, 0, size)
    return ends - starts if rows_format == "sizes" else write(Segments(starts, ends, groups))


def shifted(group_sizes: jax.Array, rows_format: str, rows: int, by: jax.Array) -> jax.Array:
    """`group_sizes` of format "segments", after `by` rows were put in front."""
    starts, ends, groups = read(group_sizes, rows_format, rows)
    return write(Segments(starts + by, ends + by, groups))


def local_groups(groups: jax.Array, offset: jax.Array, count: int) -> jax.Array:
    """Index of each group among `count` groups from `offset` on; -1 for others."""
    index = groups - offset
    return jnp.where((index >= 0) & (index < count), index, -1)


def by_index(group_sizes: jax.Array, rows_format: str, rows: int, offset: jax.Array, count: int) -> jax.Array:
    """int32 [rows]: index of each row's group among `count` groups from `offset` on; -1 for none of them.

    >>> by_index(jnp.array([2, 0, 1]), "sizes", 4, jnp.array([1]), 2).tolist()
    [-1, -1, 1, -1]
    """
    starts, ends, groups = read(group_sizes, rows_format, rows)
    here = local_groups(groups, offset, count) + 1  # 0: none of them
    edges = jnp.zeros_like(here, shape=(rows + 1,)).at[starts].add(here).at[ends].add(-here)
    return jnp.cumsum(edges)[:-1] - 1


def take_groups(segments: Segments, offset: jax.Array, count: int) -> Segments:
    """Segments [offset, offset + count), where segment i is group i: empty ones where there are none.

    Their groups are numbered from 0. offset is int32 [.., 1].
    """
    index = offset + jnp.arange(count, dtype=jnp.int32)
    last = segments.starts.shape[-1] - 1
    exists = (index >= 0) & (index <= last)
    shape = jnp.broadcast_shapes(segments.starts.shape[:-1], index.shape[:-1])

    def take(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (*shape, x.shape[-1]))
        where = jnp.broadcast_to(jnp.clip(index, 0, last), (*shape, count))
        return jnp.where(exists, jnp.take_along_axis(x, where, axis=-1), 0)

    groups = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (*shape, count))
    return Segments(take(segments.starts), take(segments.ends), groups)


def by_group(group_sizes: jax.Array, rows_format: str, rows: int, offset: jax.Array, count: int) -> jax.Array:
    """From an m-grouped op's sizes to a k-grouped op's: segment i is group offset + i, for `count` groups."""
    starts, ends, groups = read(group_sizes, rows_format, rows)
    mine = groups[..., None, :] == (offset + jnp.arange(count, dtype=jnp.int32))[..., None]
    starts, ends = (jnp.sum(jnp.where(mine, x[..., None, :], 0), axis=-1) for x in (starts, ends))
    return write(Segments(starts, ends, jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), starts.shape)))


def by_row(group_sizes: jax.Array, rows: int) -> jax.Array:
    """From a k-grouped op's segments (segment i is group i) to an m-grouped op's, which ascend."""
    starts, ends, _ = read(group_sizes, "segments", rows)
    empty = ends <= starts  # they go to the end: where a segment starts, the rows of the one before it stop
    starts, ends = jnp.where(empty, rows, starts), jnp.where(empty, rows, ends)
    order = jnp.argsort(starts, axis=-1).astype(jnp.int32)
    starts, ends = (jnp.take_along_axis(x, order, axis=-1) for x in (starts, ends))
    return write(Segments(starts, ends, order))
