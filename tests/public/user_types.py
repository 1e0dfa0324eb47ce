"""A user's program, as a type checker sees it: `make lint` runs mypy on this file; it is not run.

`assert_type` fails where a result is Any, so the public functions keep the types of their arrays.
"""

from __future__ import annotations

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jax_deepgemm as jdg
from jax_deepgemm import activation, config, grouped, moe, quantization
from jax_deepgemm.flax import Linear, Load, MoE, SwiGLU
from jax_deepgemm.tools.explain import ExplainedCall


def dense(x: jax.Array, w: jax.Array) -> None:
    a, b = jdg.quantize(x), jdg.quantize(w, (128, 128))
    assert_type(a, jdg.QuantizedArray)
    assert_type(a.scales, jax.Array)
    assert_type(jdg.dequantize(a), jax.Array)
    assert_type(jdg.fp8_gemm_nt(a, b), jax.Array)
    assert_type(jdg.fp8_gemm_nt((a.values, a.scales), b, out_dtype=jnp.float32), jax.Array)
    assert_type(jdg.bf16_gemm_tn(x, np.ones((4, 8)), num_sms=100), jax.Array)
    assert_type(jdg.fp8_linear(x, w, out_dtype="float32"), jax.Array)
    [call] = jdg.explain(jdg.bf16_gemm_nt, x, w)
    assert_type(call, ExplainedCall)
    jdg.bf16_gemm_nt(x, w, config=jdg.GemmConfig(block_m=128, block_n=128, stages=5))
    jdg.fp8_gemm_nt(x, b)  # type: ignore[arg-type] # not quantised
    jdg.bf16_gemm_nt(x, w, out_dtpye=jnp.float32)  # type: ignore[call-arg] # no such argument


def groups(x: jax.Array, w: jax.Array, sizes: jax.Array) -> None:
    a, b = jdg.quantize(x), jdg.quantize(w, (128, 128))
    assert_type(jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes), jax.Array)
    assert_type(jdg.m_grouped_bf16_gemm_nt_masked(x, w, sizes, zero_rows=True), jax.Array)
    assert_type(jdg.k_grouped_fp8_gemm_nt_contiguous(a, b, sizes), jax.Array)
    assert_type(jdg.ragged_dot(x, w, sizes, group_offset=1), jax.Array)
    assert_type(jdg.grouped_linear(x, b, sizes), jax.Array)
    assert_type(grouped.group_sizes_to_indices(sizes, 8), jax.Array)


def quantised(x: jax.Array) -> None:
    values, _, values_t, _ = quantization.quantize_both(x)
    assert_type((values, values_t), tuple[jax.Array, jax.Array])
    assert_type(quantization.to_tuple(jdg.quantize(x)), tuple[jax.Array, jax.Array])
    assert_type(quantization.scales_shape((4, 256), (1, 128)), tuple[int, ...])
    assert_type(activation.swiglu(x), jax.Array)


def experts(x: jax.Array, logits: jax.Array, w13: jdg.QuantizedArray, w2: jax.Array) -> None:
    ids, weights = moe.route(logits, 2)
    assert_type(moe.moe_mlp(x, ids, weights, w13, w2), jax.Array)
    rows, plan = moe.dispatch(x, ids, 8)
    assert_type(plan, moe.DispatchPlan)
    assert_type(plan.group_sizes, jax.Array)
    assert_type(moe.combine(rows, plan, weights), jax.Array)


def layers(x: jax.Array, dense: Linear, gated: SwiGLU, experts: MoE) -> None:
    assert_type(dense(x), jax.Array)
    assert_type(gated(dense(x)), jax.Array)
    assert_type(experts(x), jax.Array)
    assert_type(experts(x, with_load=True), tuple[jax.Array, Load])
    assert_type(experts.decode(x), jax.Array)
    with config.use(num_sms=100) as settings:
        assert_type(settings, config.Settings)
