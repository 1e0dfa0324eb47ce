"""Operands as the grouped kernels read them: vmap's dimension merged, rows of whole 16 bytes.

Traced on local shapes in front of the kernel, on CUDA only. What a kernel sees where there was a batch of B
(its `batch` is then not None), with shapes of one element of the batch in small letters:

    m-grouped  a [B * m, k], b [B * g, n, k], or [g, n, k] where it is shared; group_sizes "segments", B times
               as many as of one; group_offset zeros. D is [B, m, n].
    masked     a [B * g, m, k], counts [B * g], b [B * g, n, k], or [g, n, k] where it is shared (group i of a
               has group i % g of b). D is [B, g, m, n].
    k-grouped  a [k, B * m] in BF16: [B * k, m]; FP8: [m, B * k'], scales [B * k' / 128, m] with k' = k
               rounded up to whole blocks (scales of b of 128x128: [B * k' / 128, n / 128] where groups
               begin with a block, else one for each column); group_sizes "segments", segment i for group i
               of B * num_groups;
               group_offset zeros. C and D are [B, num_groups, m, n].
    gathered   as these; the operand that the index is of is [B * t, ..], or [t, ..] where it is shared; index
               [B * m] or [B * k], a row of that operand or no row.

So `rows_format` counts only where there was no batch. k, and what else is contiguous, may be padded with
zeros, and then exceeds D's m and n, which are the true ones. An operand that is the same for the whole batch
is repeated, except b of m-grouped and masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import segments
from jax_deepgemm.ops.grouped.reference import per_column

Arrays = Sequence[jax.Array]


def _batch_of(arrays: Arrays, ranks: Sequence[int]) -> int | None:
    """Size of vmap's dimension, which operands have that exceed their rank; None if none does."""
    sizes = [x.shape[0] for x, rank in zip(arrays, ranks, strict=True) if x.ndim > rank]
    return sizes[0] if sizes else None


def _spread(x: jax.Array, rank: int, size: int) -> jax.Array:
    """x with vmap's dimension."""
    return x if x.ndim > rank else jnp.broadcast_to(x[None], (size, *x.shape))


def _merged(x: jax.Array, rank: int, size: int) -> jax.Array:
    """x with vmap's dimension merged into its first."""
    return _spread(x, rank, size).reshape(-1, *x.shape[x.ndim - rank + 1 :])


def _merged_segments(parts: segments.Segments, rows: int, size: int, groups: jax.Array) -> jax.Array:
    """One operand for all of a batch whose elements have `rows` rows each; parts and groups are [B, S]."""
    first = rows * jnp.arange(size, dtype=jnp.int32)[:, None]
    whole = segments.Segments(parts.starts + first, parts.ends + first, groups)
    return segments.write(segments.Segments(*(x.reshape(-1) for x in whole)))


def beside(x: jax.Array, weights: Arrays) -> jax.Array:
    """x [g, n], a row for each matrix of b, as the weights will be, b and its scales: with vmap's dimension
    merged where they have it."""
    size = _batch_of(weights, (3,) * len(weights))
    return x if size is None else _merged(x, 2, size)


def fold_m_grouped(
    rows: Arrays, weights: Arrays, group_sizes: jax.Array, group_offset: jax.Array, rows_format: str
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    ranks = (2,) * len(rows) + (3,) * len(weights) + (1, 1)
    size = _batch_of([*rows, *weights, group_sizes, group_offset], ranks)
    if size is None:
        return list(rows), list(weights), group_sizes, group_offset
    m = rows[0].shape[-2]
    parts = segments.read(_spread(group_sizes, 1, size), rows_format, m)
    count = weights[0].shape[-3]
    groups = segments.local_groups(parts.groups, _spread(group_offset, 1, size), count)
    if any(x.ndim > 3 for x in weights):
        first = count * jnp.arange(size, dtype=jnp.int32)[:, None]
        groups = jnp.where(groups >= 0, groups + first, -1)
        weights = [_merged(x, 3, size) for x in weights]
    merged = _merged_segments(parts, m, size, groups)
    return [_merged(x, 2, size) for x in rows], list(weights), merged, jnp.zeros(1, jnp.int32)


def _pad_fp8(op: str, a: jax.Array, sa: jax.Array, b: jax.Array, sb: jax.Array) -> list[jax.Array]:
    """k to a multiple of 16 values and ceil(k / 128) to a multiple of 4 scales."""
    return [
        pad_axis(f"{op}: a", a, -1, ROW_BYTES),
        pad_axis(f"{op}: scales of a", sa, -1, ROW_BYTES // 4),
        pad_axis(f"{op}: b", b, -1, ROW_BYTES),
        pad_axis(f"{op}: scales of b", sb, -1, ROW_BYTES // 4),
    ]


def _pad_bf16(op: str, a: jax.Array, b: jax.Array, layout: str) -> list[jax.Array]:
    """The contiguous dimensions to a multiple of 8; the other operand's k follows."""
    step = ROW_BYTES // 2
    a, b = pad_axis(f"{op}: a", a, -1, step), pad_axis(f"{op}: b", b, -1, step)
    return [a, pad_axis(f"{op}: b", b, -2, step) if layout == "nn" else b]


def m_grouped_fp8(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    **_: Any,
) -> Arrays:
    (a, sa), (b, sb), group_sizes, group_offset = fold_m_grouped(
        (a, sa), (b, sb), group_sizes, group_offset, rows_format
    )
    return *_pad_fp8("m_grouped_fp8_gemm", a, sa, b, sb), group_sizes, group_offset


def m_grouped_swiglu(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *bias: jax.Array,
    rows_format: str,
    **_: Any,
) -> Arrays:
    weights = (b, sb, *(one[..., None] for one in bias))
    rows, (b, sb, *bias_of_groups), group_sizes, group_offset = fold_m_grouped(
        (a, sa, row_weights[..., None]), weights, group_sizes, group_offset, rows_format
    )
    a, sa, row_weights = rows
    padded = _pad_fp8("m_grouped_fp8_gemm_swiglu", a, sa, b, sb)
    return *padded, row_weights[:, 0], group_sizes, group_offset, *(one[..., 0] for one in bias_of_groups)


def m_grouped_bf16(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    layout: str,
    rows_format: str,
    **_: Any,
) -> Arrays:
    (a,), (b,), group_sizes, group_offset = fold_m_grouped((a,), (b,), group_sizes, group_offset, rows_format)
    return *_pad_bf16("m_grouped_bf16_gemm", a, b, layout), group_sizes, group_offset


def fold_masked(
    rows: Arrays, weights: Arrays, counts: jax.Array
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    ranks = (3,) * (len(rows) + len(weights)) + (1,)
    size = _batch_of([*rows, *weights, counts], ranks)
    if size is None:
        return list(rows), list(weights), counts
    if any(x.ndim > 3 for x in weights):
        weights = [_merged(x, 3, size) for x in weights]
    return [_merged(x, 3, size) for x in rows], list(weights), _merged(counts, 1, size)


def m_masked_fp8(
    a: jax.Array, sa: jax.Array, b: jax.Array, sb: jax.Array, counts: jax.Array, **_: Any
) -> Arrays:
    (a, sa), (b, sb), counts = fold_masked((a, sa), (b, sb), counts)
    return *_pad_fp8("m_masked_fp8_gemm", a, sa, b, sb), counts


def m_masked_swiglu(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    row_weights: jax.Array,
    counts: jax.Array,
    *bias: jax.Array,
    **_: Any,
) -> Arrays:
    weights = (b, sb, *(one[..., None] for one in bias))
    rows, (b, sb, *bias_of_groups), counts = fold_masked((a, sa, row_weights[..., None]), weights, counts)
    a, sa, row_weights = rows
    padded = _pad_fp8("m_masked_fp8_gemm_swiglu", a, sa, b, sb)
    return *padded, row_weights[..., 0], counts, *(one[..., 0] for one in bias_of_groups)


def m_masked_bf16(a: jax.Array, b: jax.Array, counts: jax.Array, *, layout: str, **_: Any) -> Arrays:
    (a,), (b,), counts = fold_masked((a,), (b,), counts)
    return *_pad_bf16("m_masked_bf16_gemm", a, b, layout), counts


def k_masked_bf16(a: jax.Array, b: jax.Array, counts: jax.Array, **_: Any) -> Arrays:
    (a, b), _weights, counts = fold_masked((a, b), (), counts)
    step = ROW_BYTES // 2
    return (
        pad_axis("k_masked_bf16_gemm: a", a, -1, step),
        pad_axis("k_masked_bf16_gemm: b", b, -1, step),
        counts,
    )


def _fold_k_groups(
    group_sizes: jax.Array,
    group_offset: jax.Array,
    rows_format: str,
    k: int,
    step: int,
    num_groups: int,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """`group_sizes` and `group_offset` where an element of the batch has `step` rows, k of them its own."""
    parts = segments.read(_spread(group_sizes, 1, size), rows_format, k)
    mine = segments.take_groups(parts, _spread(group_offset, 1, size), num_groups)
    groups = jnp.arange(size * num_groups, dtype=jnp.int32).reshape(size, num_groups)
    return _merged_segments(mine, step, size, groups), jnp.zeros(1, jnp.int32)


def k_grouped_bf16(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *c: jax.Array,
    rows_format: str,
    num_groups: int,
    **_: Any,
) -> Arrays:
    size = _batch_of((a, b, group_sizes, group_offset, *c), (2, 2, 1, 1, 3)[: 4 + len(c)])
    if size is not None:
        k = a.shape[-2]
        group_sizes, group_offset = _fold_k_groups(
            group_sizes, group_offset, rows_format, k, k, num_groups, size
        )
        a, b = _merged(a, 2, size), _merged(b, 2, size)
        c = tuple(_spread(x, 3, size) for x in c)
    step = ROW_BYTES // 2
    return (
        pad_axis("k_grouped_bf16_gemm: a", a, -1, step),
        pad_axis("k_grouped_bf16_gemm: b", b, -1, step),
        group_sizes,
        group_offset,
        *c,
    )


def _merged_columns(x: jax.Array, size: int, k: int) -> jax.Array:
    """[rows, B * k] of [B, rows, <= k]."""
    x = _spread(x, 2, size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, k - x.shape[-1])))
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], size * k)


def k_grouped_fp8(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *c: jax.Array,
    rows_format: str,
    num_groups: int,
    **_: Any,
) -> Arrays:
    n = b.shape[-2]
    if sb.shape[-1] < n and (rows_format != "blocks" or n <= SCALE_BLOCK):  # else there is a kernel for it
        sb = per_column(sb, n)
    size = _batch_of((a, sa, b, sb, group_sizes, group_offset, *c), (2, 2, 2, 2, 1, 1, 3)[: 6 + len(c)])
    if size is not None:
        k = a.shape[-1]
        padded = sa.shape[-2] * SCALE_BLOCK
        group_sizes, group_offset = _fold_k_groups(
            group_sizes, group_offset, rows_format, k, padded, num_groups, size
        )
        a, b = (_merged_columns(x, size, padded) for x in (a, b))
        sa, sb = (_merged(x, 2, size) for x in (sa, sb))
        c = tuple(_spread(x, 3, size) for x in c)
    return *_pad_fp8("k_grouped_fp8_gemm", a, sa, b, sb), group_sizes, group_offset, *c


# Rows that an index names


def _fold_sources(x: Arrays, index: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Operands [B, t, ..] as [B * t, ..], and the index into them, [B, m]; shared ones stay."""
    if x[0].ndim == 2:
        return list(x), index
    size, rows = x[0].shape[:2]
    first = rows * jnp.arange(size, dtype=jnp.int32)[:, None]
    index = jnp.where((index >= 0) & (index < rows), index + first, -1)
    return [one.reshape(size * rows, *one.shape[2:]) for one in x], index


def m_gathered_fp8(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    index: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    **_: Any,
) -> Arrays:
    if a.ndim > 2 or sa.ndim > 2:
        size = max(a.shape[0] if a.ndim > 2 else 1, sa.shape[0] if sa.ndim > 2 else 1)
        a, sa = _spread(a, 2, size), _spread(sa, 2, size)
    (a, sa), index = _fold_sources((a, sa), index)
    (index,), (b, sb), group_sizes, group_offset = fold_m_grouped(
        (index[..., None],), (b, sb), group_sizes, group_offset, rows_format
    )
    padded = _pad_fp8("m_gathered_fp8_gemm", a, sa, b, sb)
    return *padded, index[:, 0], group_sizes, group_offset


def m_gathered_bf16(
    a: jax.Array,
    b: jax.Array,
    index: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    layout: str,
    rows_format: str,
    **_: Any,
) -> Arrays:
    (a,), index = _fold_sources((a,), index)
    (index,), (b,), group_sizes, group_offset = fold_m_grouped(
        (index[..., None],), (b,), group_sizes, group_offset, rows_format
    )
    return *_pad_bf16("m_gathered_bf16_gemm", a, b, layout), index[:, 0], group_sizes, group_offset


def k_gathered_bf16(
    a: jax.Array,
    b: jax.Array,
    index: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *c: jax.Array,
    side: str,
    rows_format: str,
    num_groups: int,
    **_: Any,
) -> Arrays:
    sources, others = (a, b) if side == "a" else (b, a)
    (sources,), index = _fold_sources((sources,), index)
    ranks = (2, 1, 1, 1, 3)[: 4 + len(c)]
    size = _batch_of((others, index, group_sizes, group_offset, *c), ranks)
    if size is not None:
        k = others.shape[-2]
        group_sizes, group_offset = _fold_k_groups(
            group_sizes, group_offset, rows_format, k, k, num_groups, size
        )
        others, index = _merged(others, 2, size), _merged(index, 1, size)
        c = tuple(_spread(x, 3, size) for x in c)
    step = ROW_BYTES // 2
    pair = (sources, others) if side == "a" else (others, sources)
    a, b = (
        pad_axis(f"k_gathered_bf16_gemm: {name}", x, -1, step) for name, x in zip("ab", pair, strict=True)
    )
    return a, b, index, group_sizes, group_offset, *c
