"""The grouped GEMMs as ops: shapes, sharding, derivatives, and what runs where.

Dimensions: m, n, k as in a GEMM; g groups that a device has; `group_sizes` (s entries) and
`group_offset` (o, one of them) say which rows are whose (segments.py). The sizes cover all groups there are,
and group i of this op is group i + offset of them. Rows of m-grouped results that belong to no group of the
op are zero, so results of devices that each have some groups are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.gemm.checks import B_BLOCKS, Options
from jax_deepgemm.ops.gemm.op import recut_blocks, scale_step
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import prepare, reference, segments

Recut = tuple[Sequence[jax.Array], dict[str, Any]]

FP8_GRADIENT_HINT = (
    "Quantised operands have no useful derivative. Use jax_deepgemm.grouped_linear, which quantises inside "
    "and has FP8 gradients, or jax.lax.stop_gradient."
)


def _kernel(name: str, **form: Any) -> LazyKernel:
    return LazyKernel("jax_deepgemm.ops.grouped.kernel", name, batched=True, **form)


def _blocks(rule: str, step: int = SCALE_BLOCK) -> dict[str, tuple[str, int]]:
    blocks = {"kb": ("k", step), "nb": ("n", step)}
    return {grid: data for grid, data in blocks.items() if grid in rule.replace(",", " ").split()}


# One device's piece


def recut_m_grouped(plan: ShardingPlan, *arrays: jax.Array, rows_format: str, **_: Any) -> Recut:
    """m: my rows' part of each group. g: I have the groups from an offset on."""
    *operands, group_sizes, group_offset = arrays
    if len(operands) == 4:
        operands = list(recut_blocks(plan, *operands))
    if plan.cut("m"):
        group_sizes = segments.window(
            group_sizes, rows_format, plan.size["m"], plan.offset("m"), plan.local_size("m")
        )
    if plan.cut("g"):
        group_offset = group_offset + plan.offset("g")
    return (*operands, group_sizes, group_offset), {}


def _recut_masked(rows: str) -> Callable[..., Recut]:
    def recut(plan: ShardingPlan, *arrays: jax.Array, **_: Any) -> Recut:
        *operands, counts = arrays
        if len(operands) == 4:
            operands = list(recut_blocks(plan, *operands))
        if plan.cut(rows):
            counts = jnp.clip(counts, 0, plan.size[rows]) - plan.offset(rows)
        return (*operands, counts), {}

    return recut


def _recut_k_grouped(
    plan: ShardingPlan, *arrays: jax.Array, rows_format: str, num_groups: int, **_: Any
) -> Recut:
    """k: my part of each group, shifted with its columns if they start inside a block. g: my results."""
    count = 4 if "kb" in plan.rule.blocks else 2
    operands, (group_sizes, group_offset, *c) = list(arrays[:count]), arrays[count:]
    changed: dict[str, Any] = {}
    if count == 4:
        operands = list(recut_blocks(plan, *operands))
    if plan.cut("k"):
        size = plan.local_size("k")
        group_sizes = segments.window(group_sizes, rows_format, plan.size["k"], plan.offset("k"), size)
        if rows_format == "blocks":
            rows_format = changed["rows_format"] = "segments"
        if count == 4 and not plan.cut("kb"):
            group_sizes = segments.shifted(group_sizes, rows_format, size, plan.offset("k") % SCALE_BLOCK)
            changed["rows_format"] = "segments"
    if plan.cut("g"):
        group_offset = group_offset + plan.offset("g")
        changed["num_groups"] = plan.local_size("g")
    return (*operands, group_sizes, group_offset, *c), changed


# FP8: no derivatives


def _of_blocks(name: str, block: tuple[int, int]) -> tuple[str, str]:
    """The name of an op, and B's scales, by what shares one."""
    rows, step = block
    words = ["row" if rows == 1 else "block", *([] if step == SCALE_BLOCK else [str(step)])]
    return "_".join([name, *words]), f"g {'n' if rows == 1 else 'nb'} kb"


def _m_grouped_fp8(block: tuple[int, int]) -> Op:
    step = block[1]
    name, scales_of_b = _of_blocks("m_grouped_fp8_gemm", block)
    rule = f"m k, m kb, g n k, {scales_of_b}, s, o -> m n"
    return Op(
        name,
        rule,
        lambda a, sa, b, *_, out_dtype, **__: [((a[0], b[1]), out_dtype)],
        functools.partial(reference.m_grouped_fp8_gemm, **scale_step(step)),
        reduces=("k", "g"),
        blocks=_blocks(rule, step),
        recut=recut_m_grouped,
        kernel=_kernel("m_grouped_fp8_gemm", **scale_step(step)),
        kernel_prepare=prepare.m_grouped_fp8,
        grad_hint=FP8_GRADIENT_HINT,
    )


def _m_masked_fp8(block: tuple[int, int]) -> Op:
    step = block[1]
    name, scales_of_b = _of_blocks("m_masked_fp8_gemm", block)
    rule = f"g m k, g m kb, g n k, {scales_of_b}, g -> g m n"
    return Op(
        name,
        rule,
        lambda a, sa, b, *_, out_dtype, **__: [((*a[:2], b[1]), out_dtype)],
        functools.partial(reference.m_masked_fp8_gemm, **scale_step(step)),
        reduces=("k",),
        blocks=_blocks(rule, step),
        recut=_recut_masked("m"),
        kernel=_kernel("m_masked_fp8_gemm", **scale_step(step)),
        kernel_prepare=prepare.m_masked_fp8,
        grad_hint=FP8_GRADIENT_HINT,
    )


def _k_grouped_fp8(name: str, scales_of_b: str, base: Op | None = None) -> Op:
    rule = f"m k, kb m, n k, {scales_of_b}, s, o"
    return Op(
        name + ("" if base is None else "_add"),
        rule + (" -> g m n" if base is None else ", g m n -> g m n"),
        lambda a, sa, b, *_, num_groups, out_dtype, **__: [((num_groups, a[0], b[0]), out_dtype)],
        reference.k_grouped_fp8_gemm,
        reduces=("k",),
        blocks=_blocks(rule),
        recut=_recut_k_grouped,
        kernel=_kernel("k_grouped_fp8_gemm"),
        kernel_prepare=prepare.k_grouped_fp8,
        aliases={} if base is None else {6: 0},
        addend=None if base is None else 6,
        base=base,
        grad_hint=FP8_GRADIENT_HINT,
    )


M_GROUPED_FP8 = {block: _m_grouped_fp8(block) for block in B_BLOCKS}
M_MASKED_FP8 = {block: _m_masked_fp8(block) for block in B_BLOCKS}
"""By what shares a scale of B."""
K_GROUPED_FP8 = _k_grouped_fp8("k_grouped_fp8_gemm", "kb n")
K_GROUPED_FP8_ADD = _k_grouped_fp8("k_grouped_fp8_gemm", "kb n", K_GROUPED_FP8)
K_GROUPED_FP8_BLOCK = _k_grouped_fp8("k_grouped_fp8_gemm_block", "kb nb")
K_GROUPED_FP8_BLOCK_ADD = _k_grouped_fp8("k_grouped_fp8_gemm_block", "kb nb", K_GROUPED_FP8_BLOCK)


# bfloat16: the derivatives are the other grouped GEMMs

FORMS = ("nt", "nn")
"""How b is stored, [g, n, k] or [g, k, n]; a is [m, k]."""

_OTHER = {"nt": "nn", "nn": "nt"}


def _jvp(op: Callable[[], Op], primals: list[Any], tangents: list[Any], **params: Any) -> list[jax.Array]:
    """The jvp of an op that is linear in its first two operands, and in C, the last, if it has one.

    op: the op without C.
    """
    a, b, *rest = primals
    rows = [x for x in rest if jnp.issubdtype(x.dtype, jnp.integer)]
    run = functools.partial(op(), **params)
    terms = [x for x in tangents[2 + len(rows) :] if x is not None]
    terms += [] if tangents[0] is None else run(tangents[0], b, *rows)
    terms += [] if tangents[1] is None else run(a, tangents[1], *rows)
    return [functools.reduce(jnp.add, terms)]


def _cotangent_params(wanted: Any, params: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Parameters of the op that computes a cotangent: the forward's where they mean the same."""
    same = ("num_sms", "reduce_dtype", "fallback")
    kept: dict[str, Any] = {name: params[name] for name in same if name in params}
    return {**kept, "out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding, "config": None, **own}


def _m_grouped_transpose(
    layout: str,
    index: int,
    cotangents: list[jax.Array],
    values: list[Any],
    *,
    rows_format: str,
    **params: Any,
) -> jax.Array:
    """da = dd @ b, group by group; db = dd.T @ a over each group's rows."""
    a, b, group_sizes, group_offset = values
    wanted = values[index]
    dd = cotangents[0].astype(wanted.dtype)
    if index == 0:
        own = _cotangent_params(wanted, params, rows_format=rows_format, expected_m=params.get("expected_m"))
        return M_GROUPED_BF16[_OTHER[layout]](dd, b, group_sizes, group_offset, **own)[0]
    groups = wanted.shape[0]
    if rows_format == "segments":
        group_sizes, group_offset = (
            segments.by_group(group_sizes, rows_format, dd.shape[0], group_offset, groups),
            jnp.zeros_like(group_offset),
        )
    own = _cotangent_params(wanted, params, rows_format=rows_format, num_groups=groups)
    return K_GROUPED_BF16(*((dd, a) if layout == "nt" else (a, dd)), group_sizes, group_offset, **own)[0]


def _k_grouped_transpose(
    index: int, cotangents: list[jax.Array], values: list[Any], *, rows_format: str, **params: Any
) -> jax.Array:
    """da = b @ dd.T, db = a @ dd, each row with its group's dd."""
    if index == 4:
        return cotangents[0]
    wanted, other, (group_sizes, group_offset) = values[index], values[1 - index], values[2:4]
    dd = cotangents[0].astype(wanted.dtype)
    if rows_format == "segments":
        group_sizes = segments.by_row(group_sizes, wanted.shape[0])
    own = _cotangent_params(wanted, params, rows_format=rows_format, expected_m=None)
    return M_GROUPED_BF16["nt" if index == 0 else "nn"](other, dd, group_sizes, group_offset, **own)[0]


def _m_masked_transpose(
    layout: str, index: int, cotangents: list[jax.Array], values: list[Any], **params: Any
) -> jax.Array:
    """As m-grouped; rows that do not count have gradient zero, and give none."""
    a, b, counts = values
    wanted = values[index]
    dd = cotangents[0].astype(wanted.dtype)
    if index == 0:
        hints = {"zero_rows": True, "expected_m": params.get("expected_m")}
        own = _cotangent_params(wanted, params, **hints)
        return M_MASKED_BF16[_OTHER[layout]](dd, b, counts, **own)[0]
    own = _cotangent_params(wanted, params)
    return K_MASKED_BF16(*((dd, a) if layout == "nt" else (a, dd)), counts, **own)[0]


def _k_masked_transpose(
    index: int, cotangents: list[jax.Array], values: list[Any], **params: Any
) -> jax.Array:
    """da = b @ dd.T, db = a @ dd; zero in rows that do not count."""
    wanted, other, counts = values[index], values[1 - index], values[2]
    own = _cotangent_params(wanted, params, zero_rows=True, expected_m=None)
    dd = cotangents[0].astype(wanted.dtype)
    return M_MASKED_BF16["nt" if index == 0 else "nn"](other, dd, counts, **own)[0]


def _m_grouped_bf16(layout: str) -> Op:
    return Op(
        f"m_grouped_bf16_gemm_{layout}",
        f"m k, {'g n k' if layout == 'nt' else 'g k n'}, s, o -> m n",
        lambda a, b, *_, out_dtype, **__: [((a[0], b[1 if layout == "nt" else 2]), out_dtype)],
        functools.partial(reference.m_grouped_bf16_gemm, layout=layout),
        reduces=("k", "g"),
        recut=recut_m_grouped,
        kernel=_kernel("m_grouped_bf16_gemm", layout=layout),
        kernel_prepare=functools.partial(prepare.m_grouped_bf16, layout=layout),
        jvp=functools.partial(_jvp, lambda: M_GROUPED_BF16[layout]),
        transpose=functools.partial(_m_grouped_transpose, layout),
    )


def _m_masked_bf16(layout: str) -> Op:
    return Op(
        f"m_masked_bf16_gemm_{layout}",
        f"g m k, {'g n k' if layout == 'nt' else 'g k n'}, g -> g m n",
        lambda a, b, *_, out_dtype, **__: [((*a[:2], b[1 if layout == "nt" else 2]), out_dtype)],
        functools.partial(reference.m_masked_bf16_gemm, layout=layout),
        reduces=("k",),
        recut=_recut_masked("m"),
        kernel=_kernel("m_masked_bf16_gemm", layout=layout),
        kernel_prepare=functools.partial(prepare.m_masked_bf16, layout=layout),
        jvp=functools.partial(_jvp, lambda: M_MASKED_BF16[layout]),
        transpose=functools.partial(_m_masked_transpose, layout),
    )


def _k_grouped_bf16(base: Op | None = None) -> Op:
    return Op(
        "k_grouped_bf16_gemm" + ("" if base is None else "_add"),
        "k m, k n, s, o" + (" -> g m n" if base is None else ", g m n -> g m n"),
        lambda a, b, *_, num_groups, out_dtype, **__: [((num_groups, a[1], b[1]), out_dtype)],
        reference.k_grouped_bf16_gemm,
        reduces=("k",),
        recut=_recut_k_grouped,
        kernel=_kernel("k_grouped_bf16_gemm"),
        kernel_prepare=prepare.k_grouped_bf16,
        aliases={} if base is None else {4: 0},
        addend=None if base is None else 4,
        base=base,
        jvp=functools.partial(_jvp, lambda: K_GROUPED_BF16),
        transpose=_k_grouped_transpose,
    )


M_GROUPED_BF16 = {layout: _m_grouped_bf16(layout) for layout in FORMS}
M_MASKED_BF16 = {layout: _m_masked_bf16(layout) for layout in FORMS}
K_GROUPED_BF16: Op = _k_grouped_bf16()
K_GROUPED_BF16_ADD = _k_grouped_bf16(base=K_GROUPED_BF16)
K_MASKED_BF16: Op = Op(
    "k_masked_bf16_gemm",
    "g k m, g k n, g -> g m n",
    lambda a, b, *_, out_dtype, **__: [((a[0], a[2], b[2]), out_dtype)],
    reference.k_masked_bf16_gemm,
    reduces=("k",),
    recut=_recut_masked("k"),
    kernel=_kernel("k_masked_bf16_gemm"),
    kernel_prepare=prepare.k_masked_bf16,
    jvp=functools.partial(_jvp, lambda: K_MASKED_BF16),
    transpose=_k_masked_transpose,
)


def empty_products(
    subscripts: str, a: jax.Array, b: jax.Array, c: jax.Array | None, groups: int, options: Options
) -> jax.Array:
    """The k-grouped result if m, n or k is 0: C, or zeros."""
    if c is not None:
        return c
    one = jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32)).astype(options.out_dtype)
    every = jnp.broadcast_to(one[None], (groups, *one.shape))
    return every if options.out_sharding is None else jax.sharding.reshard(every, options.out_sharding)
