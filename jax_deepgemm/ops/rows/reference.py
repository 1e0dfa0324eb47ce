"""Rows by their index in jax.numpy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def take(*arrays: jax.Array, dtypes: tuple[np.dtype, ...] = ()) -> list[jax.Array]:
    """x.., index -> x[index] of each x; zeros where the index is not in [0, rows of x)."""
    *given, index = arrays
    return [_take(x, index) for x in given]


def copies(x: jax.Array, index: jax.Array, position: jax.Array, *, dtype: Any = None) -> list[jax.Array]:
    """`take` of x; position, the inverse of index, says nothing that index does not."""
    return [_take(x, index)]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    if x.dtype.itemsize == 1 and x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating):
        return from_words(_take(as_words(x), index), x.dtype)
    if not x.shape[0]:  # which a gather refuses
        return jnp.broadcast_to(jnp.sum(x, dtype=x.dtype), (*index.shape, *x.shape[1:]))
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def sums(x: jax.Array, index: jax.Array, *, dtype: Any = None) -> list[jax.Array]:
    """x, index -> the sums of x[index[.., s]] over s in float32, in the order of s, rounded once."""
    total = jnp.zeros((index.shape[0], *x.shape[1:]), jnp.float32)
    for slot in range(index.shape[1]):  # not one gather [.., s, h]: XLA fuses these into one loop
        total += _take(x, index[:, slot]).astype(jnp.float32)
    return [total.astype(x.dtype)]


def as_words(values: jax.Array) -> jax.Array:
    """FP8 [rows, n] as uint32 [rows, n / 4], which move faster; uint8 if 4 does not divide n.

    So too of symbolic rows: a program with a wider bitcast of them cannot be loaded.
    """
    rows, n = values.shape
    if n % 4 or not isinstance(rows, int):
        return lax.bitcast_convert_type(values, jnp.uint8)
    return lax.bitcast_convert_type(values.reshape(rows, n // 4, 4), jnp.uint32)


def from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `as_words`."""
    values = lax.bitcast_convert_type(words, dtype)
    return values.reshape(words.shape[0], math.prod(values.shape[1:]))
