"""Blocks of 128 rows that begin with each group: which rows share the scales of a transposed copy.

    rows of groups of 200, 0 and 3     0 ..... 127 | 128 .. 199 | 200 .. 202
    their blocks                       first   0        128         200
                                       rows  128         72           3
    columns of the transposed copy     0 ..... 127 | 128 .. 255 | 256 .. 383      zeros behind a group's last

Every group has columns of its own, whole blocks of them. So no group's scales depend on another's rows, and a
product that sums over a group's columns (k-grouped) walks over whole blocks, whatever the sizes are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.prefix import prefix_ends

ROWS = 128
"""Rows of a block."""
FIELDS = 4
"""Numbers that describe one: see `row_blocks`."""


class Located(NamedTuple):
    """What a table of row blocks says in the reference's terms.

    Attributes:
      row: int32 [blocks * 128], the row of each column of the transposed copy; `rows` where there is none.
      counted: int32 [1], the rows from here on count as zeros.
    """

    row: jax.Array
    counted: jax.Array


def count_row_blocks(rows: int, groups: int) -> int:
    """The most blocks that `rows` rows in so many groups can have, with the rows behind the last group.

    >>> count_row_blocks(1024, 3), count_row_blocks(5, 100), count_row_blocks(0, 3)
    (11, 5, 1)
    """
    if not isinstance(rows, int):  # a symbol of jax.export
        return (rows + (ROWS - 1) * (groups + 1)) // ROWS
    return max((rows + (ROWS - 1) * min(groups + 1, rows)) // ROWS, 1)


def row_blocks(group_sizes: ArrayLike, rows: int) -> jax.Array:
    """The table of blocks of 128 rows that begin with each group.

    Args:
      group_sizes: integer [g], rows of each group, one group after the other. Negative sizes count as 0; what
        is beyond `rows` does not count.
      rows: how many there are. Those behind the last group have blocks, too, and count as zeros.

    Returns:
      int32 [b, 4] with b = max((rows + 127 * min(g + 1, rows)) // 128, 1), what any sizes fit in: of each
      block its first row, its rows, how many of them count (none behind the last group), and its group (g
      behind the last one). Blocks without rows stand at the end.

    Raises:
      ValueError: sizes that are no integers [g].

    >>> row_blocks(jnp.array([200, 0, 3]), 210).tolist()
    [[0, 128, 128, 0], [128, 72, 72, 0], [200, 3, 3, 2], [203, 7, 0, 3], [210, 0, 0, 3]]
    """
    sizes = jnp.asarray(unwrapped(group_sizes))
    if sizes.ndim != 1 or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f"row_blocks: group_sizes are {sizes.dtype.name}{list(sizes.shape)}, need integers [g]. For a "
            "table per matrix use jax.vmap."
        )
    groups = sizes.shape[0]
    sizes = sizes.astype(jnp.int32)
    ends = jnp.append(prefix_ends(sizes, rows), jnp.int32(rows))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    blocks_end = jnp.cumsum(-(-(ends - starts) // ROWS), dtype=jnp.int32)
    block = jnp.arange(count_row_blocks(rows, groups), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(block[:, None] >= blocks_end[None, :], axis=-1, dtype=jnp.int32), groups)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), blocks_end[:-1]])
    first = jnp.minimum(starts[group] + (block - before[group]) * ROWS, ends[group])
    count = jnp.minimum(ends[group] - first, ROWS)
    return jnp.stack([first, count, jnp.where(group < groups, count, 0), group], axis=-1)


def located(blocks: jax.Array, rows: int) -> Located:
    """Where the columns of a transposed copy come from, for the reference."""
    first, _, counted, _ = jnp.moveaxis(blocks, -1, 0)
    within = jnp.arange(ROWS, dtype=jnp.int32)[None]
    row = jnp.where(within < counted[:, None], first[:, None] + within, rows)
    return Located(row.reshape(-1), jnp.sum(counted, dtype=jnp.int32)[None])


def check_blocks(where: str, blocks: ArrayLike | None) -> list[jax.Array]:
    """The operand of row blocks: none, or int32 [b, 4].

    Raises:
      ValueError: blocks of another type or shape.
    """
    if blocks is None:
        return []
    blocks = jnp.asarray(unwrapped(blocks))
    if blocks.dtype != jnp.int32 or blocks.ndim != 2 or blocks.shape[1] != FIELDS:
        raise ValueError(
            f"{where}: blocks are {blocks.dtype.name}{list(blocks.shape)}, need int32 [b, {FIELDS}]: what "
            "row_blocks(group_sizes, rows) makes."
        )
    return [blocks]
