"""The choice in jax.numpy: scores of some tokens at a time, so that few of them are in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.ops.indexer import reference as indexer
from jax_deepgemm.ops.topk import reference as topk


def rows_at_once(keys: int, scratch: int) -> int:
    """Tokens whose scores fit so many bytes; at least one.

    >>> rows_at_once(65536, 1 << 28), rows_at_once(65536, 1)
    (1024, 1)
    """
    return max(scratch // (4 * max(keys, 1)), 1)


def best_keys(
    q: jax.Array,
    k: jax.Array,
    scales: jax.Array,
    weights: jax.Array,
    start: jax.Array,
    end: jax.Array,
    *,
    best: int,
    by_index: bool,
    scratch: int,
    **_: Any,
) -> list[jax.Array]:
    """Scores float32 [s, best], minus infinity where there is no key, and keys int32 [s, best], -1 there.

    >>> q, k, w = jnp.ones((2, 1, 1)), jnp.array([[1.0], [3.0], [2.0], [3.0]]), jnp.ones((2, 1))
    >>> window = jnp.array([0, 2]), jnp.array([4, 3])
    >>> [x.tolist() for x in best_keys(q, k, jnp.ones(4), w, *window, best=2, by_index=False, scratch=1)]
    [[[3.0, 3.0], [2.0, -inf]], [[1, 3], [2, -1]]]
    """

    def of_rows(rows: tuple[jax.Array, ...]) -> list[jax.Array]:
        q, weights, start, end = rows
        [logits] = indexer.scaled_logits(q, k, scales, weights, start, end, out_dtype=jnp.float32)
        return topk.topk(logits, k=best, by_index=by_index)

    given = q, weights, start, end
    if not all(isinstance(size, int) for size in (q.shape[0], k.shape[0])):
        return of_rows(given)
    tokens, each = q.shape[0], rows_at_once(k.shape[0], scratch)
    if tokens <= each:
        return of_rows(given)
    parts = -(-tokens // each)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, parts * each - tokens), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(parts, each, *x.shape[1:])

    found = lax.map(of_rows, tuple(map(cut, given)))
    return [x.reshape(parts * each, best)[:tokens] for x in found]
