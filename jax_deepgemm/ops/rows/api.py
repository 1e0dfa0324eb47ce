"""Rows by their index, moved by a kernel where there is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.ops.quantize import QuantizedArray
from jax_deepgemm.ops.rows import reference
from jax_deepgemm.ops.rows.op import COPIES, SUMS, TAKE, TAKE_SCALED
from jax_deepgemm.ops.rows.problem import SUMMED


def move_rows(x: jax.Array, index: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """x[index], with zeros where there is no such row.

    >>> import jax.numpy as jnp
    >>> move_rows(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 2, -1, 0])).tolist()
    [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0]]

    Args:
      x: [t, h], any dtype.
      index: integer [m]. -1 is no row, and neither is t.
      position: integer [t, s], the inverse of index: the rows of the result that are copies of each row of
        x, and no row, as m, where there are fewer than s. Each row of x is then read once instead of once for
        each copy. Where it is not index's inverse, rows of the result are undefined.

    Returns:
      [m, h] in the dtype of x. The gradient sums the rows that were taken from one, with a position in
      float32, in the order of s, rounded once.

    Raises nothing. Symbolic sizes, and numbers that are not of whole bytes, take the plain form.
    """
    if not _moves(x, index):
        return reference.take(x, index)[0]
    if position is not None and position.size:
        rows = index.astype(jnp.int32), position.astype(jnp.int32)
        return COPIES(x, *rows, dtype=np.dtype(x.dtype), fallback="reference")[0]
    return TAKE(x, index.astype(jnp.int32), dtypes=(np.dtype(x.dtype),), fallback="reference")[0]


def take_quantized(x: QuantizedArray, index: jax.Array) -> QuantizedArray:
    """Rows of an array that is quantised per row: values and scales, in one launch.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> x = quantize(jnp.ones((2, 256), jnp.bfloat16), (1, 128))
    >>> take_quantized(x, jnp.array([1, 5, 0])).scales.shape
    (3, 2)

    Args:
      x: values [t, h], block (1, 128).
      index: integer [m].

    Returns:
      [m, h], quantised alike; values and scales are zero where there is no such row.

    Raises nothing.
    """
    if _moves(x.values, index) and _moves(x.scales, index):
        dtypes = (np.dtype(x.values.dtype), np.dtype(x.scales.dtype))
        values, scales = TAKE_SCALED(
            x.values, x.scales, index.astype(jnp.int32), dtypes=dtypes, fallback="reference"
        )
    else:
        values, scales = reference.take(x.values, x.scales, index)
    return QuantizedArray(values, scales, x.block)


def sum_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """The sums of x[index[t, s]] over s; nothing is added where there is no such row.

    >>> import jax.numpy as jnp
    >>> sum_rows(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0, 1], [1, 2]])).tolist()
    [[4.0, 6.0], [3.0, 4.0]]

    Args:
      x: [m, ..], any floating dtype.
      index: integer [t, s].

    Returns:
      [t, ..] in the dtype of x: summed in float32, in the order of s, and rounded once. The gradient of a row
      is the sum of those of the sums that it is in.

    Raises nothing. Symbolic sizes, and types that the kernel does not sum, take the plain form.
    """
    known = all(isinstance(size, int) for size in (*x.shape, *index.shape))
    if not (known and x.ndim == 2 and index.shape[1] and np.dtype(x.dtype).name in SUMMED):
        return reference.sums(x, index)[0]
    return SUMS(x, index.astype(jnp.int32), dtype=np.dtype(x.dtype), fallback="reference")[0]


def _moves(x: Any, index: Any) -> bool:
    """Whether the op takes these."""
    known = all(isinstance(size, int) for size in (*x.shape, *index.shape))
    return known and (x.ndim, index.ndim) == (2, 1) and _bits(x.dtype) >= 8


def _bits(dtype: Any) -> int:
    """Of a number, in memory; 0 of what is none."""
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else 0
