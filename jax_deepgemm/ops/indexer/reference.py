"""Logits of keys, and their gradients, in jax.numpy: head by head, so that no [s, h, n] is in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.products import dot_general

_ROWS = ((1,), (1,))
"""Of a matrix product: both operands have what is summed over in their rows."""


def windows(k_start: jax.Array, k_end: jax.Array, keys: Any) -> tuple[jax.Array, jax.Array]:
    """Windows as they count: inside [0, keys], and never less than empty."""
    start = jnp.clip(k_start, 0, keys)
    return start, jnp.clip(k_end, start, keys)


def logits(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    k_start: jax.Array,
    k_end: jax.Array,
    *,
    out_dtype: Any,
    columns: int | None = None,
    **_: Any,
) -> list[jax.Array]:
    """sum_h weights[i, h] relu(q[i, h] . k[j]) inside the windows, minus infinity elsewhere; [s, n], or
    [s, columns] from the first key of each window on.

    >>> q, k, w = jnp.ones((1, 1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.ones((1, 1))
    >>> window = jnp.array([1]), jnp.array([3])
    >>> logits(q, k, w, *window, out_dtype=jnp.float32)[0].tolist()
    [[-inf, 7.0, 11.0]]
    >>> logits(q, k, w, *window, out_dtype=jnp.float32, columns=3)[0].tolist()
    [[7.0, 11.0, -inf]]
    """
    scores = _scores(q, k, weights)
    return [_placed(scores, *windows(k_start, k_end, k.shape[0]), columns).astype(out_dtype)]


def scaled_logits(
    q: jax.Array,
    k: jax.Array,
    scales: jax.Array,
    weights: jax.Array,
    k_start: jax.Array,
    k_end: jax.Array,
    *,
    out_dtype: Any,
    columns: int | None = None,
    **_: Any,
) -> list[jax.Array]:
    """The same, times a scale of each key, [n]."""
    scores = _scores(q, k, weights) * scales[None]
    return [_placed(scores, *windows(k_start, k_end, k.shape[0]), columns).astype(out_dtype)]


def _scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
    """Of every token and key, float32 [s, n]."""
    k = k.astype(jnp.float32)

    def add(total: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        queries, weight = head
        return total + weight[:, None] * jnp.maximum(dot_general(queries, k, _ROWS), 0), None

    heads = jnp.moveaxis(q, 1, 0).astype(jnp.float32), weights.astype(jnp.float32).T
    zeros = same_varying_axes([jnp.zeros((q.shape[0], k.shape[0]), jnp.float32), q, k, weights])[0]
    return lax.scan(add, zeros, heads)[0]


def _placed(scores: jax.Array, start: jax.Array, end: jax.Array, columns: int | None) -> jax.Array:
    """Scores of windows in their columns, minus infinity in the others."""
    key = keys_of_columns(start, scores.shape[1], columns)
    inside = (key >= start[:, None]) & (key < end[:, None])
    if columns is not None:
        at = jnp.broadcast_to(key, (scores.shape[0], columns))
        scores = jnp.pad(scores, ((0, 0), (0, 1)))  # there is a key to take, even if there is none
        scores = jnp.take_along_axis(scores, jnp.clip(at, 0, scores.shape[1] - 1), axis=1)
    return jnp.where(inside, scores, -jnp.inf)


def keys_of_columns(start: jax.Array, keys: Any, columns: int | None) -> jax.Array:
    """Which key a column is: [1, n], or [s, columns]."""
    if columns is None:
        return lax.iota(jnp.int32, keys)[None]
    first = jnp.minimum(start, jnp.iinfo(jnp.int32).max - columns)  # no sum is beyond int32
    return first[:, None] + lax.iota(jnp.int32, columns)[None]


def gradients(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    k_start: jax.Array,
    k_end: jax.Array,
    by: jax.Array,
    *,
    columns: int | None = None,
    **_: Any,
) -> list[jax.Array]:
    """Gradients of q, k and weights, float32, for this one of the logits.

    Products are of float32 numbers, or, if q and k are bfloat16, of numbers rounded to bfloat16, and summed
    up in float32.
    """
    g = _inside(by, *windows(k_start, k_end, k.shape[0]), k.shape[0], columns)

    def of_head(dk: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        queries, weight = head
        x = dot_general(queries, k, _ROWS)
        dx = jnp.where(x > 0, g * weight[:, None], 0).astype(k.dtype)
        dq = dot_general(dx, k, ((1,), (0,)))
        dk = dk + dot_general(dx, queries, ((0,), (0,)))
        return dk, (dq, jnp.sum(g * jnp.maximum(x, 0), axis=1))

    heads = jnp.moveaxis(q, 1, 0), weights.astype(jnp.float32).T
    zeros = same_varying_axes([jnp.zeros(k.shape, jnp.float32), q, k, weights, g])[0]
    dk, (dq, dw) = lax.scan(of_head, zeros, heads)
    return [jnp.moveaxis(dq, 0, 1), dk, dw.T]


def _inside(by: jax.Array, start: jax.Array, end: jax.Array, keys: int, columns: int | None) -> jax.Array:
    """The gradient of every token and key, float32 [s, keys], zero outside windows."""
    key = lax.iota(jnp.int32, keys)[None]
    inside = (key >= start[:, None]) & (key < end[:, None])
    if columns is not None:
        at = key - start[:, None]
        inside &= at < columns
        by = jnp.take_along_axis(by, jnp.clip(at, 0, columns - 1), axis=1)
    return jnp.where(inside, by.astype(jnp.float32), 0)
