"""Dense GEMMs in plain jnp with float32 accumulation: what runs off the GPU, and what the kernels are
compared with.

FP8, with b over the blocks of k, 128 or 32 wide (the last one may be shorter):

    D = C + sum_b (A_b @ B_b.T) * (sa[:, b, None] * sb[None, rows, b])

The scales are multiplied into the operands instead of into the partial products. In float32 both agree to a
few units in the last place, and the product stays one matrix multiplication.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core import products

SCALE_BLOCK, FINE_BLOCK = 128, 32
"""Elements of k under one scale; also the rows under one scale of a square block."""


def _repeat_scales(scales: jax.Array, size: int, axis: int, step: int) -> jax.Array:
    return jnp.take(scales, jnp.arange(size) // step, axis=axis)


def dequantize_rows(values: jax.Array, scales: jax.Array, step: int = SCALE_BLOCK) -> jax.Array:
    """float32 of values [.., k] with scales [.., ceil(k / step)]: one scale per row and step of k."""
    return values.astype(jnp.float32) * _repeat_scales(scales, values.shape[-1], -1, step)


def dequantize_blocks(values: jax.Array, scales: jax.Array, step: int = SCALE_BLOCK) -> jax.Array:
    """float32 of values [n, k] with scales [ceil(n / step), ceil(k / step)]: one scale per square block."""
    return dequantize_rows(values, _repeat_scales(scales, values.shape[-2], -2, step), step)


def finish(product: jax.Array, c: jax.Array | None, out_dtype: Any) -> jax.Array:
    """One rounding, after C was added in float32."""
    return (product if c is None else product + c.astype(jnp.float32)).astype(out_dtype)


def dot(a: jax.Array, b: jax.Array, a_contracts: int, b_contracts: int) -> jax.Array:
    return products.dot_general(a, b, ((a_contracts,), (b_contracts,)))


def fp8_gemm(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    c: jax.Array | None = None,
    *,
    out_dtype: Any,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> list[jax.Array]:
    """[C + A @ B.T] for a [m, k], b [n, k], a scale for `step` of k.

    sb has one row per step rows of B or one per row; where both are of one shape (n = 1), both mean the same.
    """
    dequantize_b = dequantize_rows if sb.shape[0] == b.shape[0] else dequantize_blocks
    return [finish(dot(dequantize_rows(a, sa, step), dequantize_b(b, sb, step), 1, 1), c, out_dtype)]


def bf16_gemm(
    a: jax.Array, b: jax.Array, c: jax.Array | None = None, *, layout: str, out_dtype: Any, **_: Any
) -> list[jax.Array]:
    """[C + A @ B] in any layout: a is [m, k] ("n.") or [k, m] ("t."), b is [k, n] (".n") or [n, k] (".t").

    A product of two bfloat16 numbers is exact in float32, so only the sums round.
    """
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    return [finish(dot(a32, b32, int(layout[0] == "n"), int(layout[1] == "t")), c, out_dtype)]
