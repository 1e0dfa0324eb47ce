"""Products of FP8 or bfloat16 rows and FP4 weights as ops: those of ops/gemm and ops/grouped, slabs for B.

Slabs are not recut: devices have whole ones, so that n is cut at multiples of 64 and k at multiples of 128.
Those of NVFP4 are longer; the ops of bfloat16 rows know them by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.gemm.op import BF16_GEMM
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import segments
from jax_deepgemm.ops.grouped.op import M_GROUPED_BF16, M_MASKED_BF16
from jax_deepgemm.ops.mixed import prepare, reference
from jax_deepgemm.ops.quantize.slabs import COLUMNS, ROWS

GRADIENT_HINT = (
    "Quantised operands have no useful derivative. Use jax_deepgemm.grouped_linear or jax_deepgemm.moe, "
    "which quantise inside and have gradients of the rows, or jax.lax.stop_gradient."
)
_GRIDS: dict[str, Any] = {
    "blocks": {"kb": ("k", SCALE_BLOCK), "ns": ("n", ROWS), "ks": ("k", COLUMNS)},
    "edges": ("ns", "ks"),
}
_KERNELS = "jax_deepgemm.ops.mixed.kernel"

Recut = tuple[tuple[jax.Array, ...], dict[str, Any]]


def _n(slabs: tuple[int, ...]) -> int:
    return slabs[-3] * ROWS


def recut_m_grouped(plan: ShardingPlan, *arrays: jax.Array, rows_format: str, **_: Any) -> Recut:
    """m: my rows' part of each group. g: I have the groups from an offset on."""
    *operands, group_sizes, group_offset = arrays
    if plan.cut("m"):
        mine = plan.size["m"], plan.offset("m"), plan.local_size("m")
        group_sizes = segments.window(group_sizes, rows_format, *mine)
    if plan.cut("g"):
        group_offset = group_offset + plan.offset("g")
    return (*operands, group_sizes, group_offset), {}


def _recut_masked(plan: ShardingPlan, *arrays: jax.Array, **_: Any) -> Recut:
    *operands, counts = arrays
    if plan.cut("m"):
        counts = jnp.clip(counts, 0, plan.size["m"]) - plan.offset("m")
    return (*operands, counts), {}


MIXED_FP8_GEMM: Op = Op(
    "mixed_fp8_gemm",
    "m k, m kb, ns ks z -> m n",
    lambda a, scales, slabs, *, out_dtype, **_: [((a[0], _n(slabs)), out_dtype)],
    reference.mixed_fp8_gemm,
    reduces=("k",),
    kernel=LazyKernel(_KERNELS, "mixed_gemm"),
    kernel_prepare=prepare.mixed_fp8,
    grad_hint=GRADIENT_HINT,
    **_GRIDS,
)
M_GROUPED_MIXED_FP8_GEMM: Op = Op(
    "m_grouped_mixed_fp8_gemm",
    "m k, m kb, g ns ks z, s, o -> m n",
    lambda a, scales, slabs, *_, out_dtype, **__: [((a[0], _n(slabs)), out_dtype)],
    reference.m_grouped_mixed_fp8_gemm,
    reduces=("k", "g"),
    kernel=LazyKernel(_KERNELS, "m_grouped_mixed_gemm", batched=True),
    recut=recut_m_grouped,
    kernel_prepare=prepare.m_grouped_mixed_fp8,
    grad_hint=GRADIENT_HINT,
    **_GRIDS,
)
M_MASKED_MIXED_FP8_GEMM: Op = Op(
    "m_masked_mixed_fp8_gemm",
    "g m k, g m kb, g ns ks z, g -> g m n",
    lambda a, scales, slabs, *_, out_dtype, **__: [((*a[:2], _n(slabs)), out_dtype)],
    reference.m_masked_mixed_fp8_gemm,
    reduces=("k",),
    kernel=LazyKernel(_KERNELS, "m_masked_mixed_gemm", batched=True),
    recut=_recut_masked,
    kernel_prepare=prepare.m_masked_mixed_fp8,
    grad_hint=GRADIENT_HINT,
    **_GRIDS,
)

# bfloat16 rows: their derivatives are those of products with the weight in bfloat16


def _derivatives(mixed: Callable[[], Op], plain: Op, **form: str) -> dict[str, Any]:
    """Of a product that is linear in its rows; plain: the product of a weight in bfloat16 [.., n, k]."""

    def jvp(primals: list[Any], tangents: list[Any], **params: Any) -> list[jax.Array]:
        return mixed()(tangents[0], *primals[1:], **params)

    def transpose(index: int, cotangents: list[jax.Array], operands: list[Any], **params: Any) -> jax.Array:
        rows, slabs, *groups = operands
        weight = reference.rounded(slabs, rows.shape[-1])
        assert plain.transpose is not None
        return plain.transpose(index, cotangents, [rows, weight, *groups], **params, **form)

    return {"jvp": jvp, "transpose": transpose}


_BF16: dict[str, Any] = {
    "blocks": {"ns": ("n", ROWS), "ks": ("k", COLUMNS)},
    "edges": ("ns", "ks"),
}
MIXED_BF16_GEMM: Op = Op(
    "mixed_bf16_gemm",
    "m k, ns ks z -> m n",
    lambda a, slabs, *, out_dtype, **_: [((a[0], _n(slabs)), out_dtype)],
    reference.mixed_bf16_gemm,
    reduces=("k",),
    kernel=LazyKernel(_KERNELS, "mixed_bf16_gemm"),
    kernel_prepare=prepare.mixed_bf16,
    **_derivatives(lambda: MIXED_BF16_GEMM, BF16_GEMM["nt"], layout="nt"),
    **_BF16,
)
M_GROUPED_MIXED_BF16_GEMM: Op = Op(
    "m_grouped_mixed_bf16_gemm",
    "m k, g ns ks z, s, o -> m n",
    lambda a, slabs, *_, out_dtype, **__: [((a[0], _n(slabs)), out_dtype)],
    reference.m_grouped_mixed_bf16_gemm,
    reduces=("k", "g"),
    kernel=LazyKernel(_KERNELS, "m_grouped_mixed_bf16_gemm", batched=True),
    recut=recut_m_grouped,
    kernel_prepare=prepare.m_grouped_mixed_bf16,
    **_derivatives(lambda: M_GROUPED_MIXED_BF16_GEMM, M_GROUPED_BF16["nt"]),
    **_BF16,
)
M_MASKED_MIXED_BF16_GEMM: Op = Op(
    "m_masked_mixed_bf16_gemm",
    "g m k, g ns ks z, g -> g m n",
    lambda a, slabs, *_, out_dtype, **__: [((*a[:2], _n(slabs)), out_dtype)],
    reference.m_masked_mixed_bf16_gemm,
    reduces=("k",),
    kernel=LazyKernel(_KERNELS, "m_masked_mixed_bf16_gemm", batched=True),
    recut=_recut_masked,
    kernel_prepare=prepare.m_masked_mixed_bf16,
    **_derivatives(lambda: M_MASKED_MIXED_BF16_GEMM, M_MASKED_BF16["nt"]),
    **_BF16,
)
