"""The three grouped GEMMs of FP8 training and the operands they take, as grouped_linear and the MoE layers
share them.

    y  = rows @ w[group].T     rows 1x128 along k,      w 128x128
    dx = dy @ w[group]         dy 1x128 along n,        the transposed bytes of the same FP8 weight
    dw = dy.T @ rows           both 1x128 along rows,   accumulated in float32

With weight_gradient "128x128" rows have one scale for 128 rows and 128 features in the last product (stored
[g, k, n], dw = rows.T @ dy, and dy has them): it then runs as fast as the others.

Blocks of 128 rows begin with each group (quantize/blocks.py) where a device surely has all the rows: then no
expert's scales depend on another's tokens, and the product that sums over rows walks over whole blocks. Where
rows are, or may be, cut over devices by XLA, blocks are those of all rows, 0-127, 128-255, ..

What is kept for the backward pass is kept as bytes: jax.checkpoint passes what it saves through
reduce_precision, which knows no largest exponent with numbers in it, so float8_e4m3fn values from 256 on
would come back as infinities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jax_deepgemm.core.op import mesh_of
from jax_deepgemm.core.prefix import prefix_ends
from jax_deepgemm.ops.gemm.checks import BLOCKED, FLOAT32, PER_ROW, Options
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped.api import k_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_contiguous
from jax_deepgemm.ops.grouped.checks import as_int32, check_offset
from jax_deepgemm.ops.quantize import PreparedFp4, PreparedWeight, QuantizedArray, expand_fp4, quantize
from jax_deepgemm.ops.quantize.array import Block
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.quantize.fused import PER_COLUMN, SQUARE, quantize_both
from jax_deepgemm.ops.quantize.groups import quantize_groups
from jax_deepgemm.ops.quantize.prepared import Bits, Copies

E4M3 = np.dtype(jnp.float8_e4m3fn)
RECIPES = ("fp8", "bf16")
WEIGHT_LAYOUTS = ("nk", "kn")

Frozen: TypeAlias = QuantizedArray | PreparedFp4
"""A weight without a gradient, [g, n, k]."""
Kept: TypeAlias = tuple[jax.Array, jax.Array] | PreparedFp4
"""What of a frozen weight waits for the backward pass: bytes and scales, or slabs."""

HIGHER_ORDER = "recipe='bf16'"
"""What has the derivatives that FP8 lacks, for errors."""


class AlongRows(NamedTuple):
    """Rows quantised and stored as the weight gradient wants them.

    values [features, columns] in FP8; scales float32 [columns / 128, features], one per 128 rows and feature,
    or [columns / 128, ceil(features / 128)]. Columns are the rows, or with LayerOptions.group_blocks those of
    row blocks.
    """

    values: jax.Array
    scales: jax.Array


class Groups(NamedTuple):
    """Which rows belong to which weight: int32 group_sizes of all groups, and [1] the group of weight 0."""

    sizes: jax.Array
    offset: jax.Array

    @classmethod
    def of(cls, group_sizes: jax.Array, group_offset: Any) -> Groups:
        sizes = as_int32("grouped", "group_sizes", group_sizes, "[g]")
        return cls(sizes, check_offset("grouped", group_offset))

    def end(self, rows: int) -> jax.Array:
        """int32 [1]: the first row behind all groups."""
        return prefix_ends(self.sizes, rows)[-1:]


@dataclass(frozen=True)
class LayerOptions:
    """What of the three GEMMs is static."""

    expected_m: int | None = None
    num_sms: int | None = None
    reduce_dtype: np.dtype[Any] = FLOAT32
    group_blocks: bool = True
    """Whether blocks of 128 rows begin with each group."""
    weight_layout: str = "nk"
    """How masters, their gradients and prepared weights are stored: [g, n, k] or [g, k, n]."""
    scale_format: str = "f32"
    """Of what the layer quantises: "f32", or "ue8m0" for powers of two."""
    weight_gradient: str = "1x128"
    """Elements that share a scale in the operand whose features are the gradient's last dimension: see
    `block_along_rows`."""

    def block_along_rows(self, of: str) -> Block:
        """What shares a scale in the transposed copy of "x" or "dy": one of them has blocks of 128x128, where
        the kernel for them may be used."""
        last = "x" if self.weight_layout == "nk" else "dy"
        square = self.weight_gradient == "128x128" and self.group_blocks and of == last
        return SQUARE if square else PER_COLUMN


def rows_are_whole(rows: jax.Array) -> bool:
    """Whether a function surely runs on one device's rows: in jax.shard_map, or where there is one device.

    Elsewhere XLA may cut them over a mesh. Under plain jit in a process of several devices that cannot be
    seen when a function is traced.
    """
    mesh = mesh_of([jax.typeof(rows)])
    if mesh.empty:
        return jax.device_count() == 1
    return all(mesh.shape[name] == 1 or name in mesh.manual_axes for name in mesh.axis_names)


def both(
    x: jax.Array, groups: Groups, options: LayerOptions, of: str, index: jax.Array | None = None
) -> tuple[QuantizedArray, AlongRows]:
    """Rows quantised along features, and along rows and transposed; those behind the last group are zeros.

    The rows are those of x [rows, features], or with an index (group_blocks only) x[index]. of: "x", or "dy"
    where x is a gradient.
    """
    if options.group_blocks:
        blocks = row_blocks(groups.sizes, x.shape[0] if index is None else index.shape[0])
        form: dict[str, Any] = {"block_t": options.block_along_rows(of), "scale_format": options.scale_format}
        values, scales, *along_rows = quantize_groups(x, blocks, index, **form)
    else:
        assert index is None
        end = groups.end(x.shape[0])
        values, scales, *along_rows = quantize_both(x, end, scale_format=options.scale_format)
    return QuantizedArray(values, scales, PER_ROW), AlongRows(*along_rows)


def counted(groups: Groups, rows: int, options: LayerOptions, of: str, transposed: bool) -> dict[str, Any]:
    """Arguments of swiglu_quantize (of "x") and its gradient ("dy"): which rows count, and whether and how
    they are transposed."""
    form: dict[str, Any] = {"scale_format": options.scale_format}
    if transposed and options.group_blocks:
        return form | {"blocks": row_blocks(groups.sizes, rows), "block_t": options.block_along_rows(of)}
    return form | {"rows": groups.end(rows), "transposed": transposed}


def transposed(w: QuantizedArray) -> QuantizedArray:
    """The transpose of a frozen weight: a copy of its bytes."""
    return QuantizedArray(w.values.mT, w.scales.mT, (w.block[1], w.block[0]))


def keep_frozen(w: Frozen, name: str) -> Kept:
    """A frozen weight for the backward pass, under a checkpoint_name."""
    if isinstance(w, PreparedFp4):
        return replace(w, slabs=checkpoint_name(w.slabs, name))
    return keep(w.values, w.scales, name)


def frozen_transposed(held: Kept, dtype: Any, k: int) -> QuantizedArray:
    """[g, k, n] of what was kept, as the product of the input gradient reads it; an FP4 weight expanded."""
    if isinstance(held, PreparedFp4):
        return transposed(expand_fp4(held, k=k))
    return transposed(QuantizedArray(*kept(held, dtype), BLOCKED))


def forward_weight(w: jax.Array | PreparedWeight | Frozen, options: LayerOptions) -> Any:
    """[g, n, k]: a master weight quantised, a prepared or frozen one as it is."""
    if isinstance(w, Frozen):
        return w
    if isinstance(w, PreparedWeight):
        return w.quantized if options.weight_layout == "nk" else w.transposed
    if options.weight_layout == "nk":
        return quantize(w, BLOCKED, scale_format=options.scale_format)
    return Copies.of(w, options.scale_format).transposed.meant  # the pass that quantises transposes too


def both_weights(
    w: jax.Array, copies: Copies | None, options: LayerOptions, name: str
) -> tuple[QuantizedArray, Bits]:
    """A weight as the forward GEMM reads it, [g, n, k], and as that of the input gradient does, [g, k, n].

    copies: of a prepared weight, or None; those that are made here wait under a checkpoint_name.
    """
    made = copies is None
    plain, transposed = Copies.of(w, options.scale_format) if copies is None else copies
    forth, back = (plain, transposed) if options.weight_layout == "nk" else (transposed, plain)
    return forth.meant, Bits(*(checkpoint_name(part, name) for part in back)) if made else back


def m_grouped(
    rows: QuantizedArray,
    w: Frozen,
    groups: Groups,
    options: LayerOptions,
    out_dtype: Any,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """rows [m, k] @ w[group of the row] [n, k].T."""
    return m_grouped_fp8_gemm_nt_contiguous(
        rows,
        w,
        groups.sizes,
        group_offset=groups.offset,
        expected_m=options.expected_m,
        out_dtype=out_dtype,
        out_sharding=out_sharding,
        reduce_dtype=_reduce_dtype(options, out_dtype),
        num_sms=options.num_sms,
    )


def k_grouped(
    dy: AlongRows,
    x: AlongRows,
    groups: Groups,
    rows: int,
    num_groups: int,
    options: LayerOptions,
    out_dtype: Any,
    out_sharding: PartitionSpec | None = None,
    c: jax.Array | None = None,
) -> jax.Array:
    """C plus the sum over each group's rows of dy [row, n] * x [row, k], stored as the weights are."""
    pair = (dy, x) if options.weight_layout == "nk" else (x, dy)
    if options.group_blocks:
        return _k_grouped_blocks(*pair, groups, rows, num_groups, options, out_dtype, out_sharding, c)
    a, b = (QuantizedArray(q.values, q.scales.T, PER_ROW) for q in pair)
    return k_grouped_fp8_gemm_nt_contiguous(
        a,
        b,
        groups.sizes,
        c,
        num_groups=num_groups,
        group_offset=groups.offset,
        out_dtype=out_dtype,
        out_sharding=out_sharding,
        reduce_dtype=_reduce_dtype(options, out_dtype),
        num_sms=options.num_sms,
    )


def _k_grouped_blocks(
    a: AlongRows,
    b: AlongRows,
    groups: Groups,
    rows: int,
    num_groups: int,
    options: LayerOptions,
    out_dtype: Any,
    out_sharding: PartitionSpec | None,
    c: jax.Array | None,
) -> jax.Array:
    """The same of operands whose groups begin with a block, for the kernel that knows it."""
    dtype = np.dtype(out_dtype)
    form = Options(dtype, _reduce_dtype(options, dtype), out_sharding, None, options.num_sms)
    if 0 in (a.values.shape[0], b.values.shape[0], rows):
        return ops.empty_products("mk,nk->mn", a.values, b.values, c, num_groups, form)
    if b.scales.shape[1] == b.values.shape[0]:
        run = ops.K_GROUPED_FP8 if c is None else ops.K_GROUPED_FP8_ADD
    else:
        run = ops.K_GROUPED_FP8_BLOCK if c is None else ops.K_GROUPED_FP8_BLOCK_ADD
    sizes = jnp.diff(prefix_ends(groups.sizes, rows), prepend=0)
    arrays = (a.values, a.scales, b.values, b.scales, sizes, groups.offset, *(() if c is None else (c,)))
    return run(*arrays, rows_format="blocks", num_groups=num_groups, **vars(form))[0]


def _reduce_dtype(options: LayerOptions, out_dtype: Any) -> np.dtype[Any]:
    return options.reduce_dtype if options.reduce_dtype == np.dtype(out_dtype) else FLOAT32


def keep(values: jax.Array, scales: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """FP8 values as bytes, and their scales, under a checkpoint_name."""
    return checkpoint_name(lax.bitcast_convert_type(values, jnp.uint8), name), checkpoint_name(scales, name)


def kept(pair: tuple[jax.Array, jax.Array], dtype: Any = E4M3) -> tuple[jax.Array, jax.Array]:
    """The inverse of `keep`."""
    return lax.bitcast_convert_type(pair[0], dtype), pair[1]
