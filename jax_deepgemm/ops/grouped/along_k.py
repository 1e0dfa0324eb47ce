"""What the API of grouped FP8 products does with operands along k: brings k behind, and calls the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.log import note_once
from jax_deepgemm.ops.gemm.checks import Options, Quantized
from jax_deepgemm.ops.grouped import checks
from jax_deepgemm.ops.grouped import op as ops


def k_last(op: str, name: str, x: Quantized, way_out: str) -> jax.Array:
    """The values with k as their last dimension."""
    note_once(
        f"{op}: {name} {list(x.values.shape)}: FP8 tensor cores read along k, which is not the last "
        f"dimension, so the bytes are transposed at each call. {way_out}"
    )
    return jnp.swapaxes(x.values, -1, -2)


def k_grouped_fp8(
    op: str, layout: str, a: Any, b: Any, c: Any, groups: tuple[Any, ...], options: Options
) -> jax.Array:
    left, right, (m, n, k) = checks.check_fp8(op, checks.k_grouped_sides(layout), a, b)
    where, count = checks.check_k_groups(op, *groups)
    addend = checks.check_c(op, c, (count, m, n), options.out_dtype)
    if 0 in (m, n, k):
        subscripts = "mk,nk->mn" if layout == "nt" else "km,kn->mn"
        return ops.empty_products(subscripts, left.values, right.values, addend, count, options)
    pair = []
    for name, x in (("a", left), ("b", right)):
        if layout == "tn":
            way_out = f"Quantise the transposed matrix and use {op.replace('tn', 'nt')} to avoid the pass."
            pair += [k_last(op, name, x, way_out), x.scales]
        else:
            pair += [x.values, x.scales.T]
    run = ops.K_GROUPED_FP8 if addend is None else ops.K_GROUPED_FP8_ADD
    arrays = (*pair, where.group_sizes, where.group_offset, *(() if addend is None else (addend,)))
    return run(*arrays, rows_format=where.rows_format, num_groups=count, **vars(options))[0]
