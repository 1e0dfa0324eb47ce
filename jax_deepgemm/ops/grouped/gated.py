"""The first half of an expert in one kernel: an m-grouped FP8 GEMM whose result is the quantised SwiGLU.

    h      = a @ b[g].T                                      gate | up, rounded to bfloat16
    h      = h + bias[g]                                     where there is one, rounded again
    act    = silu(gate) * up * row weight                    float32
    result = act quantised 1x128 in float8_e4m3fn

What `m_grouped_fp8_gemm_nt_contiguous` and `swiglu_quantize` give one after the other, bit for bit, but h is
never in memory: 4 bytes a feature fewer are written, and as many fewer read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.options import config_option, num_sms_option
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.gemm.checks import BLOCKED, OUT_DTYPES, PER_ROW, Quantized, describe, is_array
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import checks, prepare, reference, segments
from jax_deepgemm.ops.grouped.op import FP8_GRADIENT_HINT, Recut
from jax_deepgemm.ops.grouped.recipe import Groups, LayerOptions
from jax_deepgemm.ops.quantize.array import QuantizedArray, QuantizedLike
from jax_deepgemm.ops.quantize.reference import quantize_float32
from jax_deepgemm.ops.swiglu.reference import act as swiglu_act

E4M3, FLOAT32 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float32)


def fits(w13: Any) -> bool:
    """Whether a weight [g, 2 f, k] is one that these kernels take: 128x128 scales, f a multiple of 128."""
    return isinstance(w13, QuantizedArray) and w13.block == BLOCKED and w13.shape[-2] % (2 * SCALE_BLOCK) == 0


def m_grouped_fp8_gemm_swiglu(
    a: QuantizedLike,
    b: QuantizedLike,
    group_sizes: ArrayLike,
    row_weights: ArrayLike,
    *,
    bias: jax.Array | None = None,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
) -> QuantizedArray:
    """silu(gate) * up * row weight of gate | up = A @ B[g].T for the rows of each group g, quantised.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.ops.grouped.gated import m_grouped_fp8_gemm_swiglu
    >>> x = jax.random.normal(jax.random.key(0), (8, 256), jnp.bfloat16)
    >>> w = jax.random.normal(jax.random.key(1), (3, 2 * 128, 256), jnp.bfloat16)
    >>> a, b, sizes = quantize(x), quantize(w, (128, 128)), jnp.array([2, 0, 5])
    >>> act = m_grouped_fp8_gemm_swiglu(a, b, sizes, jnp.ones(8))
    >>> act.values.shape, act.scales.shape, act.dtype.name
    ((8, 128), (8, 1), 'float8_e4m3fn')

    Args:
      a, group_sizes, group_offset, expected_m, config, num_sms: as in `m_grouped_fp8_gemm_nt_contiguous`.
      b: values [g, 2 f, k], gate first, f a multiple of 128, with 128x128 scales.
      row_weights: float32 [m].
      bias: [g, 2 f], bfloat16 or float32, added to the rows of each group before the activation, or None.

    Returns:
      QuantizedArray of block (1, 128): values [m, f] float8_e4m3fn, scales [m, f / 128]. Rows of no group of
      b are zeros, whatever their weights.

    Raises:
      ValueError: shapes, dtypes or scale blocks that do not fit; the message names both sides.
      TypeError: an operand that is not quantised.
      NotImplementedError: on differentiation; `moe.expert_mlp` is the layer that has gradients.
    """
    op = "m_grouped_fp8_gemm_swiglu"
    left, right, (m, n, _) = checks.check_fp8(op, checks.m_grouped_sides("nt"), a, b)
    _check_halves(op, right, n)
    rows = checks.Rows(group_sizes, None, None, None, group_offset)
    where = checks.check_rows(op, rows, m, right.values.shape[0])
    arrays = (left.values, left.scales, right.values, right.scales, _check_weights(op, row_weights, (m,)))
    options = _options(op, expected_m, config, num_sms)
    sizes = (where.group_sizes, where.group_offset)
    more = _check_bias(op, bias, right.values.shape[:2])
    run = M_GROUPED_BIASED if more else M_GROUPED
    values, scales = run(*arrays, *sizes, *more, rows_format=where.rows_format, **options)
    return QuantizedArray(values, scales, PER_ROW)


def m_masked_fp8_gemm_swiglu(
    a: QuantizedLike,
    b: QuantizedLike,
    masked_m: ArrayLike,
    row_weights: ArrayLike,
    expected_m: int | None = None,
    *,
    bias: jax.Array | None = None,
    config: GemmConfig | None = None,
    num_sms: int | None = None,
) -> QuantizedArray:
    """The same of A [g, m, k], of which the first masked_m[i] rows of group i count.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.ops.grouped.gated import m_masked_fp8_gemm_swiglu
    >>> x = quantize(jax.random.normal(jax.random.key(0), (3, 8, 256), jnp.bfloat16))
    >>> w = quantize(jax.random.normal(jax.random.key(1), (3, 2 * 128, 256), jnp.bfloat16), (128, 128))
    >>> m_masked_fp8_gemm_swiglu(x, w, jnp.array([2, 0, 8]), jnp.ones((3, 8))).scales.shape
    (3, 8, 1)

    Args:
      a, masked_m, expected_m, config, num_sms: as in `m_grouped_fp8_gemm_nt_masked`.
      b: values [g, 2 f, k], gate first, f a multiple of 128, with 128x128 scales.
      row_weights: float32 [g, m].
      bias: as in `m_grouped_fp8_gemm_swiglu`.

    Returns:
      QuantizedArray of block (1, 128): values [g, m, f] float8_e4m3fn, scales [g, m, f / 128]. Rows that do
      not count are undefined.

    Raises:
      ValueError, TypeError, NotImplementedError: as `m_grouped_fp8_gemm_swiglu`.
    """
    op = "m_masked_fp8_gemm_swiglu"
    left, right, (m, n, _) = checks.check_fp8(op, checks.masked_sides("nt"), a, b)
    _check_halves(op, right, n)
    groups = right.values.shape[0]
    counts = checks.check_masked_m(op, masked_m, groups)
    weights = _check_weights(op, row_weights, (groups, m))
    arrays = (left.values, left.scales, right.values, right.scales, weights, counts)
    more = _check_bias(op, bias, right.values.shape[:2])
    run = M_MASKED_BIASED if more else M_MASKED
    values, scales = run(*arrays, *more, **_options(op, expected_m, config, num_sms))
    return QuantizedArray(values, scales, PER_ROW)


def of_groups(
    rows: QuantizedArray,
    w13: QuantizedArray,
    row_weights: jax.Array,
    groups: Groups,
    options: LayerOptions,
    bias: jax.Array | None = None,
) -> QuantizedArray:
    """`m_grouped_fp8_gemm_swiglu`, as layers call it."""
    return m_grouped_fp8_gemm_swiglu(
        rows,
        w13,
        groups.sizes,
        row_weights,
        bias=bias,
        group_offset=groups.offset,
        expected_m=options.expected_m,
        num_sms=options.num_sms,
    )


# What is accepted


def _check_halves(op: str, b: Quantized, n: int) -> None:
    instead = op.replace("_swiglu", "_nt_masked" if "masked" in op else "_nt_contiguous")
    way_out = f"Use {instead}, then swiglu_quantize."
    if n % (2 * SCALE_BLOCK):
        raise ValueError(
            f"{op}: b is {list(b.values.shape)} [g, 2 f, k], need f, {n / 2:g}, to be a multiple of "
            f"{SCALE_BLOCK}, what one scale of the result covers. {way_out}"
        )
    if b.block != BLOCKED:
        raise ValueError(f"{op}: b has scales of block {b.block}, need {BLOCKED}. {way_out}")


def _check_weights(op: str, row_weights: Any, shape: tuple[int, ...]) -> jax.Array:
    row_weights = unwrapped(row_weights)
    if not is_array(row_weights) or tuple(row_weights.shape) != shape or row_weights.dtype != FLOAT32:
        given = describe(row_weights) if is_array(row_weights) else repr(row_weights)
        raise ValueError(
            f"{op}: row_weights is {given}, need float32 {list(shape)}, a factor for each row of a. Without "
            f"weights pass jnp.ones({shape})."
        )
    return jnp.asarray(row_weights)


def _check_bias(op: str, bias: Any, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The bias in float32, if there is one."""
    bias = unwrapped(bias)
    if bias is None:
        return ()
    if not is_array(bias) or tuple(bias.shape) != shape or np.dtype(bias.dtype) not in OUT_DTYPES:
        given = describe(bias) if is_array(bias) else repr(bias)
        raise ValueError(
            f"{op}: bias is {given}, need bfloat16 or float32 {list(shape)}, a number for each row of b, or "
            "None."
        )
    return (jnp.asarray(bias).astype(jnp.float32),)


def _options(op: str, expected_m: Any, config: Any, num_sms: Any) -> dict[str, Any]:
    return {
        "expected_m": checks.check_expected_m(op, expected_m),
        "config": config_option(op, config, GemmConfig),
        "num_sms": num_sms_option(op, num_sms),
    }


# In plain jnp: the references one after the other


def _activated(h: jax.Array, row_weights: jax.Array, counts: jax.Array) -> list[jax.Array]:
    weights = jnp.where(counts, row_weights, 0)
    return quantize_float32(swiglu_act(h, weights, None), block=PER_ROW, dtype=E4M3, scale_format="f32")


def _m_grouped_reference(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *bias: jax.Array,
    rows_format: str,
    **_: Any,
) -> list[jax.Array]:
    sizes = (group_sizes, group_offset)
    [h] = reference.m_grouped_fp8_gemm(a, sa, b, sb, *sizes, rows_format=rows_format, out_dtype=jnp.bfloat16)
    group = segments.by_index(group_sizes, rows_format, a.shape[0], group_offset, b.shape[0])
    for one in bias:
        index = jnp.where(group < 0, one.shape[0], group)  # behind the last one: none
        h = _plus(h, jnp.take(one, index, axis=0, mode="fill", fill_value=0))
    return _activated(h, row_weights, group >= 0)


def _plus(h: jax.Array, bias: jax.Array) -> jax.Array:
    return (h.astype(jnp.float32) + bias).astype(h.dtype)


def _m_masked_reference(
    a: jax.Array,
    sa: jax.Array,
    b: jax.Array,
    sb: jax.Array,
    row_weights: jax.Array,
    counts: jax.Array,
    *bias: jax.Array,
    **_: Any,
) -> list[jax.Array]:
    [h] = reference.m_masked_fp8_gemm(a, sa, b, sb, counts, out_dtype=jnp.bfloat16)
    for one in bias:
        h = _plus(h, one[:, None])
    return _activated(h, row_weights, jnp.arange(a.shape[1])[None] < counts[:, None])


# The ops


def _own_rows(plan: ShardingPlan, *arrays: jax.Array, rows_format: str, **_: Any) -> Recut:
    """m: my rows' part of each group."""
    operands, (group_sizes, *others) = arrays[:5], arrays[5:]
    if plan.cut("m"):
        group_sizes = segments.window(
            group_sizes, rows_format, plan.size["m"], plan.offset("m"), plan.local_size("m")
        )
    return (*operands, group_sizes, *others), {}


def _own_counts(plan: ShardingPlan, *arrays: jax.Array, **_: Any) -> Recut:
    operands, (counts, *bias) = arrays[:5], arrays[5:]
    if plan.cut("m"):
        counts = jnp.clip(counts, 0, plan.size["m"]) - plan.offset("m")
    return (*operands, counts, *bias), {}


def _own_features(plan: ShardingPlan, local: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Features that are cut come from a whole result: gate and up of b cannot be cut alike."""
    if not plan.cut("f"):
        return arrays, None
    values, scales = local(*arrays)

    def own(x: jax.Array, name: str) -> jax.Array:
        if not plan.cut(name):
            return x
        size = plan.local_size(name)
        return lax.dynamic_slice_in_dim(x, plan.offset(name), size, axis=-1)

    return None, [own(values, "f"), own(scales, "fb")]


def _op(name: str, rule: str, plain: Any, recut: Any, prepared: Any) -> Op:
    def result(a: tuple[int, ...], sa: Any, b: tuple[int, ...], *_: Any, **__: Any) -> list[Any]:
        lead, f = a[:-1], b[1] // 2
        return [((*lead, f), E4M3), ((*lead, -(-f // SCALE_BLOCK)), FLOAT32)]

    return Op(
        name,
        rule,
        result,
        plain,
        blocks={"fb": ("f", SCALE_BLOCK)},
        recut=recut,
        spmd=_own_features,
        kernel=LazyKernel("jax_deepgemm.ops.grouped.kernel", name.removesuffix("_bias"), batched=True),
        kernel_prepare=prepared,
        grad_hint=FP8_GRADIENT_HINT.replace("grouped_linear", "moe.expert_mlp"),
    )


def _grouped(name: str, more: str) -> Op:
    rule = f"m k, m kb, g n k, g nb kb, m, s, o{more} -> m f, m fb"
    return _op(name, rule, _m_grouped_reference, _own_rows, prepare.m_grouped_swiglu)


def _masked(name: str, more: str) -> Op:
    rule = f"g m k, g m kb, g n k, g nb kb, g m, g{more} -> g m f, g m fb"
    return _op(name, rule, _m_masked_reference, _own_counts, prepare.m_masked_swiglu)


M_GROUPED = _grouped("m_grouped_fp8_gemm_swiglu", "")
M_GROUPED_BIASED = _grouped("m_grouped_fp8_gemm_swiglu_bias", ", g n")
M_MASKED = _masked("m_masked_fp8_gemm_swiglu", "")
M_MASKED_BIASED = _masked("m_masked_fp8_gemm_swiglu_bias", ", g n")
