"""Descriptions of grouped rows, and conversions between them: jnp, usable inside jit.

    group sizes     [G]  rows of each group, one group after the other; the tail belongs to none
    index per row   [M]  the group of each row, -1 for none; rows of a group stand together
    ends            [G]  end of each group; a group starts where the one before ended, rounded up to `alignment`

The alignment is DeepGEMM's: there a tile of rows must not mix groups. The kernels here take groups of any size
at any row, so it only says where groups start in arrays that were made for DeepGEMM.
"""

from __future__ import annotations

import contextvars
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.grouped import segments

DEFAULT_ALIGNMENT = 128
_alignment: contextvars.ContextVar[int] = contextvars.ContextVar(
    "jax_deepgemm_alignment", default=DEFAULT_ALIGNMENT
)


def segments_of_ends(ends: jax.Array, rows: int, alignment: int) -> jax.Array:
    """The operand `s` (segments.py) of prefix ends: group i starts where i - 1 ended, rounded up."""
    # An end below its start gives an empty group; starts ascend whatever the numbers are.
    ends = jnp.clip(ends, 0, rows)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jax.lax.cummax(ends)[:-1]])
    starts = jnp.minimum(-(-before // alignment) * alignment, rows)
    groups = jnp.arange(ends.shape[0], dtype=jnp.int32)
    return segments.write(segments.Segments(starts, jnp.maximum(ends, starts), groups))


def segments_of_indices(index: jax.Array, groups: int, offset: jax.Array) -> jax.Array:
    """The operand `s` of an index per row, for `groups` groups from `offset` (int32 [1]) on."""
    rows = index.shape[0]
    local = segments.local_groups(index, offset, groups)
    row = jnp.arange(rows, dtype=jnp.int32)
    where = jnp.where(local >= 0, local, groups)
    first = jnp.full(groups + 1, rows, jnp.int32).at[where].min(row)[:groups]
    last = jnp.full(groups + 1, -1, jnp.int32).at[where].max(row)[:groups]
    order = jnp.argsort(first).astype(jnp.int32)
    starts, ends = first[order], last[order] + 1
    following = jnp.concatenate([starts[1:], jnp.full(1, rows, jnp.int32)])
    ends = jnp.maximum(jnp.minimum(ends, following), starts)
    return segments.write(segments.Segments(starts, ends, order + offset))


_ = Any
