"""Rows of groups in FP8, in one pass from where they lie: taken by an index, and with a transposed copy whose
blocks begin with each group (blocks.py).

quantize_rows      rows x[index], 1x128 along features; x is read once where the rows of each token are known
quantize_groups    the same of x or x[index], and transposed, with one scale per feature and row block
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.sharding import pieces_of_whole
from jax_deepgemm.ops.quantize import reference
from jax_deepgemm.ops.quantize.api import checked_input
from jax_deepgemm.ops.quantize.array import Block, QuantizedArray
from jax_deepgemm.ops.quantize.blocks import ROWS, check_blocks, located
from jax_deepgemm.ops.quantize.fused import PER_COLUMN, PER_ROW, Both, block_of_t, check_rank, is_square
from jax_deepgemm.ops.quantize.op import HINT, KERNELS, BlockOp


def quantize_rows(
    x: ArrayLike,
    index: ArrayLike,
    position: ArrayLike | None = None,
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
) -> QuantizedArray:
    """`quantize(x[index])`, with one scale per row and 128 columns; x[index] is not stored.

    Args:
      x: [t, k] bfloat16, float16 or float32.
      index: int32 [m], the row of x that each row is a copy of. Outside [0, t): a row of zeros.
      position: int32 [t, s], the inverse of index: which rows of the result are copies of each row of x; out
        of [0, m) where there are fewer than s. Each row of x is then read and quantised once instead of once
        for each copy, with the same bits. Where it is not index's inverse, rows are undefined.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for powers of two.

    Returns:
      QuantizedArray of block (1, 128), values [m, k].

    Raises:
      TypeError, ValueError: types, ranks or formats outside the above.

    Has no derivative: differentiate through moe_mlp.

    >>> x = jnp.repeat(jnp.array([[1.0], [2.0], [3.0]]), 128, axis=1)
    >>> q = quantize_rows(x, jnp.array([2, 0, 3]))
    >>> (q.values[:, 0].astype(jnp.float32) * q.scales[:, 0]).tolist()
    [3.0, 1.0, 0.0]
    >>> again = quantize_rows(x, jnp.array([2, 0, 3]), jnp.array([[1], [3], [0]]))
    >>> bool((again.values == q.values).all() and (again.scales == q.scales).all())
    True
    """
    x, _, dtype = checked_input(x, PER_ROW, dtype, scale_format, "quantize_rows")
    check_rank("quantize_rows", "x", x)
    table = [*_index("quantize_rows", index), *_position("quantize_rows", position, x)]
    op = rows_op(dtype, scale_format) if len(table) == 1 else copies_op(dtype, scale_format)
    values, scales = op(*same_varying_axes([x, *table]))
    return QuantizedArray(values, scales, PER_ROW)


def quantize_groups(
    x: ArrayLike,
    blocks: ArrayLike,
    index: ArrayLike | None = None,
    *,
    block_t: Block = PER_COLUMN,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
) -> Both:
    """Rows of groups with one scale per row and 128 columns, and transposed, with one per column and block.

    What the GEMMs of a grouped layer read in training, from x read once. `quantize_both` is the same with
    blocks of rows 0-127, 128-255, .., whatever the groups are.

    Args:
      x: [t, k] bfloat16, float16 or float32.
      blocks: int32 [b, 4], `row_blocks(group_sizes, m)`.
      index: int32 [m], the row of x that each row is a copy of; outside [0, t): a row of zeros. None: the
        rows are those of x, m = t.
      block_t: elements that share a scale in the transposed copy: (128, 1), or (128, 128).
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for powers of two.

    Returns:
      values [m, k], scales [m, ceil(k / 128)], values_t [k, 128 b], scales_t [b, k], float32 ones (with
      block_t (128, 128) [b, ceil(k / 128)]). Column
      128 i + j of values_t is row first + j of block i, zeros behind the block's last row. Rows behind the
      last group are zeros. What values_t and scales_t have for blocks without rows is undefined.

    Raises:
      TypeError, ValueError: types, ranks or formats outside the above.

    Has no derivative: differentiate through grouped_linear or moe_mlp.

    >>> from jax_deepgemm import quantization
    >>> blocks = quantization.row_blocks(jnp.array([3, 1]), 5)
    >>> values, scales, values_t, scales_t = quantize_groups(jnp.ones((5, 128)), blocks)
    >>> values.shape, values_t.shape, scales_t.shape
    ((5, 128), (128, 384), (3, 128))
    >>> values_t[0, :4].tolist(), values_t[0, 128:130].tolist(), values[4, 0].item()
    ([448.0, 448.0, 448.0, 0.0], [448.0, 0.0], 0.0)
    """
    where = "quantize_groups"
    x, _, dtype = checked_input(x, PER_ROW, dtype, scale_format, where)
    check_rank(where, "x", x)
    (blocks,) = check_blocks(where, blocks)
    rows = [] if index is None else _index(where, index)
    op = groups_op(dtype, scale_format, bool(rows), is_square(where, block_t))
    values, scales, values_t, scales_t = op(*same_varying_axes([x, *rows, blocks]))
    return values, scales, values_t, scales_t


def _index(where: str, index: Any) -> list[jax.Array]:
    index = jnp.asarray(unwrapped(index))
    if index.dtype != jnp.int32 or index.ndim != 1:
        raise ValueError(
            f"{where}: index is {index.dtype.name}{list(index.shape)}, need int32 [m]: the row of x that "
            "each row is a copy of."
        )
    return [index]


def _position(where: str, position: Any, x: jax.Array) -> list[jax.Array]:
    if position is None:
        return []
    position = jnp.asarray(unwrapped(position))
    if position.dtype != jnp.int32 or position.ndim != 2 or position.shape[0] != x.shape[0]:
        raise ValueError(
            f"{where}: position is {position.dtype.name}{list(position.shape)} and x is {list(x.shape)}, "
            f"need int32 [{x.shape[0]}, s]: the rows that are copies of each row of x."
        )
    return [position] if 0 not in position.shape else []


@functools.cache
def rows_op(dtype: np.dtype, scale_format: str) -> BlockOp:
    """(x, index) -> [values, scales]. Rows are cut freely, x is whole on each device."""

    def plain(x: jax.Array, index: jax.Array) -> list[jax.Array]:
        wide = _taken(reference.exact_float32(x), index)
        return reference.quantize_float32(wide, block=PER_ROW, dtype=dtype, scale_format=scale_format)

    def result(x: tuple[int, ...], index: tuple[int, ...]) -> list[Any]:
        return groups_shapes(index[0], x[1], 0, dtype)[:2]

    return BlockOp(
        f"quantize_rows_{dtype.name}_{scale_format}",
        "t f, r -> r c, r c_blocks",
        result,
        plain,
        spmd=pieces_of_whole("c", "c_blocks"),
        kernel=_kernel(scale_format, transposed=False, indexed=True),
        grad_hint=HINT,
    )


@functools.cache
def copies_op(dtype: np.dtype, scale_format: str) -> BlockOp:
    """(x, index, position) -> [values, scales], those of rows_op by (x, index); whole on each device."""

    def plain(x: jax.Array, index: jax.Array, position: jax.Array) -> list[jax.Array]:
        wide = _taken(reference.exact_float32(x), index)
        return reference.quantize_float32(wide, block=PER_ROW, dtype=dtype, scale_format=scale_format)

    return BlockOp(
        f"quantize_copies_{dtype.name}_{scale_format}",
        "t f, i, t s -> r c, r c_blocks",
        lambda x, index, position: groups_shapes(index[0], x[1], 0, dtype)[:2],
        plain,
        spmd=pieces_of_whole("r", "c", "c_blocks"),
        kernel=LazyKernel(KERNELS, "quantize_copies", block=PER_ROW, scale_format=scale_format),
        grad_hint=HINT,
    )


@functools.cache
def groups_op(dtype: np.dtype, scale_format: str, indexed: bool, square: bool = False) -> BlockOp:
    """(x[, index], blocks) -> [values, scales, values_t, scales_t]; whole on each device."""

    def plain(x: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        *index, blocks = rest
        wide = reference.exact_float32(x)
        rows = _taken(wide, *index) if index else wide
        return quantized_groups(rows, blocks, dtype, scale_format, square)

    def result(x: tuple[int, ...], *rest: tuple[int, ...]) -> list[Any]:
        *index, blocks = rest
        return groups_shapes(index[0][0] if index else x[0], x[1], blocks[0], dtype, square)

    return BlockOp(
        f"quantize_groups_{dtype.name}_{scale_format}" + "_square" * square + "_rows" * indexed,
        f"t f{', i' if indexed else ''}, n four -> {groups_rule(square)}",
        result,
        plain,
        spmd=pieces_of_whole("r", "c", "c_blocks", "p", "b"),
        kernel=_kernel(scale_format, transposed=True, indexed=indexed, blocked=True, square_t=square),
        grad_hint=HINT,
    )


def groups_shapes(rows: int, cols: int, blocks: int, dtype: np.dtype, square: bool = False) -> list[Any]:
    """Shapes and dtypes of the results."""
    float32, across = np.dtype(np.float32), -(-cols // 128)
    straight = [((rows, cols), dtype), ((rows, across), float32)]
    return [*straight, ((cols, blocks * ROWS), dtype), ((blocks, across if square else cols), float32)]


def groups_rule(square: bool) -> str:
    """The results' side of the sharding rule."""
    return f"r c, r c_blocks, c p, b c{'_blocks' * square}"


def quantized_groups(
    x: jax.Array, blocks: jax.Array, dtype: np.dtype, scale_format: str, square: bool = False
) -> list[jax.Array]:
    """The reference, of x [m, k] in float32; what is undefined is zeros."""
    row, counted = located(blocks, x.shape[0])
    x = reference.zero_rows(x, counted)
    form: dict[str, Any] = {"dtype": dtype, "scale_format": scale_format}
    along_rows, scales_t = reference.quantize_float32(_taken(x, row), block=block_of_t(square), **form)
    return [*reference.quantize_float32(x, block=PER_ROW, **form), along_rows.mT, scales_t]


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros where the index is not in range."""
    if not x.shape[0]:  # which a gather refuses
        return jnp.zeros((index.shape[0], x.shape[1]), x.dtype)
    inside = (index >= 0) & (index < x.shape[0])
    return x.at[jnp.where(inside, index, x.shape[0])].get(mode="fill", fill_value=0)


def _kernel(scale_format: str, **form: Any) -> LazyKernel:
    name = "quantize_indexed" if form.get("indexed") else "quantize_blocked"
    return LazyKernel(KERNELS, name, block=PER_ROW, scale_format=scale_format, **form)
