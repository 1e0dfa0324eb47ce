"""Descriptions of groups of rows, conversions between them, and checks of their numbers.

    group sizes     [G]  rows of each group, one group after the other; the tail belongs to none
    index per row   [M]  the group of each row, -1 for none; rows of a group stand together
    ends            [G]  end of each group; a group starts where the one before ended, rounded up

The alignment is DeepGEMM's, whose tiles of rows must not mix groups. The kernels here take groups of any size
at any row, so it only says where groups start in arrays that were laid out for DeepGEMM.

Conversions are jnp with static shapes, for use inside `jax.jit`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jax_deepgemm import config
from jax_deepgemm.core.prefix import prefix_ends
from jax_deepgemm.ops.grouped import segments


class Ranges(NamedTuple):
    """Where groups of k start and end, int32 [G] each: in place of `group_sizes` of k-grouped GEMMs."""

    starts: Any
    ends: Any


def get_mk_alignment_for_contiguous_layout() -> int:
    """What `alignment=None` means where groups are given by their ends: `config.mk_alignment`, mostly 128.

    Returns:
      Rows, a positive int. Raises nothing.

    Source: DeepGEMM's function of this name. `get_m_alignment_for_contiguous_layout` and
    `get_k_alignment_for_contiguous_layout` are older names for it.

    >>> from jax_deepgemm.grouped import get_mk_alignment_for_contiguous_layout
    >>> get_mk_alignment_for_contiguous_layout()
    128
    """
    return config.get().mk_alignment


def set_mk_alignment_for_contiguous_layout(alignment: int) -> None:
    """Sets `config.mk_alignment` of the process, read while functions are traced; a call's `alignment=` wins.

    >>> from jax_deepgemm.grouped import set_mk_alignment_for_contiguous_layout
    >>> set_mk_alignment_for_contiguous_layout(128)

    Args:
      alignment: rows, a positive int.

    Raises:
      ValueError: no positive int.

    Source: DeepGEMM's function of this name.
    """
    where = "set_mk_alignment_for_contiguous_layout"
    config.update(mk_alignment=positive(where, "alignment", alignment))


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The alignment that DeepGEMM's kernels for Hopper need, 128, whatever rows are expected per group.

    >>> from jax_deepgemm.grouped import get_theoretical_mk_alignment_for_contiguous_layout
    >>> get_theoretical_mk_alignment_for_contiguous_layout(20)
    128

    Args:
      expected_m: rows of a typical group, or None.

    Returns:
      Rows.

    Raises:
      ValueError: expected_m is no positive int.

    Source: DeepGEMM's function of this name.
    """
    if expected_m is not None:
        positive("get_theoretical_mk_alignment_for_contiguous_layout", "expected_m", expected_m)
    return 128


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def positive(op: str, name: str, value: Any) -> int:
    """A static positive int, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}, need a positive int; it is static.")
    return int(value)


# Conversions


def group_sizes_to_indices(group_sizes: jax.Array, m: int) -> jax.Array:
    """The group of each of m rows; -1 in the tail.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import group_sizes_to_indices
    >>> group_sizes_to_indices(jnp.array([2, 0, 1]), 5).tolist()
    [0, 0, 2, -1, -1]

    Args:
      group_sizes: int32 [G]; negative ones count as 0.
      m: rows, static. Groups that reach beyond are cut.

    Returns:
      int32 [m]. Raises nothing.
    """
    return _indices(prefix_ends(group_sizes, m), m)


def group_sizes_to_ends(group_sizes: jax.Array, alignment: int = 1) -> jax.Array:
    """Where each group ends if each starts at a multiple of the alignment.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import group_sizes_to_ends
    >>> group_sizes_to_ends(jnp.array([2, 0, 5, 1]), 4).tolist()
    [2, 4, 9, 13]

    Args:
      group_sizes: int32 [G]; negative ones count as 0. Rows with their padding are fewer than 2**31.
      alignment: positive int, static.

    Returns:
      int32 [G]; the last one, rounded up, is the number of rows that the layout needs.

    Raises:
      ValueError: the alignment is no positive int.
    """
    positive("group_sizes_to_ends", "alignment", alignment)
    sizes = jnp.maximum(group_sizes, 0).astype(jnp.int32)
    padded = -(-sizes // alignment) * alignment
    return jnp.cumsum(padded, dtype=jnp.int32) - padded + sizes


def ends_to_group_sizes(ends: jax.Array, alignment: int = 1) -> jax.Array:
    """Rows of each group, without those of the padding.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import ends_to_group_sizes
    >>> ends_to_group_sizes(jnp.array([2, 4, 9, 13]), 4).tolist()
    [2, 0, 5, 1]

    Args:
      ends: int32 [G], ascending. An end that is below its group's start makes the group empty.
      alignment: positive int, static.

    Returns:
      int32 [G].

    Raises:
      ValueError: the alignment is no positive int.
    """
    step = positive("ends_to_group_sizes", "alignment", alignment)
    starts, ends = _starts_and_ends(ends, np.iinfo(np.int32).max, step)
    return ends - starts


def ends_to_indices(ends: jax.Array, m: int, alignment: int = 1) -> jax.Array:
    """The group of each of m rows; -1 in gaps and in the tail.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import ends_to_indices
    >>> ends_to_indices(jnp.array([2, 4, 5]), 6, alignment=4).tolist()
    [0, 0, -1, -1, 2, -1]

    Args:
      ends: int32 [G], ascending.
      m: rows, static. Groups that reach beyond are cut.
      alignment: positive int, static.

    Returns:
      int32 [m].

    Raises:
      ValueError: the alignment is no positive int.
    """
    starts, ends = _starts_and_ends(ends, m, positive("ends_to_indices", "alignment", alignment))
    index = _indices(ends, m)
    begins = jnp.take(starts, jnp.maximum(index, 0))
    return jnp.where(jnp.arange(m) >= begins, index, -1)


def indices_to_group_sizes(m_indices: jax.Array, num_groups: int) -> jax.Array:
    """How many rows each group has.

    They describe the same rows only if groups ascend without gaps; sort the rows by group first if not.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import indices_to_group_sizes
    >>> indices_to_group_sizes(jnp.array([0, 0, 2, -1, -1]), 3).tolist()
    [2, 0, 1]

    Args:
      m_indices: int32 [M]; numbers outside [0, num_groups) are no group.
      num_groups: a positive int, static.

    Returns:
      int32 [num_groups].

    Raises:
      ValueError: num_groups is no positive int.
    """
    count = positive("indices_to_group_sizes", "num_groups", num_groups)
    group = jnp.where((m_indices >= 0) & (m_indices < count), m_indices, count)
    return jnp.zeros(count + 1, jnp.int32).at[group].add(1)[:count]


def indices_to_ends(m_indices: jax.Array, num_groups: int) -> jax.Array:
    """Where each group ends; an empty group ends where the one before it does.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.grouped import indices_to_ends
    >>> indices_to_ends(jnp.array([0, 0, -1, -1, 2, -1]), 3).tolist()
    [2, 2, 5]

    Args:
      m_indices: int32 [M], groups ascending.
      num_groups: a positive int, static.

    Returns:
      int32 [num_groups].

    Raises:
      ValueError: num_groups is no positive int.
    """
    count = positive("indices_to_ends", "num_groups", num_groups)
    _, last = _first_and_last(m_indices, count)
    return jax.lax.cummax(last + 1)


def _indices(ends: jax.Array, m: int) -> jax.Array:
    """The number of groups that end at or before each row; ends are in [0, m]."""
    edges = jnp.zeros(m + 1, jnp.int32).at[ends].add(1)
    group = jnp.cumsum(edges[:m], dtype=jnp.int32)
    return jnp.where(group < ends.shape[0], group, -1)


def _starts_and_ends(ends: jax.Array, m: int, alignment: int) -> tuple[jax.Array, jax.Array]:
    """Both ascending and at most m, whatever the numbers are."""
    ends = jnp.clip(ends, 0, m).astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jax.lax.cummax(ends)[:-1]])
    gap = jnp.minimum(-before % alignment, m - before)
    return before + gap, jnp.maximum(ends, before + gap)


def _first_and_last(index: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """First and last row of each group; of an empty one the number of rows and -1."""
    rows = index.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.where((index >= 0) & (index < groups), index, groups)
    first = jnp.full(groups + 1, rows, jnp.int32).at[group].min(row)
    last = jnp.full(groups + 1, -1, jnp.int32).at[group].max(row)
    return first[:groups], last[:groups]


# The operand `group_sizes` of the ops (segments.py)


def segments_of_ends(ends: jax.Array, rows: int, alignment: int) -> jax.Array:
    """The segments of groups that are described by their ends."""
    starts, ends = _starts_and_ends(ends, rows, alignment)
    return segments.write(segments.Segments(starts, ends, jnp.arange(ends.shape[0], dtype=jnp.int32)))


def ranges_of_ends(ends: jax.Array, alignment: int) -> Ranges:
    """The groups of k that are described by their ends."""
    return Ranges(*_starts_and_ends(ends, np.iinfo(np.int32).max, alignment))


def segments_of_indices(index: jax.Array, groups: int, offset: jax.Array) -> jax.Array:
    """The segments that an index per row describes, for `groups` groups from `offset` (int32 [1]) on.

    Rows of a group that stand behind those of another are left out, as segments share no row.
    """
    first, last = _first_and_last(segments.local_groups(index, offset, groups), groups)
    order = jnp.argsort(first).astype(jnp.int32)
    starts, ends = first[order], last[order] + 1
    following = jnp.concatenate([starts[1:], jnp.full(1, index.shape[0], jnp.int32)])
    ends = jnp.maximum(jnp.minimum(ends, following), starts)
    return segments.write(segments.Segments(starts, ends, order + offset))


# Checks of numbers that are known at run time only


def check_group_sizes(group_sizes: jax.Array, m: int) -> jax.Array:
    """Reports negative sizes and sums above m inside `checkify.checkify`; does nothing elsewhere.

    >>> import jax, jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> from jax_deepgemm.grouped import check_group_sizes
    >>> error, _ = checkify.checkify(jax.jit(check_group_sizes, static_argnums=1))(jnp.array([3, -1]), 8)
    >>> error.get().splitlines()[0]
    'group_sizes[1] is -1, need sizes of 0 or more (`check` failed)'

    Args:
      group_sizes: int32 [G].
      m: rows, static.

    Returns:
      group_sizes, as it is. A GEMM counts negative sizes as 0 and cuts groups at row m. Raises nothing
      itself: what is wrong is in the error that `checkify.checkify` returns.
    """
    worst = jnp.argmin(group_sizes)
    checkify.debug_check(
        group_sizes[worst] >= 0,
        "group_sizes[{group}] is {size}, need sizes of 0 or more",
        group=worst,
        size=group_sizes[worst],
    )
    fits = prefix_ends(group_sizes, m + 1)[-1] <= m
    checkify.debug_check(
        fits, "group_sizes {sizes} sum to more than the {m} rows", sizes=group_sizes, m=jnp.int32(m)
    )
    return group_sizes


def check_m_indices(m_indices: jax.Array, num_groups: int) -> jax.Array:
    """Reports indices that are no group and not -1, and groups in pieces, inside `checkify.checkify`.

    >>> import jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> from jax_deepgemm.grouped import check_m_indices
    >>> error, _ = checkify.checkify(lambda x: check_m_indices(x, 2))(jnp.array([0, 1, 0]))
    >>> error.get().splitlines()[0]
    'rows of group 0 do not stand together (`check` failed)'

    Args:
      m_indices: int32 [M].
      num_groups: a positive int, static.

    Returns:
      m_indices, as it is. A GEMM takes other numbers as -1, and of a group in pieces only rows that stand
      before those of the next group.

    Raises:
      ValueError: num_groups is no positive int. Wrong numbers are in the error that `checkify.checkify`
      returns.
    """
    count = positive("check_m_indices", "num_groups", num_groups)
    wrong = jnp.argmax((m_indices < -1) | (m_indices >= count))
    checkify.debug_check(
        (m_indices[wrong] >= -1) & (m_indices[wrong] < count),
        "m_indices[{row}] is {index}, need -1 or a group below {groups}",
        row=wrong,
        index=m_indices[wrong],
        groups=jnp.int32(count),
    )
    first, last = _first_and_last(m_indices, count)
    split = jnp.maximum(last - first + 1, 0) != indices_to_group_sizes(m_indices, count)
    checkify.debug_check(
        ~jnp.any(split), "rows of group {group} do not stand together", group=jnp.argmax(split)
    )
    return m_indices
