"""The chain as an op. Each token is computed by itself, so tokens are cut freely; weights are whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import pieces_of_whole
from jax_deepgemm.ops.dispatch import reference as dispatch
from jax_deepgemm.ops.gemm.checks import PER_ROW
from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis
from jax_deepgemm.ops.grouped import gated
from jax_deepgemm.ops.grouped import reference as grouped
from jax_deepgemm.ops.grouped.op import FP8_GRADIENT_HINT
from jax_deepgemm.ops.quantize import reference as quantize
from jax_deepgemm.ops.rows import reference as rows

E4M3 = np.dtype(jnp.float8_e4m3fn)


def _reference(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: jax.Array,
    w13_scales: jax.Array,
    w2: jax.Array,
    w2_scales: jax.Array,
    **_: Any,
) -> list[jax.Array]:
    """The references of the parts in a row."""
    sizes, source, position = dispatch.plan(ids, experts=w13.shape[0])
    wide = rows.take(quantize.exact_float32(x), source // max(ids.shape[1], 1))[0]
    row_weights = rows.take(weights.reshape(-1), source)[0]
    a = quantize.quantize_float32(wide, block=PER_ROW, dtype=E4M3, scale_format="f32")
    here, form = jnp.zeros(1, jnp.int32), "sizes"
    act, scales = gated.M_GROUPED.reference(*a, w13, w13_scales, row_weights, sizes, here, rows_format=form)
    [y] = grouped.m_grouped_fp8_gemm(
        act, scales, w2, w2_scales, sizes, here, rows_format=form, out_dtype=x.dtype
    )
    return rows.sums(y, position)


def _prepared(*arrays: jax.Array, **_: Any) -> Sequence[jax.Array]:
    """Scales of w2 in whole 16 bytes."""
    *others, w2_scales = arrays
    return *others, pad_axis("experts: scales of w2", w2_scales, -1, ROW_BYTES // 4)


def _result(x: Dims, ids: Dims, *_: Dims, out_dtype: Any, **__: Any) -> list[tuple[Dims, Any]]:
    return [(x, out_dtype)]


LAYER = Op(
    "experts_fp8",
    "t h, t s, t u, g n k, g a b, g d f, g c e -> t o",
    _result,
    _reference,
    spmd=pieces_of_whole("o"),
    kernel=LazyKernel("jax_deepgemm.ops.experts.kernel", "layer"),
    kernel_prepare=_prepared,
    grad_hint=FP8_GRADIENT_HINT.replace("grouped_linear", "moe.moe_mlp"),
)
