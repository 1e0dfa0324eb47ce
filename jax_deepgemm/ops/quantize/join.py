"""QuantizedArrays side by side, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.quantize.array import QuantizedArray


def concatenate(arrays: Sequence[QuantizedArray], axis: int = -2) -> QuantizedArray:
    """Joins quantised arrays, as the gate and up projections of an MLP, without touching a value.

    Where every array but the last ends at the edge of a block, the result has the same block. Where a seam
    falls inside a block of rows, the result has a scale per row instead, block (1, columns), and the same
    numbers: every product takes such a B, but `moe_mlp` and `grouped_linear` have no gradient through it.
    Along columns that is no way out, as the sums of a product run along them.

    Args:
      arrays: QuantizedArrays [.., rows, cols] of one dtype and one block, equal in all dimensions but `axis`.
      axis: which dimension grows, also of leading ones (experts).

    Returns:
      QuantizedArray; `dequantize` of it is the dequantised arrays side by side, bit for bit.

    Raises:
      TypeError, ValueError: arrays that do not fit each other, or a seam inside a block of columns.

    >>> from jax_deepgemm.quantization import quantize
    >>> gate, up = (quantize(jnp.full((256, 128), x), (128, 128)) for x in (1.0, 2.0))
    >>> concatenate([gate, up])
    QuantizedArray(float8_e4m3fn[512,128], scales float32[4,1], block=(128, 128))
    >>> gate, up = (quantize(jnp.full((200, 128), x), (128, 128)) for x in (1.0, 2.0))
    >>> concatenate([gate, up])
    QuantizedArray(float8_e4m3fn[400,128], scales float32[400,1], block=(1, 128))
    """
    arrays = _checked(arrays)
    first = arrays[0]
    if not -first.ndim <= axis < first.ndim:
        raise ValueError(f"concatenate: axis is {axis} of arrays of rank {first.ndim}.")
    axis -= first.ndim if axis >= 0 else 0
    shapes = [array.shape[:axis] + array.shape[first.ndim + axis + 1 :] for array in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"concatenate: the arrays are {[list(array.shape) for array in arrays]}, need equal dimensions "
            f"but the one they are joined along, {axis}."
        )
    step = first.block[axis] if axis >= -2 else 1
    if any(array.shape[axis] % step for array in arrays[:-1]):
        if axis == -1:
            raise ValueError(
                f"concatenate: columns {[array.shape[-1] for array in arrays]} with blocks of {step}: a seam "
                "falls inside a block, and no scale serves both sides. Quantise the joined array: "
                "quantize(jnp.concatenate(...), block)."
            )
        arrays = [_with_a_scale_per_row(array) for array in arrays]
    values, scales = (
        jnp.concatenate([getattr(array, part) for array in arrays], axis) for part in ("values", "scales")
    )
    return QuantizedArray(values, scales, arrays[0].block)


def _checked(arrays: Sequence[Any]) -> list[QuantizedArray]:
    given = list(arrays) if isinstance(arrays, (list, tuple)) else []
    if not given or not all(isinstance(array, QuantizedArray) for array in given):
        kinds = ", ".join(type(array).__name__ for array in given) or type(arrays).__name__
        raise TypeError(f"concatenate: got {kinds}, need a list of QuantizedArrays.")
    for name in ("dtype", "block", "ndim"):
        found = [getattr(array.check("concatenate"), name) for array in given]
        if len(set(found)) > 1:
            raise ValueError(f"concatenate: the arrays differ in {name}: {', '.join(map(str, found))}.")
    return given


def _with_a_scale_per_row(q: QuantizedArray) -> QuantizedArray:
    rows = jnp.repeat(q.scales, q.block[0], axis=-2)
    return QuantizedArray(q.values, jax.lax.slice_in_dim(rows, 0, q.shape[-2], axis=-2), (1, q.block[1]))
