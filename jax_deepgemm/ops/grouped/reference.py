"""Grouped GEMMs in plain jnp with float32 accumulation: what runs off the GPU, and what the kernels are
compared with.

Rows are taken in tiles that lie inside one group, one after the other, so that neither A nor D exists once
per group, and the work follows the rows that groups really have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK, dequantize_blocks, dequantize_rows, dot, finish
from jax_deepgemm.ops.grouped.segments import Segments, local_groups, read, take_groups

MIN_TILE, MAX_TILE = 8, 128
SOME_TILE = 32
"""Rows of a tile where the number of rows is symbolic."""

Tile = tuple[jax.Array, jax.Array, jax.Array]
"""First row of a tile, which of its rows count ([rows, 1] bool), and its group."""


def _over_tiles(
    segments: Segments, extent: int, body: Callable[[jax.Array, Tile], jax.Array], result: jax.Array
) -> jax.Array:
    """Folds body(result, tile) over all tiles of all segments whose group is not negative."""
    size = _tile_size(segments, extent)
    starts, ends, groups = segments
    tiles = jnp.where(groups >= 0, -(-(ends - starts) // size), 0)
    behind = jnp.cumsum(tiles)

    def step(index: jax.Array, result: jax.Array) -> jax.Array:
        segment = jnp.sum(behind <= index, dtype=jnp.int32)
        first = starts[segment] + (index - behind[segment] + tiles[segment]) * size
        rows = first + jnp.arange(size, dtype=jnp.int32)
        return body(result, (first, (rows < ends[segment])[:, None], groups[segment]))

    return lax.fori_loop(0, behind[-1], step, result)


def _tile_size(segments: Segments, extent: int) -> int:
    """Rows of a tile: about those of an average group, so that little is computed in vain."""
    if not isinstance(extent, int):
        return SOME_TILE
    average = max(extent // segments.starts.shape[0], 1)
    return min(max(1 << (average.bit_length() - 1), MIN_TILE), MAX_TILE)


def _zeros(like: jax.Array, *shape: int) -> jax.Array:
    """float32 zeros that vary over the same axes of a shard_map as `like`."""
    return jnp.zeros_like(like, dtype=jnp.float32, shape=shape)


def m_grouped_of(
    a: jax.Array,
    segments: Segments,
    offset: jax.Array,
    groups: int,
    n: int,
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """float32 [m, n]: each row's product with its group; product(rows of a, their first, local group)."""
    m = a.shape[0]
    size = _tile_size(segments, m)
    mine = segments._replace(groups=local_groups(segments.groups, offset, groups))
    padded = jnp.pad(a, ((0, size), (0, 0)))

    def body(d: jax.Array, tile: Tile) -> jax.Array:
        first, counts, group = tile
        rows = product(lax.dynamic_slice_in_dim(padded, first, size), first, group)
        before = lax.dynamic_slice_in_dim(d, first, size)
        return lax.dynamic_update_slice_in_dim(d, jnp.where(counts, rows, before), first, 0)

    return _over_tiles(mine, m, body, _zeros(padded, m + size, n))[:m]


def m_grouped_fp8_gemm(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    out_dtype: Any,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> list[jax.Array]:
    """[D [m, n]] of a [m, k], b [g, n, k]; sb has one row per `step` rows of b, or one per row."""
    segments = read(group_sizes, rows_format, a.shape[0])
    size = _tile_size(segments, a.shape[0])
    dequantize_b = dequantize_rows if sb.shape[1] == b.shape[1] else dequantize_blocks
    scales = jnp.pad(sa, ((0, size), (0, 0)))

    def product(rows: jax.Array, first: jax.Array, group: jax.Array) -> jax.Array:
        left = dequantize_rows(rows, lax.dynamic_slice_in_dim(scales, first, size), step)
        return dot(left, dequantize_b(b[group], sb[group], step), 1, 1)

    return [m_grouped_of(a, segments, group_offset, b.shape[0], b.shape[1], product).astype(out_dtype)]


def _contracts(layout: str) -> int:
    """The dimension of one group's b that k is."""
    return int(layout == "nt")


def m_grouped_bf16_gemm(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    layout: str,
    rows_format: str,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[D [m, n]] of a [m, k] and b [g, n, k] ("nt") or [g, k, n] ("nn")."""

    def product(rows: jax.Array, first: jax.Array, group: jax.Array) -> jax.Array:
        return dot(rows.astype(jnp.float32), b[group].astype(jnp.float32), 1, _contracts(layout))

    segments = read(group_sizes, rows_format, a.shape[0])
    n = b.shape[2 - _contracts(layout)]
    return [m_grouped_of(a, segments, group_offset, b.shape[0], n, product).astype(out_dtype)]


def _masked(counts: jax.Array, rows: int, d: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(rows)[:, None] < counts, d, 0)


def m_masked_fp8_gemm(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    counts: jax.Array,
    *,
    out_dtype: Any,
    step: int = SCALE_BLOCK,
    **_: Any,
) -> list[jax.Array]:
    """[D [g, m, n]]; rows from counts[g] on are zero, whatever `zero_rows` asks."""
    dequantize_b = dequantize_rows if sb.shape[1] == b.shape[1] else dequantize_blocks

    def group(args: tuple[jax.Array, ...]) -> jax.Array:
        a, sa, b, sb, count = args
        d = dot(dequantize_rows(a, sa, step), dequantize_b(b, sb, step), 1, 1)
        return _masked(count, a.shape[0], d).astype(out_dtype)

    return [lax.map(group, (a, sa, b, sb, counts))]


def m_masked_bf16_gemm(
    a: jax.Array, b: jax.Array, counts: jax.Array, *, layout: str, out_dtype: Any, **_: Any
) -> list[jax.Array]:
    """[D [g, m, n]] of b [g, n, k] ("nt") or [g, k, n] ("nn")."""

    def group(args: tuple[jax.Array, ...]) -> jax.Array:
        a, b, count = args
        d = dot(a.astype(jnp.float32), b.astype(jnp.float32), 1, _contracts(layout))
        return _masked(count, a.shape[0], d).astype(out_dtype)

    return [lax.map(group, (a, b, counts))]


def _k_grouped(
    segments: Segments,
    k: int,
    m: int,
    n: int,
    tiles: Callable[[jax.Array], Sequence[jax.Array]],
) -> jax.Array:
    """float32 [g, m, n]; tiles(first) are the tiles of a [k, m] and b [k, n] from that row on, in float32."""

    def body(d: jax.Array, tile: Tile) -> jax.Array:
        first, counts, group = tile
        left, right = (jnp.where(counts, x, 0) for x in tiles(first))
        return d.at[group].add(dot(left, right, 0, 0))

    return _over_tiles(segments, k, body, _zeros(segments.starts, segments.starts.shape[0], m, n))


def k_grouped_fp8_gemm(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    c: jax.Array | None = None,
    *,
    rows_format: str,
    num_groups: int,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[C + D [g, m, n]] of a [m, k], sa [kb, m], b [n, k], sb [kb, n] or [kb, nb]; segment i is group i."""
    (m, k), n = a.shape, b.shape[0]
    sb = sb if sb.shape[1] == n else per_column(sb, n)
    segments = take_groups(read(group_sizes, rows_format, k), group_offset, num_groups)
    size = _tile_size(segments, k)
    columns = [jnp.pad(x.T, ((0, size), (0, 0))) for x in (a, b)]

    def tiles(first: jax.Array) -> list[jax.Array]:
        blocks = jnp.minimum(first + jnp.arange(size), k - 1) // SCALE_BLOCK
        scales = (jnp.take(x, blocks, axis=0) for x in (sa, sb))
        rows = (lax.dynamic_slice_in_dim(x, first, size).astype(jnp.float32) for x in columns)
        return [x * scale for x, scale in zip(rows, scales, strict=True)]

    return [finish(_k_grouped(segments, k, m, n, tiles), c, out_dtype)]


def per_column(scales: jax.Array, n: int) -> jax.Array:
    """[.., kb, n] of scales [.., kb, nb] of 128 columns each."""
    return jnp.repeat(scales, SCALE_BLOCK, axis=-1)[..., :n]


def k_grouped_bf16_gemm(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    c: jax.Array | None = None,
    *,
    rows_format: str,
    num_groups: int,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[C + D [g, m, n]] of a [k, m], b [k, n]; segment i is group i."""
    (k, m), n = a.shape, b.shape[1]
    segments = take_groups(read(group_sizes, rows_format, k), group_offset, num_groups)
    size = _tile_size(segments, k)
    padded = [jnp.pad(x, ((0, size), (0, 0))) for x in (a, b)]

    def tiles(first: jax.Array) -> list[jax.Array]:
        return [lax.dynamic_slice_in_dim(x, first, size).astype(jnp.float32) for x in padded]

    return [finish(_k_grouped(segments, k, m, n, tiles), c, out_dtype)]


def k_masked_bf16_gemm(
    a: jax.Array, b: jax.Array, counts: jax.Array, *, out_dtype: Any, **_: Any
) -> list[jax.Array]:
    """[D [g, m, n]] of a [g, k, m], b [g, k, n]: rows from counts[g] on do not count."""

    def group(args: tuple[jax.Array, ...]) -> jax.Array:
        a, b, count = args
        left, right = (_masked(count, x.shape[0], x.astype(jnp.float32)) for x in (a, b))
        return dot(left, right, 0, 0).astype(out_dtype)

    return [lax.map(group, (a, b, counts))]
