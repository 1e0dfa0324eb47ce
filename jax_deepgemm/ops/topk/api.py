"""topk: checks, the call of the op, and the values' derivative."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import Sharding, sharding_option
from jax_deepgemm.ops.topk.op import AT, topk_op
from jax_deepgemm.ops.topk.problem import DTYPES, beyond

ORDERS = ("value", "index")
_ANYWHERE = {"fallback": "reference"}
"""Where no kernel runs (other platforms, symbolic sizes) jnp does; it is not slow enough to refuse."""


def topk(
    x: jax.Array,
    k: int,
    *,
    start: ArrayLike | None = None,
    end: ArrayLike | None = None,
    order: str = "value",
    values: bool = False,
    out_sharding: Sharding = None,
) -> Any:
    """The columns of the k largest numbers of every row, exactly; of equal ones the lower column comes first.

    As `jax.lax.top_k`, but for four things: rows may have a window, [start, end), outside of which nothing
    counts; k may be more than there are; -infinity and NaN are never chosen, so a mask may be added to x (a
    row of NaN gives -1 everywhere); and both zeros are equal. Where nothing is left to choose, the index is
    -1 and the value -infinity.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 5.0, 3.0, 5.0], [-jnp.inf, 2.0, jnp.nan, 7.0]])
    >>> topk(x, 3).tolist()
    [[1, 3, 2], [3, 1, -1]]
    >>> topk(x, 2, start=1, end=jnp.array([3, 1])).tolist()
    [[1, 2], [-1, -1]]
    >>> found, columns = topk(x, 3, values=True, order="index")
    >>> found.tolist(), columns.tolist()
    ([[5.0, 3.0, 5.0], [2.0, 7.0, -inf]], [[1, 2, 3], [1, 3, -1]])

    Args:
      x: [m, n] float32, bfloat16 or float16.
      k: how many, at least 1.
      start, end: integer [m], or one for all rows: columns start <= j < end count. What is outside [0, n)
        does not exist; an empty window is no error. None: 0 and n.
      order: "value", the largest first, or "index", by ascending columns, as attention gathers them best.
      values: whether the numbers are returned too.
      out_sharding: of the results on a mesh with Explicit axes, needed where columns are cut.

    Returns:
      indices int32 [m, k]; with values=True (values [m, k] in the dtype of x, indices). Missing ones are at
      the end, in both orders. Values are differentiable: the gradient goes to the numbers that were chosen.

    Raises:
      TypeError, ValueError: dtypes, shapes and options that do not fit; the message names both sides.

    Deterministic: the result depends on nothing but x. One kernel on CUDA, which reads x about once, for rows
    of up to 2^20 columns and k up to 2048; jnp elsewhere and beyond. On a mesh rows are cut freely; where
    columns are cut, devices exchange k candidates of each row.
    """
    x = unwrapped(x)
    _check(x, k, order)
    rows, columns = x.shape
    windows = [] if start is None and end is None else _windows(start, end, rows, columns)
    x, *windows = same_varying_axes([x, *windows])
    known = all(isinstance(size, int) for size in x.shape)
    op = topk_op(bool(windows), values, order == "index", not known or not beyond(rows, columns, k))
    *found, indices = op(
        lax.stop_gradient(x),
        *windows,
        k=int(k),
        dtype=np.dtype(x.dtype),
        out_sharding=_shardings(sharding_option("topk", out_sharding), 1 + values),
        **_ANYWHERE,
    )
    return (_differentiable(out_sharding, x, indices, *found), indices) if values else indices


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(out_sharding: Sharding, x: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """The values, which are x at these indices."""
    return values


@_differentiable.defjvp
def _differentiable_jvp(out_sharding: Sharding, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, indices, values), (moved, *_) = primals, tangents
    spec = sharding_option("topk", out_sharding)
    [by] = AT(moved, indices, out_dtype=values.dtype, out_sharding=spec, **_ANYWHERE)
    return _differentiable(out_sharding, x, indices, values), by


def _shardings(spec: Any, results: int) -> Any:
    return None if spec is None else (spec,) * results


def _windows(start: Any, end: Any, rows: int, columns: int) -> list[jax.Array]:
    found = []
    for name, given, default in (("start", start, 0), ("end", end, columns)):
        one = jnp.asarray(default if given is None else unwrapped(given))
        if not jnp.issubdtype(one.dtype, jnp.integer):
            raise TypeError(f"topk: {name} is {one.dtype}, need integers: {name}.astype(jnp.int32).")
        if one.ndim > 1 or (one.ndim == 1 and one.shape != (rows,)):
            raise ValueError(
                f"topk: {name} is {list(one.shape)} and x is {[rows, columns]}, need one of each row "
                f"[{rows}], or one for all."
            )
        found.append(jnp.broadcast_to(one.astype(jnp.int32), (rows,)))
    return found


def _check(x: Any, k: Any, order: Any) -> None:
    if not hasattr(x, "dtype") or np.dtype(x.dtype).name not in DTYPES:
        given = np.dtype(x.dtype).name if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"topk: x is {given}, need {', '.join(DTYPES)}. Convert it: x.astype(jnp.float32).")
    if x.ndim != 2:
        raise ValueError(
            f"topk: x is {list(x.shape)}, need [m, n]. Merge leading dimensions: x.reshape(-1, x.shape[-1])."
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"topk: k is {k!r}, need a whole number, at least 1; it is static.")
    if order not in ORDERS:
        raise ValueError(f"topk: order is {order!r}, need 'value' or 'index'.")
