"""The grouped product of bfloat16 rows and weights with a scale a channel: the op, its reference, and what
`ragged_dot` and `grouped_linear` call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.gemm.checks import Options
from jax_deepgemm.ops.gemm.reference import dot
from jax_deepgemm.ops.grouped import checks, segments
from jax_deepgemm.ops.grouped.prepare import fold_m_grouped
from jax_deepgemm.ops.grouped.reference import m_grouped_of
from jax_deepgemm.ops.mixed.op import recut_m_grouped
from jax_deepgemm.ops.quantize.per_channel import PerChannelArray, checked

_BFLOAT16 = np.dtype(jnp.bfloat16)
_STEP_K, _STEP_N = 8, 16
"""Rows of a and of w must be whole 16 bytes for the kernel's loads."""


def _reference(
    a: jax.Array,
    scales: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    out_dtype: Any,
    **_: Any,
) -> list[jax.Array]:
    """[D [m, n]] of a [m, k], scales [g, n], w [g, k, n]."""

    def product(rows: jax.Array, first: jax.Array, group: jax.Array) -> jax.Array:
        numbers = dot(rows.astype(jnp.float32), w[group].astype(jnp.float32), 1, 0)
        return numbers * scales[group].astype(jnp.float32)[None]

    found = segments.read(group_sizes, rows_format, a.shape[0])
    return [m_grouped_of(a, found, group_offset, w.shape[0], w.shape[2], product).astype(out_dtype)]


def _prepare(
    a: jax.Array,
    scales: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    rows_format: str,
    **_: Any,
) -> Sequence[jax.Array]:
    (a,), (w, scales), group_sizes, group_offset = fold_m_grouped(
        (a,), (w, scales[..., None]), group_sizes, group_offset, rows_format
    )
    return a, scales[..., 0], w, group_sizes, group_offset


M_GROUPED_PER_CHANNEL_GEMM: Op = Op(
    "m_grouped_per_channel_gemm",
    "m k, g n, g k n, s, o -> m n",
    lambda a, scales, w, *_, out_dtype, **__: [((a[0], w[2]), out_dtype)],
    _reference,
    reduces=("k", "g"),
    recut=recut_m_grouped,
    kernel=LazyKernel("jax_deepgemm.ops.mixed.kernel", "m_grouped_mixed_gemm", batched=True),
    kernel_prepare=_prepare,
    grad_hint=(
        "Weights with a scale a channel are for inference. Use dequantize_per_channel(w, jnp.bfloat16), "
        "whose products have gradients, or jax.lax.stop_gradient."
    ),
)


def contiguous(
    op: str,
    rows_name: str,
    a: Any,
    name: str,
    given: Any,
    rows: checks.Rows,
    expected_m: Any,
    options: Options,
) -> jax.Array:
    """D [m, n] of a bfloat16 [m, k] and w [g, k, n]; names are those of the caller's arguments."""
    w = checked(op, name, given)
    _check(op, rows_name, a, name, w)
    where = checks.check_rows(op, rows, a.shape[0], w.shape[0])
    hint = checks.check_expected_m(op, expected_m)
    if 0 in (*a.shape, *w.shape):
        return jnp.zeros((a.shape[0], w.shape[2]), options.out_dtype)
    arrays = (a, w.scales, w.values, where.group_sizes, where.group_offset)
    form: dict[str, Any] = {"rows_format": where.rows_format, "expected_m": hint}
    return M_GROUPED_PER_CHANNEL_GEMM(*arrays, **form, **vars(options))[0]


def _check(op: str, rows_name: str, a: jax.Array, name: str, w: PerChannelArray) -> None:
    if np.dtype(a.dtype) != _BFLOAT16:
        raise TypeError(
            f"{op}: {rows_name} is {a.dtype.name} {list(a.shape)} and {name} has a scale a channel, need "
            f"bfloat16 rows: {rows_name}.astype(jnp.bfloat16)."
        )
    if a.ndim != 2 or len(w.shape) != 3 or a.shape[1] != w.shape[1]:
        raise ValueError(
            f"{op}: {rows_name} is {list(a.shape)} and {name} is {list(w.shape)}, need [m, k] and [g, k, n] "
            "of equal k. Use jax.vmap for leading batch dimensions."
        )
    if a.shape[1] % _STEP_K or w.shape[2] % _STEP_N:
        raise ValueError(
            f"{op}: {rows_name} is {list(a.shape)} and {name} is {list(w.shape)}, need k a multiple of "
            f"{_STEP_K} and n of {_STEP_N}, whole 16 bytes of a row. Pad them with zeros, the weight once: "
            "jnp.pad changes no product."
        )
