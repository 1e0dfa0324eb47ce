"""Products of FP8 or BF16 rows and FP4 weights as ops: those of ops/gemm and ops/grouped with slabs for B.

Slabs are not recut: devices have whole ones, so that n is cut at multiples of 64 and k at multiples of 128.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import segments
from jax_deepgemm.ops.mixed import prepare, reference
from jax_deepgemm.ops.quantize.slabs import COLUMNS, ROWS

KINDS = ("fp8", "bf16")
"""Of rows: e4m3 with scales of 1x128, or bfloat16."""
GRADIENT_HINTS = {
    "fp8": "Quantised operands have no useful derivative. Use jax_deepgemm.grouped_linear or jax_deepgemm."
    "moe, which quantise inside and have gradients of the rows, or jax.lax.stop_gradient.",
    "bf16": "Products of bfloat16 with FP4 weights have no derivative. Take the weight's numbers, which "
    "bfloat16 holds exactly: dequantize_fp4(w.fp4(k), jnp.bfloat16), or jax.lax.stop_gradient.",
}
_BLOCKS = {"kb": ("k", SCALE_BLOCK), "ns": ("n", ROWS), "ks": ("k", COLUMNS)}
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


def _op(kind: str, name: str, rows: str, rule: str, reduces: tuple[str, ...], **more: Any) -> Op:
    """rows: dimensions of rows in front of k."""
    left = f"{rows} k, {rows} kb" if kind == "fp8" else f"{rows} k"
    lead = len(rows.split())
    return Op(
        f"{name}_{kind}_gemm",
        f"{left}, {rule}",
        lambda *shapes, out_dtype, **_: [
            ((*shapes[0][:lead], _n(shapes[2 if kind == "fp8" else 1])), out_dtype)
        ],
        getattr(reference, f"{name}_{kind}_gemm"),
        reduces=reduces,
        blocks={grid: data for grid, data in _BLOCKS.items() if grid != "kb" or kind == "fp8"},
        edges=("ns", "ks"),
        kernel_prepare=getattr(prepare, name),
        grad_hint=GRADIENT_HINTS[kind],
        **more,
    )


def _kernel(kind: str, name: str, batched: bool) -> LazyKernel:
    return LazyKernel(_KERNELS, f"{name}_gemm" if kind == "fp8" else f"{name}_bf16_gemm", batched=batched)


MIXED: dict[str, Op] = {
    kind: _op(kind, "mixed", "m", "ns ks z -> m n", ("k",), kernel=_kernel(kind, "mixed", False))
    for kind in KINDS
}
M_GROUPED_MIXED: dict[str, Op] = {
    kind: _op(
        kind,
        "m_grouped_mixed",
        "m",
        "g ns ks z, s, o -> m n",
        ("k", "g"),
        recut=recut_m_grouped,
        kernel=_kernel(kind, "m_grouped_mixed", True),
    )
    for kind in KINDS
}
M_MASKED_MIXED: dict[str, Op] = {
    kind: _op(
        kind,
        "m_masked_mixed",
        "g m",
        "g ns ks z, g -> g m n",
        ("k",),
        recut=_recut_masked,
        kernel=_kernel(kind, "m_masked_mixed", True),
    )
    for kind in KINDS
}
