"""What each row has of its group's, in plain jnp and as an op that has derivatives in a fixed order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.op import Op
from jax_deepgemm.ops.gemm.checks import FLOAT32
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped import segments

_ONES = 16  # columns of ones, of which one is needed: what the kernels read are rows of whole 16 bytes


def rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
    """[m, n] of x [g, n]: the row of each one's group; zeros where the index is negative."""
    behind = jnp.where(index < 0, x.shape[0], index)
    return jnp.take(x, behind, axis=0, mode="fill", fill_value=0)


def _reference(
    like: jax.Array, x: jax.Array, group_sizes: jax.Array, group_offset: jax.Array, **params: Any
) -> list[jax.Array]:
    index = segments.by_index(group_sizes, params["rows_format"], like.shape[0], group_offset, x.shape[0])
    return [rows_of(x, index)]


def _jvp(primals: list[Any], tangents: list[Any], **params: Any) -> list[jax.Array]:
    like, _, *where = primals
    return GROUP_ROWS(like, tangents[1], *where, **params)


def _transpose(
    index: int, cotangents: list[jax.Array], values: list[Any], *, rows_format: str, **_: Any
) -> jax.Array:
    """Sums over each group's rows, as a weight's gradient is made: of bfloat16, in float32."""
    assert index == 1
    (dd,), wanted, (group_sizes, group_offset) = cotangents, values[1], values[2:]
    groups = wanted.shape[0]
    if rows_format == "segments":
        group_sizes = segments.by_group(group_sizes, rows_format, dd.shape[0], group_offset, groups)
        group_offset = jnp.zeros_like(group_offset)
    ones = jnp.ones_like(dd, jnp.bfloat16, shape=(dd.shape[0], _ONES))
    spec = wanted.out_sharding
    [sums] = ops.K_GROUPED_BF16(
        ones,
        dd.astype(jnp.bfloat16),
        group_sizes,
        group_offset,
        rows_format=rows_format,
        num_groups=groups,
        out_dtype=FLOAT32,
        out_sharding=None if spec is None else jax.sharding.PartitionSpec(spec[0], None, spec[1]),
    )
    return sums[:, 0]


GROUP_ROWS = Op(
    "m_grouped_group_rows",
    "m n, g n, s, o -> m n",
    lambda like, *_, **__: [(like, np.dtype(np.float32))],
    _reference,
    reduces=("g",),
    recut=ops.recut_m_grouped,
    jvp=_jvp,
    transpose=_transpose,
)
"""float32 [m, n] of x [g, n], like an array [m, n] of which nothing counts but its type."""
