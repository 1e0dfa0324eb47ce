"""Products of rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.inference import checks
from jax_deepgemm.inference.layers import (
    Weight,
    as_it_goes_on,
    as_stored,
    dequantized,
    finished,
    is_frozen,
    no_float16,
    of_kernels,
    result_dtype,
)
from jax_deepgemm.inference.weights import QuantizedWeight
from jax_deepgemm.ops.grouped.layouts import group_sizes_to_indices
from jax_deepgemm.ops.grouped.linear import grouped_linear as grouped
from jax_deepgemm.ops.quantize import QuantizedArray
from jax_deepgemm.ops.quantize.per_channel import PerChannelArray
from jax_deepgemm.ops.ragged_dot.api import ragged_dot


def grouped_linear(
    x: ArrayLike,
    w: Weight,
    group_sizes: ArrayLike,
    bias: ArrayLike | None = None,
    act: str | None = None,
    *,
    w_layout: str = "kn",
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """act(x @ w[g] + bias[g]) for the rows of each group g, one group behind the other.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((2, 16, 16), jnp.bfloat16)
    >>> y = grouped_linear(x, w, jnp.array([1, 2]), jnp.array([[1.0] * 16, [2.0] * 16]))
    >>> y[:, 0].tolist()
    [17.0, 18.0, 18.0, 0.0]

    What runs is decided by the weight, as in `linear`: arrays in bfloat16 on the grouped kernels, other
    arrays by `jax.lax.ragged_dot`, a `QuantizedArray` [g, n, k] in FP8, int8 (or e4m3) with a scale a channel
    as it is stored for bfloat16 rows, k a multiple of 8 and n of 16; everything else is dequantised to the
    dtype of x at each call.

    Args:
      x: [m, k] bfloat16, float16 or float32.
      w: [g, k, n] (see w_layout): an array in the dtype of x, a `QuantizedWeight`, a `PerChannelArray`, or a
        `QuantizedArray` of FP8.
      group_sizes: integers [g]: rows of each group.
      bias: [g, n], or None.
      act: as in `bias_act`, or None.
      w_layout: "kn", or "nk" for w stored [g, n, k]: arrays and FP8.
      out_dtype: bfloat16, float16 or float32; default that of x.

    Returns:
      [m, n] in out_dtype, rounded once; rows behind the last group are zero, and what they hold is not read.

    Raises:
      TypeError, ValueError: types, shapes and layouts that do not fit.

    Differentiable with respect to x and arrays w; `jax_deepgemm.grouped_linear` is the layer for training.
    """
    op = "grouped_linear"
    given, w = checks.floats(op, "x", x), unwrapped(w)
    weight: Any = w if is_frozen(op, w, "w", w_layout) else checks.floats(op, "w", w, like=given)
    sizes = checks.integers(op, "group_sizes", group_sizes, "[g]")
    shape = tuple(weight.shape)
    if given.ndim != 2 or len(shape) != 3 or shape[1 + w_layout.index("k")] != given.shape[1]:
        raise ValueError(
            f"{op}: x is {list(given.shape)} and w is {list(shape)}, need x [m, k] and w [g, "
            f"{', '.join(w_layout)}] of the same k."
        )
    checks.shaped(op, "group_sizes", sizes, shape[:1], "a number of rows for each matrix of w")
    dtype = result_dtype(op, given, out_dtype)
    wide = _multiplied(op, given, weight, sizes, w_layout, as_it_goes_on(dtype, bias, act))
    if bias is not None:
        n = shape[1 + w_layout.index("n")]
        rows = checks.floats(op, "bias", bias)
        checks.shaped(op, "bias", rows, (shape[0], n), "a row for each group")
        group: Any = group_sizes_to_indices(sizes, given.shape[0])
        own: Any = jnp.take(rows.astype(jnp.float32), jnp.maximum(group, 0), axis=0)
        wide = jnp.where((group >= 0)[:, None], wide + own, 0.0)
    return finished(op, wide, None, act, dtype)


def _multiplied(op: str, x: jax.Array, w: Any, sizes: jax.Array, layout: str, dtype: Any) -> jax.Array:
    """[m, n] in a type or, by kernels, in float32; rows of no group are zero."""
    if isinstance(w, QuantizedArray):
        no_float16(op, x, "w")
        return grouped(x, w, sizes, out_dtype=of_kernels(dtype))
    if isinstance(w, QuantizedWeight | PerChannelArray):
        direct = as_stored(op, x, w, "w")
        if direct is not None:
            form: dict[str, Any] = {"recipe": "bf16", "weight_layout": "kn", "out_dtype": of_kernels(dtype)}
            return grouped(x, direct, sizes, **form)
        w = dequantized(op, x, w, "w")
    stored = {"kn": "gkn", "nk": "gnk"}[layout]
    return ragged_dot(x, w, sizes, rhs_layout=stored, preferred_element_type=dtype)
