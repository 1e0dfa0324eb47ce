"""Operands as the mixed-input kernels read them: as those of FP8 (ops/grouped/prepare.py), with the slabs as
they are. Rows of A are padded to whole 16 bytes; the kernels read its scales by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis
from jax_deepgemm.ops.grouped.prepare import fold_m_grouped, fold_masked

Arrays = Sequence[jax.Array]


def _rows(op: str, a: jax.Array) -> jax.Array:
    return pad_axis(f"{op}: a", a, -1, ROW_BYTES // a.dtype.itemsize)


def _matrices(slabs: jax.Array) -> jax.Array:
    """[.., g, n / 64, bytes of a row of slabs]: of the rank that other weights have."""
    return slabs.reshape(*slabs.shape[:-2], slabs.shape[-2] * slabs.shape[-1])


def _slabs(matrices: jax.Array, like: jax.Array) -> jax.Array:
    return matrices.reshape(*matrices.shape[:-1], *like.shape[-2:])


def mixed_fp8(a: jax.Array, scales: jax.Array, slabs: jax.Array, **_: Any) -> Arrays:
    return _rows("fp8_gemm_nt", a), scales, slabs


def m_grouped_mixed_fp8(
    a: jax.Array,
    scales: jax.Array,
    slabs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    **_: Any,
) -> Arrays:
    (a, scales), (weights,), group_sizes, group_offset = fold_m_grouped(
        (a, scales), (_matrices(slabs),), group_sizes, group_offset, rows_format
    )
    rows = _rows("m_grouped_fp8_gemm_nt_contiguous", a)
    return rows, scales, _slabs(weights, slabs), group_sizes, group_offset


def m_masked_mixed_fp8(
    a: jax.Array, scales: jax.Array, slabs: jax.Array, counts: jax.Array, **_: Any
) -> Arrays:
    (a, scales), (weights,), counts = fold_masked((a, scales), (_matrices(slabs),), counts)
    return _rows("m_grouped_fp8_gemm_nt_masked", a), scales, _slabs(weights, slabs), counts


def mixed_bf16(a: jax.Array, slabs: jax.Array, **_: Any) -> Arrays:
    return _rows("bf16_gemm_nt", a), slabs


def m_grouped_mixed_bf16(
    a: jax.Array,
    slabs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    **_: Any,
) -> Arrays:
    (a,), (weights,), group_sizes, group_offset = fold_m_grouped(
        (a,), (_matrices(slabs),), group_sizes, group_offset, rows_format
    )
    rows = _rows("m_grouped_bf16_gemm_nt_contiguous", a)
    return rows, _slabs(weights, slabs), group_sizes, group_offset


def m_masked_mixed_bf16(a: jax.Array, slabs: jax.Array, counts: jax.Array, **_: Any) -> Arrays:
    (a,), (weights,), counts = fold_masked((a,), (_matrices(slabs),), counts)
    return _rows("m_grouped_bf16_gemm_nt_masked", a), _slabs(weights, slabs), counts
