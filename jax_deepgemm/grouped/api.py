"""Grouped GEMMs: one GEMM per group of rows (of experts, say), all in one kernel."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_deepgemm.gemm.operands import BLOCKED, Options, Quantized, check_options
from jax_deepgemm.grouped import operands, ops
from jax_deepgemm.log import logger
from jax_deepgemm.quantization import QuantizedArray

QuantizedOperand: TypeAlias = QuantizedArray | tuple[jax.Array, jax.Array]
Sharding: TypeAlias = PartitionSpec | NamedSharding | None


def m_grouped_fp8_gemm_nt_contiguous(
    a: QuantizedOperand,
    b: QuantizedOperand,
    group_sizes: jax.Array | None = None,
    *,
    m_indices: jax.Array | None = None,
    ends: jax.Array | None = None,
    alignment: int = 128,
    group_offset: jax.Array | int | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = A @ B[g].T for each group g of rows."""
    op = "m_grouped_fp8_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _m_grouped_fp8(
        op, "nt", a, b, (group_sizes, m_indices, ends, alignment, group_offset), expected_m, options
    )


def m_grouped_fp8_gemm_nn_contiguous(
    a: QuantizedOperand,
    b: QuantizedOperand,
    group_sizes: jax.Array | None = None,
    *,
    m_indices: jax.Array | None = None,
    ends: jax.Array | None = None,
    alignment: int = 128,
    group_offset: jax.Array | int | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = A @ B[g] for each group g of rows; B is stored [g, k, n]."""
    op = "m_grouped_fp8_gemm_nn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _m_grouped_fp8(
        op, "nn", a, b, (group_sizes, m_indices, ends, alignment, group_offset), expected_m, options
    )


def m_grouped_bf16_gemm_nt_contiguous(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array | None = None,
    *,
    m_indices: jax.Array | None = None,
    ends: jax.Array | None = None,
    alignment: int = 128,
    group_offset: jax.Array | int | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = A @ B[g].T for each group g of rows, with bfloat16 operands."""
    op = "m_grouped_bf16_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _m_grouped_bf16(
        op, "nt", a, b, (group_sizes, m_indices, ends, alignment, group_offset), expected_m, options
    )


def m_grouped_bf16_gemm_nn_contiguous(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array | None = None,
    *,
    m_indices: jax.Array | None = None,
    ends: jax.Array | None = None,
    alignment: int = 128,
    group_offset: jax.Array | int | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D = A @ B[g] for each group g of rows, with bfloat16 operands; b is [g, k, n]."""
    op = "m_grouped_bf16_gemm_nn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _m_grouped_bf16(
        op, "nn", a, b, (group_sizes, m_indices, ends, alignment, group_offset), expected_m, options
    )


def m_grouped_fp8_gemm_nt_masked(
    a: QuantizedOperand,
    b: QuantizedOperand,
    masked_m: jax.Array,
    expected_m: int | None = None,
    *,
    zero_rows: bool = False,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T for each group g."""
    op = "m_grouped_fp8_gemm_nt_masked"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right, (m, n, k) = operands.check_fp8(op, operands.masked_sides("nt"), a, b)
    counts = operands.check_masked_m(op, masked_m, right.values.shape[0])
    hints = {"zero_rows": _flag(op, zero_rows), "expected_m": operands.check_expected_m(op, expected_m)}
    if 0 in (m, n, k):
        return _empty("gmk,gnk->gmn", left.values, right.values, options)
    run = ops.M_MASKED_FP8_BLOCK if right.block == BLOCKED else ops.M_MASKED_FP8_ROW
    arrays = (left.values, left.scales, right.values, right.scales, counts)
    return run(*arrays, **hints, **vars(options))[0]


def m_grouped_bf16_gemm_nt_masked(
    a: jax.Array,
    b: jax.Array,
    masked_m: jax.Array,
    expected_m: int | None = None,
    *,
    zero_rows: bool = False,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T for each group g, with bfloat16 operands."""
    op = "m_grouped_bf16_gemm_nt_masked"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right, (m, n, k) = operands.check_bf16(op, operands.masked_sides("nt"), a, b)
    counts = operands.check_masked_m(op, masked_m, right.shape[0])
    hints = {"zero_rows": _flag(op, zero_rows), "expected_m": operands.check_expected_m(op, expected_m)}
    if 0 in (m, n, k):
        return _empty("gmk,gnk->gmn", left, right, options)
    return ops.M_MASKED_BF16["nt"](left, right, counts, **hints, **vars(options))[0]


def k_grouped_fp8_gemm_nt_contiguous(
    a: QuantizedOperand,
    b: QuantizedOperand,
    group_sizes: jax.Array,
    c: jax.Array | None = None,
    *,
    num_groups: int | None = None,
    group_offset: jax.Array | int | None = None,
    out_dtype: Any = jnp.float32,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[:, g's columns] @ B[:, g's columns].T for each group g of columns of k."""
    op = "k_grouped_fp8_gemm_nt_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _k_grouped_fp8(op, "nt", a, b, c, (group_sizes, num_groups, group_offset), options)


def k_grouped_fp8_gemm_tn_contiguous(
    a: QuantizedOperand,
    b: QuantizedOperand,
    group_sizes: jax.Array,
    c: jax.Array | None = None,
    *,
    num_groups: int | None = None,
    group_offset: jax.Array | int | None = None,
    out_dtype: Any = jnp.float32,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[g's rows].T @ B[g's rows] for each group g of rows of k."""
    op = "k_grouped_fp8_gemm_tn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    return _k_grouped_fp8(op, "tn", a, b, c, (group_sizes, num_groups, group_offset), options)


def k_grouped_bf16_gemm_tn_contiguous(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    c: jax.Array | None = None,
    *,
    num_groups: int | None = None,
    group_offset: jax.Array | int | None = None,
    out_dtype: Any = jnp.float32,
    config: Any = None,
    out_sharding: Sharding = None,
    reduce_dtype: Any = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """D[g] = C[g] + A[g's rows].T @ B[g's rows] for each group g of rows of k, with bfloat16 operands."""
    op = "k_grouped_bf16_gemm_tn_contiguous"
    options = check_options(op, out_dtype, reduce_dtype, out_sharding, config, num_sms)
    left, right, (m, n, k) = operands.check_bf16(op, operands.k_grouped_sides("tn"), a, b)
    where, count = operands.check_k_groups(op, group_sizes, num_groups, group_offset)
    addend = operands.check_c(op, c, (count, m, n), options.out_dtype)
    if 0 in (m, n, k):
        return _empty_groups("km,kn->mn", left, right, addend, count, options)
    run = ops.K_GROUPED_BF16 if addend is None else ops.K_GROUPED_BF16_ADD
    arrays = (left, right, where.s, where.o, *(() if addend is None else (addend,)))
    return run(*arrays, layout=where.layout, num_groups=count, **vars(options))[0]


@functools.cache
def _note_transpose(op: str, names: str, shape: tuple[int, ...], way_out: str) -> None:
    logger.info(
        "%s: %s %s: FP8 tensor cores read along k, which is not the last dimension, so the bytes are transposed at "
        "each call. %s",
        op,
        names,
        list(shape),
        way_out,
    )


def _k_last(op: str, name: str, x: Quantized, way_out: str) -> jax.Array:
    """The values with k as their last dimension."""
    _note_transpose(op, name, x.values.shape, way_out)
    return jnp.swapaxes(x.values, -1, -2)


def _flag(op: str, zero_rows: Any) -> bool:
    if not isinstance(zero_rows, bool):
        raise TypeError(f"{op}: zero_rows is {zero_rows!r}, need True or False; it is static.")
    return zero_rows


def _empty(subscripts: str, a: jax.Array, b: jax.Array, options: Options) -> jax.Array:
    """The result if m, n or k is 0: zeros of the type that a product would have. No kernel runs."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, out_sharding=options.out_sharding).astype(options.out_dtype)


def _empty_groups(
    subscripts: str, a: jax.Array, b: jax.Array, c: jax.Array | None, groups: int, options: Options
) -> jax.Array:
    """The k-grouped result if m, n or k is 0: C, or zeros."""
    if c is not None:
        return c
    one = jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32)).astype(options.out_dtype)
    every = jnp.broadcast_to(one[None], (groups, *one.shape))
    return every if options.out_sharding is None else jax.sharding.reshard(every, options.out_sharding)


def _m_grouped_fp8(
    op: str, form: str, a: Any, b: Any, rows: tuple[Any, ...], expected_m: Any, options: Options
) -> jax.Array:
    left, right, (m, n, k) = operands.check_fp8(op, operands.m_grouped_sides(form), a, b)
    where = operands.check_rows(op, *rows, m, right.values.shape[0])
    hint = operands.check_expected_m(op, expected_m)
    if 0 in (m, n, k):
        subscripts = "mk,gnk->mn" if form == "nt" else "mk,gkn->mn"
        return _empty(subscripts, left.values, right.values, options)
    values, scales = right.values, right.scales
    if form == "nn":
        values = _k_last(
            op, "b", right, f"Store b [g, n, k] and use {op.replace('nn', 'nt')} to avoid the pass."
        )
        scales = jnp.swapaxes(scales, -1, -2)
    run = ops.M_GROUPED_FP8_BLOCK if right.block == BLOCKED else ops.M_GROUPED_FP8_ROW
    arrays = (left.values, left.scales, values, scales, where.s, where.o)
    return run(*arrays, layout=where.layout, expected_m=hint, **vars(options))[0]


def _m_grouped_bf16(
    op: str, form: str, a: Any, b: Any, rows: tuple[Any, ...], expected_m: Any, options: Options
) -> jax.Array:
    left, right, (m, n, k) = operands.check_bf16(op, operands.m_grouped_sides(form), a, b)
    where = operands.check_rows(op, *rows, m, right.shape[0])
    hint = operands.check_expected_m(op, expected_m)
    if 0 in (m, n, k):
        return _empty("mk,gnk->mn" if form == "nt" else "mk,gkn->mn", left, right, options)
    run = ops.M_GROUPED_BF16[form]
    return run(left, right, where.s, where.o, layout=where.layout, expected_m=hint, **vars(options))[0]


def _k_grouped_fp8(
    op: str, form: str, a: Any, b: Any, c: Any, groups: tuple[Any, ...], options: Options
) -> jax.Array:
    left, right, (m, n, k) = operands.check_fp8(op, operands.k_grouped_sides(form), a, b)
    where, count = operands.check_k_groups(op, *groups)
    addend = operands.check_c(op, c, (count, m, n), options.out_dtype)
    if 0 in (m, n, k):
        subscripts = "mk,nk->mn" if form == "nt" else "km,kn->mn"
        return _empty_groups(subscripts, left.values, right.values, addend, count, options)
    pair = []
    for name, x in (("a", left), ("b", right)):
        if form == "tn":
            way_out = f"Quantise the transposed matrix and use {op.replace('tn', 'nt')} to avoid the pass."
            pair += [_k_last(op, name, x, way_out), x.scales]
        else:
            pair += [x.values, x.scales.T]
    run = ops.K_GROUPED_FP8 if addend is None else ops.K_GROUPED_FP8_ADD
    arrays = (*pair, where.s, where.o, *(() if addend is None else (addend,)))
    return run(*arrays, layout=where.layout, num_groups=count, **vars(options))[0]
