"""Products with FP4 weights in plain jnp: those of FP8 or bfloat16, with the weights that slabs stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.ops.gemm import reference as dense
from jax_deepgemm.ops.grouped import reference as grouped
from jax_deepgemm.ops.grouped import segments
from jax_deepgemm.ops.quantize import fp4
from jax_deepgemm.ops.quantize import nvfp4_slabs as nvfp4
from jax_deepgemm.ops.quantize import slabs as layout


def _expanded(slabs: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """e4m3 [.., n, k] and float32 scales of each row; exact."""
    values, codes = layout.unfold(slabs)
    numbers, scales = layout.expand(values, codes, 1)
    return numbers[..., :k], scales


def _of(product: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    def run(
        a: jax.Array, scales: jax.Array, slabs: jax.Array, *rest: jax.Array, **params: Any
    ) -> list[jax.Array]:
        return product(a, scales, *_expanded(slabs, a.shape[-1]), *rest, **params)

    return run


mixed_fp8_gemm = _of(dense.fp8_gemm)
"""[D [m, n]] of a [m, k], scales [m, kb], slabs [n / 64, ks, z]."""
m_grouped_mixed_fp8_gemm = _of(grouped.m_grouped_fp8_gemm)
"""[D [m, n]] of a [m, k], scales [m, kb], slabs [g, n / 64, ks, z], sizes, offset."""
m_masked_mixed_fp8_gemm = _of(grouped.m_masked_fp8_gemm)
"""[D [g, m, n]] of a [g, m, k], scales [g, m, kb], slabs [g, n / 64, ks, z], counts."""


def _numbers(slabs: jax.Array, k: int) -> tuple[jax.Array, jax.Array | None]:
    """float32 [.., n, k], which bfloat16 holds, and of NVFP4 factors of products with each row [.., n]."""
    if slabs.shape[-1] != nvfp4.BYTES:
        values, scales = _expanded(slabs, k)
        return dense.dequantize_rows(values, scales), None
    bytes_of, of_blocks, whole = nvfp4.unfold(slabs)
    first = whole[..., 0] if whole.shape[-1] else whole.sum(-1)
    return fp4.nvfp4_numbers(bytes_of, of_blocks)[..., :k], jnp.repeat(first, layout.ROWS, axis=-1)


def rounded(slabs: jax.Array, k: int) -> jax.Array:
    """The weight in bfloat16, exact but for NVFP4's global scale."""
    numbers, factors = _numbers(slabs, k)
    return (numbers if factors is None else numbers * factors[..., None]).astype(jnp.bfloat16)


def _product(a: jax.Array, numbers: jax.Array, factors: jax.Array | None) -> jax.Array:
    """float32 [m, n] of a [m, k] and what `_numbers` gives for one weight."""
    product = dense.dot(a.astype(jnp.float32), numbers, 1, 1)
    return product if factors is None else product * factors[None]


def mixed_bf16_gemm(a: jax.Array, slabs: jax.Array, *, out_dtype: Any, **_: Any) -> list[jax.Array]:
    """[D [m, n]] of a bfloat16 [m, k], slabs [n / 64, ks, z]."""
    return [_product(a, *_numbers(slabs, a.shape[-1])).astype(out_dtype)]


def m_grouped_mixed_bf16_gemm(
    a: jax.Array,
    slabs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[D [m, n]] of a bfloat16 [m, k], slabs [g, n / 64, ks, z], sizes, offset."""
    weights = _numbers(slabs, a.shape[-1])

    def product(rows: jax.Array, first: jax.Array, group: jax.Array) -> jax.Array:
        return _product(rows, *jax.tree.map(lambda each: each[group], weights))

    found, n = segments.read(group_sizes, rows_format, a.shape[0]), slabs.shape[1] * layout.ROWS
    return [grouped.m_grouped_of(a, found, group_offset, slabs.shape[0], n, product).astype(out_dtype)]


def m_masked_mixed_bf16_gemm(
    a: jax.Array, slabs: jax.Array, counts: jax.Array, *, out_dtype: Any, **_: Any
) -> list[jax.Array]:
    """[D [g, m, n]] of a bfloat16 [g, m, k], slabs [g, n / 64, ks, z], counts; other rows are zero."""

    def group(args: tuple[Any, ...]) -> jax.Array:
        a, slabs, count = args
        product = _product(a, *_numbers(slabs, a.shape[-1]))
        return jnp.where(jnp.arange(a.shape[0])[:, None] < count, product, 0).astype(out_dtype)

    return [lax.map(group, (a, slabs, counts))]
