"""Products with FP4 weights in plain jnp: those of FP8 or bfloat16, with the weights that slabs stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.gemm import reference as dense
from jax_deepgemm.ops.grouped import reference as grouped
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


def _numbers(slabs: jax.Array, k: int) -> jax.Array:
    """float32 [.., n, k]."""
    values, scales = _expanded(slabs, k)
    return dense.dequantize_rows(values, scales)


def mixed_bf16_gemm(a: jax.Array, slabs: jax.Array, *, out_dtype: Any, **_: Any) -> list[jax.Array]:
    """[D [m, n]] of a bfloat16 [m, k], slabs [n / 64, ks, z]."""
    return [dense.dot(a.astype(jnp.float32), _numbers(slabs, a.shape[-1]), 1, 1).astype(out_dtype)]


def _bf16_of(product: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    def run(a: jax.Array, slabs: jax.Array, *rest: jax.Array, **params: Any) -> list[jax.Array]:
        return product(
            a, jax.vmap(lambda one: _numbers(one, a.shape[-1]))(slabs), *rest, layout="nt", **params
        )

    return run


m_grouped_mixed_bf16_gemm = _bf16_of(grouped.m_grouped_bf16_gemm)
"""[D [m, n]] of a bfloat16 [m, k], slabs [g, n / 64, ks, z], sizes, offset."""
m_masked_mixed_bf16_gemm = _bf16_of(grouped.m_masked_bf16_gemm)
"""[D [g, m, n]] of a bfloat16 [g, m, k], slabs [g, n / 64, ks, z], counts."""
