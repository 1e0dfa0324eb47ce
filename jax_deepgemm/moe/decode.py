"""A mixture of experts for few tokens: as many rows for every expert, and how many of them count."""

from __future__ import annotations

import functools
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.moe.bias import check_biases
from jax_deepgemm.moe.checks import check_weights, one_weight
from jax_deepgemm.moe.dispatch import (
    DispatchPlan,
    is_known,
    plan_capacity,
    sum_copies,
    take_quantized,
    take_rows,
)
from jax_deepgemm.moe.experts import Weight, gemm_options, runs_fused, weighted
from jax_deepgemm.moe.form import PLAIN, ExpertForm
from jax_deepgemm.moe.layer import check_tokens, expected_rows
from jax_deepgemm.moe.placement import on_each_device
from jax_deepgemm.moe.shared import (
    Shared,
    SharedExperts,
    checked_shared,
    split_shared,
    with_last_experts,
    with_shared,
)
from jax_deepgemm.ops.gemm.checks import PER_ROW, check_options
from jax_deepgemm.ops.grouped import gated
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.grouped.api import m_grouped_bf16_gemm_nt_masked, m_grouped_fp8_gemm_nt_masked
from jax_deepgemm.ops.grouped.linear import in_bf16
from jax_deepgemm.ops.grouped.op import M_MASKED_BF16
from jax_deepgemm.ops.quantize import PreparedWeight, QuantizedArray, quantize
from jax_deepgemm.ops.rows.api import move_rows
from jax_deepgemm.ops.swiglu import swiglu, swiglu_quantize


def moe_mlp_decode(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    shared: Shared = None,
    max_rows: int | None = None,
    recipe: str = "fp8",
    form: ExpertForm = PLAIN,
    expected_m: int | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """`moe_mlp` for inference, through the masked grouped GEMMs: every expert has max_rows rows.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.moe import moe_mlp_decode, route
    >>> x = jax.random.normal(jax.random.key(0), (6, 256), jnp.bfloat16)
    >>> ids, weights = route(jax.random.normal(jax.random.key(1), (6, 4)), 2)
    >>> w13 = jax.random.normal(jax.random.key(2), (4, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(3), (4, 256, 128)) / 16
    >>> frozen = quantize(w13, (128, 128)), quantize(w2, (128, 128))
    >>> moe_mlp_decode(x, ids, weights, *frozen).shape
    (6, 256)

    The layout that a low-latency exchange between devices gives. Rows of all experts are moved, used or not,
    e * max_rows * h bytes in FP8: for more than some hundred tokens `moe_mlp` does less. Both compile once
    for a number of tokens, whatever the routing.

    Args:
      x, ids, weights, w13, w2: as in `moe_mlp`. Quantise the weights beforehand: master weights are quantised
        at each call. Of PreparedWeights the FP8 copies are used, and the masters have no gradient.
      max_rows: rows of an expert; copies that find none, those of later tokens, are dropped: they count zero.
        Default: the number of tokens, so that nothing is dropped (a token's ids being distinct).
      b13, b2, shared, recipe, form, num_sms: as in `moe_mlp`; shared experts that are the last of w13 need
        max_rows for all tokens.
      expected_m: rows of an expert to expect, for the choice of the kernel; default: of a balanced load.

    Returns:
      [t, h] in the dtype of x, as `moe_mlp`: the same sums, with the accumulation order of another kernel.

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.

    For inference: with "fp8" differentiation raises; train with `moe_mlp`. On a mesh as `moe_mlp`; max_rows
    are then those of one device.
    """
    x, ids, weights, w2 = map(unwrapped, (x, ids, weights, w2))
    w13, form = one_weight("moe_mlp_decode", w13, form), form.checked("moe_mlp_decode")
    check_tokens("moe_mlp_decode", x, ids, weights)
    check_weights("moe_mlp_decode", x, w13, w2, recipe, form)
    b13, b2 = map(unwrapped, (b13, b2))
    check_biases("moe_mlp_decode", w13, w2, form, b13, b2)
    if max_rows is not None and (max_rows < 0 or (max_rows == 0 and x.shape[0])):
        raise ValueError(f"moe_mlp_decode: max_rows is {max_rows}, need a positive number, or None.")
    last, own = split_shared(checked_shared("moe_mlp_decode", shared, x, w13.shape[0], recipe, form))
    if last and max_rows is not None and (not is_known(x.shape[0]) or max_rows < x.shape[0]):
        raise ValueError(
            f"moe_mlp_decode: max_rows is {max_rows} and shared is {last} of w13's experts, which all "
            f"{x.shape[0]} tokens pass, need as many rows: max_rows=None. With fewer give the shared experts "
            "weights of their own: SharedExperts(w13[-n:], w2[-n:])."
        )
    layer = functools.partial(_moe_mlp_decode, recipe, form, max_rows, expected_m, num_sms, last)
    return on_each_device("moe_mlp_decode", layer, (x, ids, weights, w13, w2, b13, b2, own))


def _moe_mlp_decode(
    recipe: str,
    form: ExpertForm,
    max_rows: int | None,
    expected_m: int | None,
    num_sms: int | None,
    last: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    b2: jax.Array | None,
    shared: SharedExperts | None,
) -> jax.Array:
    experts, tokens = w13.shape[0], x.shape[0]
    rows = tokens if max_rows is None else max_rows
    expected_m = _expected_rows(ids.size, experts - last, rows) if expected_m is None else expected_m
    ids, weights = with_last_experts(ids, weights, experts, last)
    plan = plan_capacity(ids, experts, rows)
    row_weights = take_rows(weights.reshape(-1), plan.source)
    run = _bf16 if recipe == "bf16" else _fp8
    y = run(x, w13, w2, b13, plan, row_weights, gemm_options(form, expected_m, num_sms), form)
    y = _biased(y, b2, None if form.weights_first else row_weights)
    y = sum_copies(y.reshape(experts * rows, x.shape[1]), plan.position)
    return with_shared(y, x, shared, recipe, form, num_sms)


class _Options(TypedDict):
    expected_m: int | None
    num_sms: int | None


def _biased(x: jax.Array, bias: jax.Array | None, row_weights: jax.Array | None = None) -> jax.Array:
    """x [experts, rows, n] plus each expert's bias, times the weights of the rows."""
    if bias is None:
        return x
    rows = bias.astype(jnp.float32)[:, None]
    if row_weights is not None:
        rows = rows * row_weights.reshape(*x.shape[:2], 1)
    return (x.astype(jnp.float32) + rows).astype(x.dtype)


def _expected_rows(copies: int, experts: int, rows: int) -> int | None:
    """Those of a balanced load that find room."""
    balanced = expected_rows(copies, experts)
    return balanced if balanced is None or not is_known(rows) else min(balanced, max(rows, 1))


def _fp8(
    x: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    plan: DispatchPlan,
    row_weights: jax.Array,
    gemms: fp8.LayerOptions,
    form: ExpertForm,
) -> jax.Array:
    experts = w13.shape[0]
    counts, options = plan.group_sizes, _Options(expected_m=gemms.expected_m, num_sms=gemms.num_sms)

    def deep(z: jax.Array) -> jax.Array:
        return z.reshape(experts, row_weights.shape[0] // experts, *z.shape[1:])

    def gemm(rows: QuantizedArray, w: fp8.Frozen, out_dtype: DTypeLike) -> jax.Array:
        return m_grouped_fp8_gemm_nt_masked(rows, w, counts, out_dtype=out_dtype, **options)

    quantized = functools.partial(quantize, block=PER_ROW, scale_format=form.scale_format)
    if form.weights_first:
        taken = quantized(weighted(take_rows(x, plan.token), row_weights))
        row_weights = jnp.ones_like(row_weights)
    else:
        taken = take_quantized(quantized(x), plan.token)
    rows = QuantizedArray(deep(taken.values), deep(taken.scales), PER_ROW)
    first, second = (fp8.forward_weight(w, gemms) for w in (w13, w2))
    # Rows that do not count are undefined from here on, and stay among themselves: scales are per row.
    if runs_fused(form, first):
        act = gated.m_masked_fp8_gemm_swiglu(rows, first, counts, deep(row_weights), bias=b13, **options)
    else:
        hidden = _biased(gemm(rows, first, jnp.bfloat16), b13)
        flat = hidden.reshape(row_weights.shape[0], hidden.shape[2])
        values, scales = swiglu_quantize(
            flat, row_weights, activation=form.act, transposed=False, scale_format=form.scale_format
        )
        act = QuantizedArray(deep(values), deep(scales), PER_ROW)
    return gemm(act, second, x.dtype)


def _bf16(
    x: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    plan: DispatchPlan,
    row_weights: jax.Array,
    gemms: fp8.LayerOptions,
    form: ExpertForm,
) -> jax.Array:
    experts = w13.shape[0]

    def gemm(a: jax.Array, w: Weight, out_dtype: DTypeLike) -> jax.Array:
        assert not isinstance(w, PreparedWeight | QuantizedArray)
        a = a.reshape(experts, row_weights.shape[0] // experts, a.shape[-1])
        if form.weight_layout == "kn":
            assert isinstance(w, jax.Array)
            return _masked_nn(a, w.astype(jnp.bfloat16), plan.group_sizes, gemms, out_dtype)
        return m_grouped_bf16_gemm_nt_masked(
            a,
            in_bf16(w),
            plan.group_sizes,
            gemms.expected_m,
            out_dtype=out_dtype,
            num_sms=gemms.num_sms,
        )

    if form.weights_first:
        rows = weighted(take_rows(x, plan.token), row_weights).astype(jnp.bfloat16)
        row_weights = jnp.ones_like(row_weights)
    else:
        rows = move_rows(x.astype(jnp.bfloat16), plan.token, plan.inverse)
    hidden = _biased(gemm(rows, w13, jnp.bfloat16), b13)
    act = swiglu(hidden, row_weights.reshape(hidden.shape[:2]), activation=form.act)
    return gemm(act, w2, x.dtype)


def _masked_nn(
    a: jax.Array, b: jax.Array, counts: jax.Array, gemms: fp8.LayerOptions, out_dtype: DTypeLike
) -> jax.Array:
    """`m_grouped_bf16_gemm_nt_masked` of b [g, k, n]."""
    op = "m_grouped_bf16_gemm_nn_masked"
    if 0 in (*a.shape, *b.shape):
        return jnp.zeros((*a.shape[:2], b.shape[2]), out_dtype)
    options = check_options(op, out_dtype, jnp.float32, None, None, gemms.num_sms)
    hints = {"zero_rows": False, "expected_m": gemms.expected_m}
    return M_MASKED_BF16["nn"](a, b, counts, **hints, **vars(options))[0]
