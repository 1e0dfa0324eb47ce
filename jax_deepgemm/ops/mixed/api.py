"""What `fp8_gemm_nt`, `m_grouped_fp8_gemm_nt_contiguous`, `m_grouped_fp8_gemm_nt_masked`, and those of bf16
of like names, call for an FP4 weight (`PreparedFp4.products`); their docstrings say what users need to know.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.gemm.checks import (
    Options,
    Side,
    check_fp8_parts,
    describe,
    quantized,
    sides,
)
from jax_deepgemm.ops.grouped import checks
from jax_deepgemm.ops.mixed import op as ops
from jax_deepgemm.ops.mixed.family import FAMILY
from jax_deepgemm.ops.quantize.prepared_fp4 import NO_FP8, PreparedFp4
from jax_deepgemm.ops.quantize.slabs import COLUMNS


def config_type() -> type[Any]:
    """Of what the products take as `config=`."""
    found = FAMILY.kernels_of("9.0a").config
    assert found is not None
    return found


def dense(op: str, a: Any, w: PreparedFp4, c: Any, options: Options) -> jax.Array:
    """D [m, n] of a [m, k] and w [n, k]."""
    if c is not None:
        raise ValueError(
            f"{op}: c is {describe(c)} and b is a PreparedFp4, need c=None: products with FP4 weights add no "
            f"C. Add it to the result: {op}(a, b) + c."
        )
    rows = _checked(op, sides("nt"), a, w)
    if 0 in (*rows[0].shape, *w.slabs.shape):
        return _empty((rows[0].shape[0], w.shape[-2]), options)
    run = ops.MIXED_FP8_GEMM if len(rows) > 1 else ops.MIXED_BF16_GEMM
    return run(*rows, w.slabs, **vars(options))[0]


def contiguous(
    op: str, a: Any, w: PreparedFp4, rows: checks.Rows, expected_m: Any, options: Options
) -> jax.Array:
    """D [m, n] of a [m, k] and w [g, n, k]."""
    left = _checked(op, checks.m_grouped_sides("nt"), a, w)
    m, groups = left[0].shape[0], w.shape[0]
    where = checks.check_rows(op, rows, m, groups)
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (*left[0].shape, *w.slabs.shape):
        return _empty((m, w.shape[-2]), options)
    run = ops.M_GROUPED_MIXED_FP8_GEMM if len(left) > 1 else ops.M_GROUPED_MIXED_BF16_GEMM
    form: dict[str, Any] = {"rows_format": where.rows_format, "expected_m": hint}
    return run(*left, w.slabs, where.group_sizes, where.group_offset, **form, **vars(options))[0]


def masked(op: str, a: Any, w: PreparedFp4, masked_m: Any, hints: Any, options: Options) -> jax.Array:
    """D [g, m, n] of a [g, m, k] and w [g, n, k]; hints: zero_rows and expected_m, checked."""
    left = _checked(op, checks.masked_sides("nt"), a, w)
    counts = checks.check_masked_m(op, masked_m, w.shape[0])
    if 0 in (*left[0].shape, *w.slabs.shape):
        return _empty((*left[0].shape[:2], w.shape[-2]), options)
    run = ops.M_MASKED_MIXED_FP8_GEMM if len(left) > 1 else ops.M_MASKED_MIXED_BF16_GEMM
    return run(*left, w.slabs, counts, **hints, **vars(options))[0]


def _rows(op: str, side: Side, a: Any) -> tuple[jax.Array, ...]:
    """bfloat16 rows, or values and scales."""
    if op.startswith("fp8") or "_fp8_" in op:
        left = quantized(op, check_fp8_parts(op, side, a))
        return left.values, left.scales
    x = unwrapped(a)
    if getattr(x, "dtype", None) != jnp.bfloat16 or x.ndim != len(side.lead) + 2:
        raise TypeError(f"{op}: a is {describe(x)}, need bfloat16 {side.dims}: a.astype(jnp.bfloat16).")
    return (jnp.asarray(x),)


def _checked(op: str, both: tuple[Side, Side], a: Any, w: PreparedFp4) -> tuple[jax.Array, ...]:
    """The rows, which fit the weight."""
    side_a, side_b = both
    left = _rows(op, side_a, a)
    w.check(op, "b")
    need = len(side_b.lead) + 2
    if w.ndim != need:
        more = w.ndim > need
        way_out = "Use jax.vmap for leading batch dimensions." if more else "Add one of size 1: b[None]."
        raise ValueError(f"{op}: b is {w!r}, need {need} dimensions {side_b.dims}. {way_out}")
    if len(left) > 1 and w.is_nvfp4:
        raise TypeError(
            f"{op}: a is FP8 and b is NVFP4, {w!r}. {NO_FP8} Use {op.replace('fp8', 'bf16')} with rows in "
            "bfloat16, whose products are exact, or quantise the weight anew: "
            "jax_deepgemm.quantize(dequantize_fp4(w.fp4(k)), (128, 128))."
        )
    if len(left) > 1 and left[0].dtype != w.activations:
        raise ValueError(
            f"{op}: values of a are {np.dtype(left[0].dtype).name} and b is prepared for "
            f"{w.activations.name}, need the same. Quantise a so: jax_deepgemm.quantize(a, (1, 128))."
        )
    shape = left[0].shape
    if side_b.lead and not w.shape[0]:
        raise ValueError(f"{op}: b is {w!r}: there are no groups; need at least one.")
    if side_a.lead and shape[0] != w.shape[0]:
        raise ValueError(
            f"{op}: a is {list(shape)} and b is {w!r}: the number of groups differs ({shape[0]} and "
            f"{w.shape[0]}). Every group needs its rows of a and its matrix of b."
        )
    if -(-shape[-1] // COLUMNS) != w.slabs.shape[-2]:
        raise ValueError(
            f"{op}: a is {list(shape)} {side_a.dims} and b is {w!r}: k is {shape[-1]}, and b has "
            f"{w.shape[-1] - COLUMNS + 1} to {w.shape[-1]}. Make both operands cover the same k."
        )
    return left


def _empty(shape: tuple[int, ...], options: Options) -> jax.Array:
    nothing = jnp.zeros(shape, options.out_dtype)
    if options.out_sharding is None:
        return nothing
    return jax.sharding.reshard(nothing, options.out_sharding)
