"""Both copies of an operand that training needs, in one pass over it.

quantize_both     an activation: 1x128 along features for one GEMM, and transposed, with one scale per
                  128 rows, for the weight gradient
quantize_weight   a weight: 128x128, and the same values transposed
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.quantize import reference
from jax_deepgemm.ops.quantize.api import checked_input, over_leading
from jax_deepgemm.ops.quantize.array import Block
from jax_deepgemm.ops.quantize.op import HINT, KERNELS, BlockOp, quantize_shared, shared_windows

PER_ROW, PER_COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)
Both = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Static = dict[str, Any]


def quantize_both(
    x: ArrayLike,
    rows: ArrayLike | None = None,
    *,
    block_t: Block = PER_COLUMN,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale_format: str = "f32",
) -> Both:
    """FP8 values of x with one scale per row and 128 columns, and transposed with one per 128 rows.

    The same numbers as `quantize(x, (1, 128))` and the transposed values of `quantize(x, (128, 1))`, bit for
    bit, with x read once. Blocks of rows are absolute: rows 0-127, 128-255, ..

    Args:
      x: [m, k] bfloat16, float16 or float32. More dimensions: jax.vmap.
      rows: int32 scalar or [1]; rows from here on count as zeros, whatever they hold. None: all count.
      block_t: elements of x that share a scale in the transposed copy: (128, 1), or (128, 128).
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for powers of two.

    Returns:
      values [m, k], scales [m, ceil(k / 128)], values_t [k, m], scales_t [ceil(m / 128), k]; scales float32.
      x[i, j] = values[i, j] * scales[i, j // 128] = values_t[j, i] * scales_t[i // 128, j], rounded. With
      block_t (128, 128) scales_t is [ceil(m / 128), ceil(k / 128)].

    Raises:
      TypeError, ValueError: types, ranks or formats outside the above.

    Has no derivative: differentiate through grouped_linear, moe_mlp or fp8_linear.

    >>> x = jnp.arange(256, dtype=jnp.float32).reshape(2, 128)
    >>> values, scales, values_t, scales_t = quantize_both(x)
    >>> values_t.shape, scales.shape, scales_t.shape
    ((128, 2), (2, 1), (1, 128))
    >>> (values_t.T.astype(jnp.float32) * scales_t)[1, :4].tolist()
    [128.0, 129.0, 130.0, 131.0]
    """
    x, _, dtype = checked_input(x, PER_ROW, dtype, scale_format, "quantize_both")
    check_rank("quantize_both", "x", x)
    limit = row_limit("quantize_both", rows)
    square = is_square("quantize_both", block_t)
    values, scales, values_t, scales_t = both_op(dtype, scale_format, bool(limit), square)(
        *same_varying_axes([x, *limit])
    )
    return values, scales, values_t, scales_t


def quantize_weight(
    w: ArrayLike, *, dtype: DTypeLike = jnp.float8_e4m3fn, scale_format: str = "f32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FP8 values of a weight with one scale per 128x128 block, and the same values transposed.

    Args:
      w: [.., n, k] bfloat16, float16 or float32.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "f32", or "ue8m0" for powers of two.

    Returns:
      values [.., n, k], scales [.., ceil(n / 128), ceil(k / 128)] float32, values_t [.., k, n], whose scales
      are the transposed ones.

    Raises:
      TypeError, ValueError: types, ranks or formats outside the above.

    Has no derivative: differentiate through grouped_linear, moe_mlp or fp8_linear.

    >>> values, scales, values_t = quantize_weight(jnp.ones((3, 200, 256), jnp.bfloat16))
    >>> values.shape, scales.shape, values_t.shape
    ((3, 200, 256), (3, 2, 2), (3, 256, 200))
    """
    w, _, dtype = checked_input(w, SQUARE, dtype, scale_format, "quantize_weight")
    values, scales, values_t = over_leading(weight_op(dtype, scale_format), w.ndim - 2)(w)
    return values, scales, values_t


def row_limit(where: str, rows: Any) -> list[jax.Array]:
    """The operand of a row limit: none, or int32 [1]."""
    if rows is None:
        return []
    rows = jnp.asarray(np.int32(rows) if isinstance(rows, int) else rows)
    if rows.dtype != jnp.int32 or rows.shape not in ((), (1,)):
        raise ValueError(
            f"{where}: rows is {rows.dtype.name}{list(rows.shape)}, need an int32 scalar or [1]: the first "
            "row that counts as zeros. For a limit per matrix use jax.vmap."
        )
    return [rows.reshape(1)]


def is_square(where: str, block_t: Any) -> bool:
    """Whether the transposed copy's scales are of 128x128.

    Raises:
      ValueError: another block than (128, 1) and (128, 128).
    """
    if block_t not in (PER_COLUMN, SQUARE):
        raise ValueError(
            f"{where}: block_t is {block_t!r}, need (128, 1) or (128, 128): the elements of x that share a "
            "scale in the transposed copy."
        )
    return block_t == SQUARE


def block_of_t(square: bool) -> Block:
    """The elements that share a scale in a transposed copy."""
    return SQUARE if square else PER_COLUMN


def check_rank(where: str, name: str, x: jax.Array) -> None:
    if x.ndim != 2:
        raise ValueError(
            f"{where}: {name} has shape {list(x.shape)}, need rank 2. For stacked matrices use jax.vmap."
        )


def both_shapes(
    rows: int, cols: int, dtype: np.dtype, transposed: bool = True, square: bool = False
) -> list[Any]:
    """Shapes and dtypes of the results of a 1x128 op, with the transposed copy."""
    float32, across = np.dtype(np.float32), -(-cols // 128)
    straight = [((rows, cols), dtype), ((rows, across), float32)]
    grid_t = (-(-rows // 128), across if square else cols)
    return [*straight, ((cols, rows), dtype), (grid_t, float32)] if transposed else straight


def both_rule(cols: str, transposed: bool = True, square: bool = False) -> str:
    """The results' side of the sharding rule of a 1x128 op, whose columns are named `cols`."""
    straight = f"r {cols}, r {cols}_blocks"
    return f"{straight}, {cols} r, r_blocks {cols}{'_blocks' * square}" if transposed else straight


def both_blocks(cols: str, transposed: bool = True) -> dict[str, tuple[str, int]]:
    """The grids of that rule."""
    return {f"{cols}_blocks": (cols, 128)} | ({"r_blocks": ("r", 128)} if transposed else {})


@functools.cache
def both_op(dtype: np.dtype, scale_format: str, limited: bool, square: bool = False) -> BlockOp:
    """(x[, rows]) -> [values, scales, values_t, scales_t]."""

    def plain(x: jax.Array, rows: jax.Array | None = None) -> list[jax.Array]:
        counted = reference.zero_rows(reference.exact_float32(x), rows)
        block_t = block_of_t(square)
        return reference.quantize_both(counted, dtype=dtype, scale_format=scale_format, block_t=block_t)

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], x: jax.Array, *limit: jax.Array) -> Any:
        arrays = (x, *own_limit(plan, limit))
        if not shares_blocks(plan, "rc"):
            return arrays, None
        x, *rows = with_every_level(plan, arrays)
        counted = reference.zero_rows(reference.exact_float32(x), rows[0] if rows else None)
        return None, both_shared(plan, "rc", counted, dtype, scale_format, square=square)

    return BlockOp(
        f"quantize_both_{dtype.name}_{scale_format}" + "_square" * square + "_rows" * limited,
        f"r c{', one' if limited else ''} -> {both_rule('c', square=square)}",
        lambda x, *_: both_shapes(x[0], x[1], dtype, square=square),
        plain,
        blocks=both_blocks("c"),
        spmd=on_shard,
        kernel=_kernel(PER_ROW, scale_format, square),
        grad_hint=HINT,
    )


@functools.cache
def weight_op(dtype: np.dtype, scale_format: str) -> BlockOp:
    """w -> [values, scales, values_t]."""
    static: Static = {"dtype": dtype, "scale_format": scale_format}

    def plain(w: jax.Array) -> list[jax.Array]:
        values, scales = reference.quantize(w, block=SQUARE, **static)
        return [values, scales, values.mT]

    def on_shard(plan: ShardingPlan, local: Callable[..., Any], w: jax.Array) -> Any:
        windows = shared_windows(plan, SQUARE)
        if not windows:
            return (w,), None
        values, scales = quantize_shared(reference.exact_float32(w), windows, SQUARE, **static)
        return None, [values, scales, values.mT]

    def result(w: tuple[int, ...]) -> list[Any]:
        n, k = w
        return [(w, dtype), ((-(-n // 128), -(-k // 128)), np.dtype(np.float32)), ((k, n), dtype)]

    return BlockOp(
        f"quantize_weight_{dtype.name}_{scale_format}",
        "r c -> r c, r_blocks c_blocks, c r",
        result,
        plain,
        blocks={"r_blocks": ("r", 128), "c_blocks": ("c", 128)},
        spmd=on_shard,
        kernel=_kernel(SQUARE, scale_format),
        grad_hint=HINT,
    )


def _kernel(block: Block, scale_format: str, square: bool = False) -> LazyKernel:
    form: dict[str, Any] = {"block": block, "scale_format": scale_format, "transposed": True}
    form |= {"square_t": True} if square else {}
    return LazyKernel(KERNELS, "quantize", batched=True, **form)


# One device's piece -------------------------------------------------------------------------------------


def own_limit(plan: ShardingPlan, limit: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The row limit counted from this device's first row."""
    return tuple(rows - plan.offset("r") if plan.cut("r") else rows for rows in limit)


def shares_blocks(plan: ShardingPlan, names: str, transposed: bool = True) -> bool:
    """Whether a cut falls inside a block of 128 rows or columns."""
    blocks = (PER_ROW, PER_COLUMN) if transposed else (PER_ROW,)
    return any(shared_windows(plan, block, names) for block in blocks)


def both_shared(
    plan: ShardingPlan,
    names: str,
    x: jax.Array,
    dtype: np.dtype,
    scale_format: str,
    transposed: bool = True,
    square: bool = False,
) -> list[jax.Array]:
    """The results of a 1x128 op from this device's piece of x, float32, whose blocks others share."""

    def part(block: Block) -> list[jax.Array]:
        return quantize_shared(x, shared_windows(plan, block, names), block, dtype, scale_format)

    if not transposed:
        return part(PER_ROW)
    along_rows, scales_t = part(block_of_t(square))
    return [*part(PER_ROW), along_rows.mT, scales_t]


def with_every_level(plan: ShardingPlan, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The operands with a dimension of one for each vmap level they do not carry, so that they broadcast."""
    levels = [name for name in plan.rule.results[0] if name.startswith("batch")]
    return [
        jnp.expand_dims(x, [level for level, name in enumerate(levels) if name not in factors])
        for x, factors in zip(arrays, plan.rule.operands, strict=True)
    ]
