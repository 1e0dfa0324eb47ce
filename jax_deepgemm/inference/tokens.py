"""Rows of tokens: embeddings, and the last row of each sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks


def embed(
    ids: ArrayLike,
    table: ArrayLike,
    pos_table: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    *,
    offset: int = 0,
) -> jax.Array:
    """table[id] + pos_table[position + offset]; positions beyond the table take its first or last row.

    >>> import jax.numpy as jnp
    >>> table = jnp.array([[1.0], [2.0], [3.0]])
    >>> embed(jnp.array([2, 0, -1, 3]), table)[:, 0].tolist()
    [3.0, 1.0, 0.0, 0.0]
    >>> embed(jnp.array([2, 0]), table, 10 * table, jnp.array([0, 7]), offset=1)[:, 0].tolist()
    [23.0, 31.0]

    Args:
      ids: integers [..].
      table: [vocabulary, h] bfloat16, float16 or float32.
      pos_table: [rows, h] in the dtype of table, or None.
      positions: integers [..] as ids; given with pos_table.
      offset: added to positions, 2 for OPT.

    Returns:
      [.., h] in the dtype of table, added in float32. Rows of ids outside of the vocabulary, as those of
      padding, are zero.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Differentiable with respect to the tables.
    """
    op = "embed"
    words = checks.floats(op, "table", table)
    if words.ndim != 2 or words.shape[0] < 1:
        raise ValueError(f"{op}: table is {list(words.shape)}, need [vocabulary, h], not empty.")
    rows = checks.integers(op, "ids", ids, "[..]")
    known = (rows >= 0) & (rows < words.shape[0])
    found = jnp.take(words, jnp.where(known, rows, 0), axis=0)
    if (pos_table is None) != (positions is None):
        raise ValueError(f"{op}: one of pos_table and positions is None, need both or neither.")
    if pos_table is not None:
        places = checks.floats(op, "pos_table", pos_table, like=words)
        if places.ndim != 2 or places.shape[0] < 1 or places.shape[1] != words.shape[1]:
            raise ValueError(
                f"{op}: pos_table is {list(places.shape)} and table is {list(words.shape)}, need [rows, h] "
                "of the same h, not empty."
            )
        where = checks.integers(op, "positions", positions, "[..]")
        where = checks.shaped(op, "positions", where, rows.shape, "as ids") + jnp.int32(offset)
        added = jnp.take(places, jnp.clip(where, 0, places.shape[0] - 1), axis=0)
        found = (found.astype(jnp.float32) + added.astype(jnp.float32)).astype(words.dtype)
    return jnp.where(known[..., None], found, jnp.zeros((), words.dtype))


def last_tokens(x: ArrayLike, cu_q_lens: ArrayLike) -> jax.Array:
    """The last row of each sequence of a ragged batch, from which the next token is predicted.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> last_tokens(x, jnp.array([0, 1, 1, 3]))[:, 0].tolist()
    [1.0, 0.0, 3.0]

    Args:
      x: [tokens, h], any dtype.
      cu_q_lens: integers [sequences + 1]: sequence i has the rows cu_q_lens[i] .. cu_q_lens[i + 1] - 1.

    Returns:
      [sequences, h] in the dtype of x. A sequence without rows has zeros; ends beyond x count as its end.

    Raises:
      TypeError, ValueError: types and shapes that do not fit.

    Differentiable with respect to x.
    """
    op = "last_tokens"
    given = jnp.asarray(checks.unwrapped(x))
    ends = checks.integers(op, "cu_q_lens", cu_q_lens, "[sequences + 1]")
    if given.ndim != 2 or ends.ndim != 1 or ends.shape[0] < 1:
        raise ValueError(
            f"{op}: x is {list(given.shape)} and cu_q_lens is {list(ends.shape)}, need [tokens, h] and "
            "[sequences + 1], which begins with 0."
        )
    ends = jnp.clip(ends, 0, given.shape[0])
    if given.shape[0] == 0:
        return jnp.zeros((ends.shape[0] - 1, given.shape[1]), given.dtype)
    rows = jnp.take(given, jnp.maximum(ends[1:] - 1, 0), axis=0)
    return jnp.where((ends[1:] > ends[:-1])[:, None], rows, jnp.zeros((), given.dtype))
