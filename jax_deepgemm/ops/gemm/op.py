"""The dense GEMMs as ops: shapes, sharding, derivatives, and what runs where.

Blocks of scales are global: a device whose rows or columns start inside a block keeps the numbers of the
unsharded call (`recut_blocks`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.gemm import padding, reference
from jax_deepgemm.ops.gemm.checks import B_BLOCKS, LAYOUTS, Options, Quantized
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK

FP8_GRADIENT_HINT = (
    "Quantised operands have no useful derivative. Use jax_deepgemm.fp8_linear, which quantises inside "
    "and has FP8 gradients, or jax.lax.stop_gradient."
)


def recut_blocks(plan: ShardingPlan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Operands (a, a scales, b, b scales, ..) of one device whose cut falls inside a scale block, so that the
    op's block grid fits them again. Any rule in which a and b have k last.

    n: one scale per row of B, of my rows (reference and kernel tell by the shape). k: my columns are shifted
    onto the block grid, with zeros in front and behind. Both leave every product as it is.
    """
    a, sa, b, sb, *rest = arrays
    _, scales_of_a, _, scales_of_b, *_ = plan.rule.operands
    _, step = plan.rule.blocks["kb"]
    if "nb" in scales_of_b and plan.cut("n") and not plan.cut("nb"):
        row = plan.offset("n") + jnp.arange(plan.local_size("n"))
        sb = jnp.take(sb, row // step, axis=scales_of_b.index("nb"))
    if plan.cut("k") and not plan.cut("kb"):
        first, size = plan.offset("k"), plan.local_size("k")
        blocks = -(-(size + step - 1) // step)
        a, b = (_shift_columns(x, first % step, blocks * step) for x in (a, b))
        sa = _take_blocks(sa, first // step, blocks, scales_of_a.index("kb"))
        sb = _take_blocks(sb, first // step, blocks, scales_of_b.index("kb"))
    return (a, sa, b, sb, *rest)


def _shift_columns(x: jax.Array, by: jax.Array, width: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(jnp.zeros((*x.shape[:-1], width), x.dtype), x, by, axis=-1)


def _take_blocks(scales: jax.Array, first: jax.Array, count: int, axis: int) -> jax.Array:
    padded = jnp.pad(scales, [(0, count if dim == axis else 0) for dim in range(scales.ndim)])
    return lax.dynamic_slice_in_dim(padded, first, count, axis)


def _fp8_result(a: Any, sa: Any, b: Any, sb: Any, *_: Any, out_dtype: Any, **__: Any) -> list[Any]:
    return [((a[0], b[0]), out_dtype)]


def _bf16_result(a: Any, b: Any, *_: Any, layout: str, out_dtype: Any, **__: Any) -> list[Any]:
    return [((a[layout[0] == "t"], b[layout[1] == "n"]), out_dtype)]


def _kernel(name: str, **form: Any) -> LazyKernel:
    return LazyKernel("jax_deepgemm.ops.gemm.kernel", name, batched=True, **form)


def scale_step(step: int) -> dict[str, Any]:
    """The parameter of references and problems of products with a scale for so many elements of k."""
    return {} if step == SCALE_BLOCK else {"step": step}


def _fp8_op(name: str, rule: str, step: int, base: Op | None = None) -> Op:
    blocks = {"kb": ("k", step), "nb": ("n", step)}
    return Op(
        name if base is None else f"{name}_add",
        rule + (" -> m n" if base is None else ", m n -> m n"),
        _fp8_result,
        functools.partial(reference.fp8_gemm, **scale_step(step)),
        reduces=("k",),
        blocks={grid: data for grid, data in blocks.items() if grid in rule.split()},
        spmd=lambda plan, local, *arrays: (recut_blocks(plan, *arrays), None),
        kernel=_kernel("fp8_gemm", **scale_step(step)),
        kernel_prepare=padding.fp8_rows,
        aliases={} if base is None else {4: 0},
        addend=None if base is None else 4,
        base=base,
        grad_hint=FP8_GRADIENT_HINT,
    )


def _fp8_pair(block: tuple[int, int]) -> tuple[Op, Op]:
    rows, step = block
    name = f"fp8_gemm_{'row' if rows == 1 else 'block'}{'' if step == SCALE_BLOCK else f'_{step}'}"
    rule = f"m k, m kb, n k, {'n' if rows == 1 else 'nb'} kb"
    plain = _fp8_op(name, rule, step)
    return plain, _fp8_op(name, rule, step, base=plain)


FP8_GEMM = {block: _fp8_pair(block) for block in B_BLOCKS}
"""By what shares a scale of B: the product, and that with C."""


# bfloat16: the derivatives are GEMMs of the other layouts


def cotangent_gemm(layout: str, index: int) -> tuple[str, bool]:
    """How the cotangent of operand `index` is computed: (layout, whether D's cotangent is the first operand).

    The other operand of that GEMM is the forward's other operand, as it is stored.

    >>> cotangent_gemm("nt", 0), cotangent_gemm("nt", 1)  # da = dd @ b, db = dd.T @ a
    (('nn', True), ('tn', True))
    """
    first, second = layout[0], layout[1]
    flip = {"n": "t", "t": "n"}
    if index == 0:
        return ("n" + flip[second], True) if first == "n" else (second + "t", False)
    return (flip[first] + "n", False) if second == "n" else ("t" + first, True)


def _bf16_jvp(primals: list[Any], tangents: list[Any], *, layout: str, **params: Any) -> list[jax.Array]:
    a, b, *_ = primals
    da, db, *dc = tangents
    run = functools.partial(BF16_GEMM[layout], layout=layout, **params)
    terms = [x for x in dc if x is not None]
    terms += [] if da is None else run(da, b)
    terms += [] if db is None else run(a, db)
    return [functools.reduce(jnp.add, terms)]


def _bf16_transpose(
    index: int, cotangents: list[jax.Array], values: list[Any], *, layout: str, **params: Any
) -> jax.Array:
    (dd,) = cotangents
    if index == 2:
        return dd
    wanted, other = values[index], values[1 - index]
    how, dd_first = cotangent_gemm(layout, index)
    dd = dd.astype(wanted.dtype)
    params |= {"out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding, "config": None}
    pair = (dd, other) if dd_first else (other, dd)
    return BF16_GEMM[how](*pair, layout=how, **params)[0]


def _bf16_op(layout: str, base: Op | None = None) -> Op:
    rule = f"{'m k' if layout[0] == 'n' else 'k m'}, {'k n' if layout[1] == 'n' else 'n k'}"
    return Op(
        f"bf16_gemm_{layout}" + ("" if base is None else "_add"),
        rule + (" -> m n" if base is None else ", m n -> m n"),
        _bf16_result,
        reference.bf16_gemm,
        reduces=("k",),
        kernel=_kernel("bf16_gemm"),
        kernel_prepare=padding.bf16_rows,
        aliases={} if base is None else {2: 0},
        addend=None if base is None else 2,
        base=base,
        jvp=_bf16_jvp,
        transpose=_bf16_transpose,
    )


BF16_GEMM = {layout: _bf16_op(layout) for layout in LAYOUTS}
BF16_GEMM_ADD = {layout: _bf16_op(layout, BF16_GEMM[layout]) for layout in LAYOUTS}


# What the API calls, with checked operands


def fp8_gemm(a: Quantized, b: Quantized, c: jax.Array | None, options: Options) -> jax.Array:
    """D of FP8 operands that both have k last."""
    op = FP8_GEMM[b.block][c is not None]
    arrays = (a.values, a.scales, b.values, b.scales, *(() if c is None else (c,)))
    return op(*arrays, **vars(options))[0]


def bf16_gemm(layout: str, a: jax.Array, b: jax.Array, c: jax.Array | None, options: Options) -> jax.Array:
    """D of BF16 operands as they are stored."""
    if c is None:
        return BF16_GEMM[layout](a, b, layout=layout, **vars(options))[0]
    return BF16_GEMM_ADD[layout](a, b, c, layout=layout, **vars(options))[0]


def empty_product(subscripts: str, a: jax.Array, b: jax.Array, options: Options) -> jax.Array:
    """The result if m, n or k is 0: zeros of the type that a product would have. No kernel runs."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, out_sharding=options.out_sharding).astype(options.out_dtype)
