"""One small call of every public function of arrays, and of the gradients, as a table for tests that hold for
all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import attention, deep_gemm, hyperconnection, indexer, inference, moe
from jax_deepgemm.ops import grouped
from jax_deepgemm.ops import quantize as quantization
from jax_deepgemm.ops import swiglu as activation
from tests.shared import serving_calls as serving
from tests.shared.public_operands import BLOCKED, EXPERTS, HIDDEN, TOKENS, TOP_K, WIDTH, mesh_of_two, operands

WINDOWS = "head_weights", "k_start", "k_end"

WITHOUT_ARRAYS = {
    "Epilogue",
    "GemmConfig", "GemmProblem", "QuantizedArray", "PreparedWeight", "DEEPSEEK_V3", "DispatchPlan",
    "PreparedFp4",
    "Activation", "AttentionConfig", "ExpertForm", "GPT_OSS", "IndexerConfig",
    "deepspeed_names", "fastgen_names",
    "__version__", "config", "embed_kernels",
    "explain", "export_checks", "precompile", "from_tuple", "to_tuple", "from_qwix", "to_qwix",
    "scales_shape", "scales_spec", "get_tma_aligned_size", "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout", "get_mk_alignment_for_contiguous_layout",
    "get_theoretical_mk_alignment_for_contiguous_layout", "set_mk_alignment_for_contiguous_layout",
}  # fmt: skip
"""Public names that compute nothing on a device."""


@dataclass(frozen=True)
class Call:
    """fn of the operands with these names. `mesh`: all of them on every device of `mesh_of_two`."""

    name: str
    fn: Callable[..., Any]
    operands: tuple[str, ...]
    mesh: bool = False

    def __str__(self) -> str:
        return self.name

    def arrays(self) -> list[Any]:
        arrays = [operands()[name] for name in self.operands]
        return jax.device_put(arrays, NamedSharding(mesh_of_two(), P())) if self.mesh else arrays


ROOMS = (jdg, quantization, grouped, activation, attention, hyperconnection, indexer, inference, moe)


def public_names() -> set[str]:
    return {name for module in ROOMS for name in module.__all__}


def _gradient(fn: Callable[..., Any], *wrt: int) -> Callable[..., Any]:
    """Gradients of a sum of sines, which makes every cotangent another number."""

    def loss(*operands: Any) -> jax.Array:
        leaves = jax.tree.leaves(fn(*operands))
        return sum((jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves), jnp.float32(0))

    return jax.grad(loss, wrt)


def _tangent(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays: jax.jvp(fn, arrays, arrays)[1]


def _scored(q: jax.Array, *operands: Any) -> jax.Array:
    return indexer.mqa_logits(q.astype(jnp.float8_e4m3fn), *operands)


def _scored_pages(q: Any, values: Any, scales: Any, weights: Any, lens: Any) -> jax.Array:
    tables = jnp.zeros((TOKENS, 1), jnp.int32)
    q = q.astype(jnp.float8_e4m3fn)[:, None]
    cache = values, scales
    return indexer.paged_mqa_logits(q, cache, weights[:, None], lens, tables, max_context_len=9)


def _chosen(q: jax.Array, *operands: Any) -> Any:
    return indexer.indexer_topk(q.astype(jnp.float8_e4m3fn), *operands, 3, values=True)


def _chosen_pages(q: Any, values: Any, scales: Any, weights: Any, lens: Any) -> jax.Array:
    tables = jnp.zeros((TOKENS, 1), jnp.int32)
    q = q.astype(jnp.float8_e4m3fn)[:, None]
    options = {"order": "index", "scratch_bytes": 200}
    return indexer.paged_indexer_topk(q, (values, scales), weights[:, None], lens, tables, 3, **options)


def _scored_tokens(q: Any, values: Any, scales: Any, weights: Any, lens: Any, indices: Any) -> jax.Array:
    tables = jnp.zeros((3, 1), jnp.int32)
    q = q.astype(jnp.float8_e4m3fn)[:, None]
    cache = values, scales
    return indexer.paged_mqa_logits(
        q, cache, weights[:, None], lens, tables, indices=indices, max_context_len=9
    )


def _small_weight(product: Callable[..., Any], block: int = 32) -> Callable[..., Any]:
    """The product with a weight in FP4, of a scale for so many numbers."""

    def run(x: Any, w: jax.Array, *rest: Any) -> Any:
        return product(x, jdg.prepare_fp4(jdg.quantize(w, (1, block), jnp.float4_e2m1fn)), *rest)

    return run


def _per_channel(x: jax.Array, ws: jax.Array, sizes: jax.Array) -> Any:
    w = jdg.PerChannelArray(*jdg.quantize_per_channel(ws))
    return jdg.ragged_dot(x, w, sizes), jdg.dequantize_per_channel(w)


def _scored_fp4(q: jax.Array, keys: jax.Array, *operands: Any) -> Any:
    numbers = indexer.dequantize_fp4(indexer.Fp4Array(*indexer.quantize_fp4(keys)))
    return indexer.mqa_logits(indexer.quantize_fp4(q), indexer.quantize_fp4(numbers), *operands)


def _hyperconnection(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    streams = hyperconnection.expand(x, 2)
    y, *back = hyperconnection.pre(streams, weight, scale, bias)
    streams = hyperconnection.post(jnp.tanh(y), streams, *back)
    return hyperconnection.head(streams, weight[:2], scale[:1], bias[:2])


def _coefficients(x: jax.Array, *parameters: jax.Array) -> Any:
    return hyperconnection.coefficients(hyperconnection.expand(x, 2), *parameters)


def _cast_to_fp4(x: jax.Array) -> Any:
    """Values, scales, the numbers that they stand for, and the values of the transposed matrix."""
    values, scales = deep_gemm.per_token_cast_to_fp4(x, True, 32)
    back = deep_gemm.cast_back_from_fp4(values, scales, 32)
    return values, scales, back, deep_gemm.transpose_packed_fp4(values)


def _route(**options: Any) -> Callable[..., Any]:
    def call(logits: jax.Array, *bias: jax.Array) -> Any:
        return moe.route(logits, TOP_K, bias=bias[0] if bias else None, **options)

    return call


def _dispatch_and_combine(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    rows, plan = moe.dispatch(x, ids, EXPERTS)
    return moe.combine(rows, plan, weights)


def _row_weights(ids: jax.Array, weights: jax.Array) -> jax.Array:
    return moe.spread_weights(weights, moe.plan_dispatch(ids, EXPERTS))


def _parallel(method: str) -> Callable[..., Any]:
    def layer(*args: Any) -> Any:
        y, dropped = moe.expert_parallel_moe(*args, axis="expert", method=method)
        return y, dropped[None]

    def call(*args: Any) -> Any:
        cut = P("expert")
        return jax.shard_map(layer, mesh=mesh_of_two(), in_specs=cut, out_specs=cut)(*args)

    return call


def _shared(x: jax.Array, ids: jax.Array, weights: jax.Array, w13: Any, w2: Any, gate: jax.Array) -> Any:
    """The first expert by itself, the last one in the launches of the others."""
    own = moe.SharedExperts(w13[0], w2[0], gate=gate)
    apart = w13.reshape(EXPERTS, 2, WIDTH, HIDDEN)
    return moe.moe_mlp(x, ids, weights, apart, w2, shared=own) + moe.moe_mlp(
        x, ids, weights, w13, w2, shared=1
    )


def _cut_inside(*args: Any) -> Any:
    """The inner size of the experts on a mesh axis."""
    return moe.moe_layer(*args, mesh=mesh_of_two(), tensor_axis="tensor", recipe="bf16")


def _prepared(layer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, ids, weights, w13, w2: layer(x, ids, weights, *moe.prepare_weights(w13, w2))


def _accumulated(w: jax.Array, sums: jax.Array, x: jax.Array) -> Any:
    def loss(w: Any, x: jax.Array) -> Any:
        y, w = jdg.fp8_linear(x, w, with_weight=True)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), w

    return jdg.accumulate_gradients(loss, jdg.prepare_weight(w), sums, x)


def _written(keys: jax.Array, slots: jax.Array) -> jax.Array:
    cache = jnp.zeros((2, 16, keys.shape[1] + 4), jnp.uint8)
    return indexer.indexer_quantize(keys, cache=cache, slots=slots)


def _layer(*args: Any) -> Any:
    return moe.moe_layer(*args, mesh=mesh_of_two())


def _general(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    weight_gradient = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jdg.ragged_dot_general(lhs, rhs, sizes, weight_gradient, None, jnp.float32)


MOE = ("x", "ids", "weights", "w13", "w2")


def _biased(*operands: Any, **options: Any) -> jax.Array:
    return moe.moe_mlp(*operands[:5], b13=operands[5], b2=operands[6], **options)


TURNED_MOE = ("x", "ids", "weights", "w13_t", "w2_t")
GPT_OSS = moe.ExpertForm(activation.GPT_OSS, "kn")
RELU2 = moe.ExpertForm("relu2")
FROZEN_MOE = ("x", "ids", "weights", "q_w13", "q_w2")
with_f32 = functools.partial(functools.partial, out_dtype=jnp.float32)
bf16_recipe = functools.partial(functools.partial, recipe="bf16")

FORWARD = (
    Call("quantize", jdg.quantize, ("x",)),
    Call(
        "quantize blocks", functools.partial(jdg.quantize, block=BLOCKED, scale_format="ue8m0"), ("ws_f32",)
    ),
    Call("dequantize", jdg.dequantize, ("q_ws",)),
    Call("quantize_both", quantization.quantize_both, ("x",)),
    Call("quantize_rows", lambda x, sizes: quantization.quantize_rows(x, sizes), ("x", "sizes")),
    Call(
        "quantize_groups",
        lambda x, sizes: quantization.quantize_groups(x, quantization.row_blocks(sizes, x.shape[0])),
        ("x", "sizes"),
    ),
    Call("row_blocks", lambda sizes: quantization.row_blocks(sizes, TOKENS), ("sizes",)),
    Call("quantize_weight", quantization.quantize_weight, ("ws_f32",)),
    Call(
        "per_token_cast_to_fp8", functools.partial(quantization.per_token_cast_to_fp8, use_ue8m0=True), ("x",)
    ),
    Call("per_channel_cast_to_fp8", quantization.per_channel_cast_to_fp8, ("w_t",)),
    Call("per_block_cast_to_fp8", quantization.per_block_cast_to_fp8, ("w",)),
    Call(
        "per_custom_dims_cast_to_fp8",
        functools.partial(quantization.per_custom_dims_cast_to_fp8, dims=(0,)),
        ("x",),
    ),
    Call("concatenate", lambda *parts: quantization.concatenate(parts), ("q_w_rows", "q_w_rows")),
    Call("ceil_to_ue8m0", quantization.ceil_to_ue8m0, ("scales",)),
    Call("pack_ue8m0_to_int", quantization.pack_ue8m0_to_int, ("powers",)),
    Call("unpack_ue8m0_from_int", quantization.unpack_ue8m0_from_int, ("words",)),
    Call("get_mn_major_tma_aligned_tensor", quantization.get_mn_major_tma_aligned_tensor, ("scales",)),
    Call(
        "get_mn_major_tma_aligned_packed_ue8m0_tensor",
        quantization.get_mn_major_tma_aligned_packed_ue8m0_tensor,
        ("scales",),
    ),
    Call(
        "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor ks on the device",
        quantization.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
        ("powers", "ks"),
    ),
    Call(
        "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
        functools.partial(quantization.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor, ks=[128, 640]),
        ("powers",),
    ),
    Call(
        "transform_sf_into_required_layout",
        functools.partial(
            quantization.transform_sf_into_required_layout,
            mn=TOKENS,
            k=4 * 128,
            recipe=(1, 128, 128),
            is_sfa=True,
        ),
        ("scales",),
    ),
    Call("deep_gemm: casts to FP4", lambda x: _cast_to_fp4(x), ("x",)),
    Call("deep_gemm: FP4 weights", lambda x, w: deep_gemm.fp8_gemm_nt(x, _cast_to_fp4(w)[:2]), ("q_x", "w")),
    Call(
        "deep_gemm: contexts divided",
        lambda lens: deep_gemm.get_paged_mqa_logits_metadata(lens[:, None], 64, 5),
        ("k_end",),
    ),
    Call(
        "deep_gemm: rows of k by an index",
        lambda a, b, index, ends: deep_gemm.legacy.a_fused_k_grouped_bf16_gemm_tn_contiguous_tl(
            a, b, mappings=(index, ends - 2, ends)
        ),
        ("x", "c", "indices", "ends"),
    ),
    Call("fp8_gemm_nt", jdg.fp8_gemm_nt, ("q_x", "q_w")),
    Call("fp8_gemm_nt rows, c", jdg.fp8_gemm_nt, ("q_x", "q_w_rows", "c")),
    Call(
        "fp8_gemm_nt epilogue",
        lambda a, b, bias: jdg.fp8_gemm_nt(a, b, epilogue=jdg.Epilogue(0.5, bias, "swiglu")),
        ("q_x", "q_w", "column_bias"),
    ),
    Call(
        "fp8_gemm_nt_skip_head_mid",
        lambda a, b: jdg.fp8_gemm_nt_skip_head_mid(a, b, head_splits=(64, 64, 64)),
        ("q_x", "q_w"),
    ),
    Call("fp8_gemm_nt vmap", jax.vmap(jdg.fp8_gemm_nt, (0, None)), ("q_xs", "q_w")),
    Call("fp8_gemm_nn", jdg.fp8_gemm_nn, ("q_x", "q_w_t")),
    Call("fp8_gemm_tn", jdg.fp8_gemm_tn, ("q_x_t", "q_w_columns")),
    Call("fp8_gemm_tt", jdg.fp8_gemm_tt, ("q_x_t", "q_w")),
    Call("bf16_gemm_nt", jdg.bf16_gemm_nt, ("x", "w")),
    Call(
        "bf16_gemm_nt epilogue",
        lambda a, b, bias: jdg.bf16_gemm_nt(a, b, epilogue=jdg.Epilogue(0.5, bias, "gelu")),
        ("x", "w", "column_bias"),
    ),
    Call("bf16_gemm_nt c", jdg.bf16_gemm_nt, ("x", "w", "c")),
    Call("bf16_gemm_nn", jdg.bf16_gemm_nn, ("x", "w_t")),
    Call("bf16_gemm_tn", with_f32(jdg.bf16_gemm_tn), ("x_t", "w_t")),
    Call("bf16_gemm_tt", jdg.bf16_gemm_tt, ("x_t", "w")),
    Call("bf16_einsum", functools.partial(jdg.bf16_einsum, "bhr,hdr->bhd"), ("heads", "ws", "c_heads")),
    Call("bf16_einsum sum", functools.partial(jdg.bf16_einsum, "bmk,bnk->mn"), ("xs", "ws")),
    Call("fp8_einsum", functools.partial(jdg.fp8_einsum, "bhr,hdr->bhd"), ("q_heads", "q_ws")),
    Call("bf16_gemm_nt tangent", _tangent(jdg.bf16_gemm_nt), ("x", "w")),
    Call("fp8_linear", jdg.fp8_linear, ("x", "w_f32")),
    Call("m_grouped_fp8_gemm_nt_contiguous", jdg.m_grouped_fp8_gemm_nt_contiguous, ("q_x", "q_ws", "sizes")),
    Call(
        "m_grouped_fp8_gemm_nt_contiguous indices",
        lambda a, b, i: jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, m_indices=i),
        ("q_x", "q_ws", "indices"),
    ),
    Call(
        "m_grouped_fp8_gemm_nt_contiguous ends",
        lambda a, b, e: jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, ends=e, alignment=2),
        ("q_x", "q_ws", "ends"),
    ),
    Call(
        "m_grouped_fp8_gemm_nn_contiguous", jdg.m_grouped_fp8_gemm_nn_contiguous, ("q_x", "q_ws_t", "sizes")
    ),
    Call("m_grouped_bf16_gemm_nt_contiguous", jdg.m_grouped_bf16_gemm_nt_contiguous, ("x", "ws", "sizes")),
    Call("m_grouped_bf16_gemm_nn_contiguous", jdg.m_grouped_bf16_gemm_nn_contiguous, ("x", "ws_t", "sizes")),
    Call(
        "m_grouped_fp8_gemm_nt_gathered", jdg.m_grouped_fp8_gemm_nt_gathered, ("q_x", "q_ws", "rows", "sizes")
    ),
    Call(
        "m_grouped_bf16_gemm_nt_gathered", jdg.m_grouped_bf16_gemm_nt_gathered, ("x", "ws", "rows", "sizes")
    ),
    Call(
        "m_grouped_bf16_gemm_nn_gathered", jdg.m_grouped_bf16_gemm_nn_gathered, ("x", "ws_t", "rows", "sizes")
    ),
    Call(
        "k_grouped_bf16_gemm_tn_gathered",
        lambda a, b, rows, sizes: jdg.k_grouped_bf16_gemm_tn_gathered(a, b, sizes, b_rows=rows),
        ("x", "w_t", "k_rows", "sizes"),
    ),
    Call(
        "k_grouped_fp8_gemm_tn_gathered",
        lambda a, b, rows, sizes: jdg.k_grouped_fp8_gemm_tn_gathered(a, b, sizes, b_rows=rows),
        ("x", "w_t", "k_rows", "sizes"),
    ),
    Call("m_grouped_fp8_gemm_nt_masked", jdg.m_grouped_fp8_gemm_nt_masked, ("q_xs", "q_ws", "counts")),
    Call("m_grouped_bf16_gemm_nt_masked", jdg.m_grouped_bf16_gemm_nt_masked, ("xs", "ws", "counts")),
    Call(
        "k_grouped_fp8_gemm_nt_contiguous",
        jdg.k_grouped_fp8_gemm_nt_contiguous,
        ("q_x", "q_w_rows", "long_sizes"),
    ),
    Call(
        "k_grouped_fp8_gemm_tn_contiguous",
        jdg.k_grouped_fp8_gemm_tn_contiguous,
        ("q_x_t", "q_w_columns", "long_sizes"),
    ),
    Call(
        "k_grouped_bf16_gemm_tn_contiguous",
        jdg.k_grouped_bf16_gemm_tn_contiguous,
        ("x_t", "w_t", "long_sizes"),
    ),
    Call("group_sizes_to_indices", functools.partial(grouped.group_sizes_to_indices, m=TOKENS), ("sizes",)),
    Call("group_sizes_to_ends", functools.partial(grouped.group_sizes_to_ends, alignment=4), ("sizes",)),
    Call("ends_to_group_sizes", functools.partial(grouped.ends_to_group_sizes, alignment=4), ("ends",)),
    Call("ends_to_indices", functools.partial(grouped.ends_to_indices, m=TOKENS, alignment=2), ("ends",)),
    Call(
        "indices_to_group_sizes",
        functools.partial(grouped.indices_to_group_sizes, num_groups=3),
        ("indices",),
    ),
    Call("indices_to_ends", functools.partial(grouped.indices_to_ends, num_groups=3), ("indices",)),
    Call("check_group_sizes", functools.partial(grouped.check_group_sizes, m=TOKENS), ("sizes",)),
    Call("check_m_indices", functools.partial(grouped.check_m_indices, num_groups=3), ("indices",)),
    Call("ragged_dot", jdg.ragged_dot, ("x", "ws_t", "sizes")),
    Call("ragged_dot float32", jdg.ragged_dot, ("x_f32", "ws_t", "sizes")),
    Call(
        "ragged_dot quantised", functools.partial(jdg.ragged_dot, rhs_layout="gnk"), ("q_x", "q_ws", "sizes")
    ),
    Call("ragged_dot vmap", jax.vmap(jdg.ragged_dot, (0, None, None)), ("xs", "ws_t", "sizes")),
    Call("ragged_dot_general", _general, ("x_t", "w_t", "long_sizes")),
    Call("ragged_dot_general float32", _general, ("w_t", "w_t", "long_sizes")),
    Call("grouped_linear", jdg.grouped_linear, ("x", "ws_f32", "sizes")),
    Call("prepare_weight", lambda x, w: jdg.fp8_linear(x, jdg.prepare_weight(w)), ("x", "w_f32")),
    Call("prepare_weights", _prepared(moe.moe_mlp), MOE),
    Call("accumulate_gradients", _accumulated, ("w_f32", "w_f32", "x")),
    Call("swiglu", activation.swiglu, ("x", "row_weights")),
    Call("swiglu_quantize", activation.swiglu_quantize, ("x", "row_weights")),
    Call("swiglu_grad_quantize", activation.swiglu_grad_quantize, ("x", "row_weights", "dact")),
    Call("mqa_logits", _scored, ("queries", "q_keys", *WINDOWS)),
    Call("mqa_logits quantised here", indexer.mqa_logits, ("queries", "keys", *WINDOWS)),
    Call("bf16_mqa_logits", indexer.bf16_mqa_logits, ("queries", "keys", *WINDOWS)),
    Call("quantize_fp4, dequantize_fp4, Fp4Array: logits", _scored_fp4, ("queries", "keys", *WINDOWS)),
    Call("prepare_fp4: dense", _small_weight(jdg.fp8_gemm_nt), ("q_x", "w_f32")),
    Call("prepare_fp4: NVFP4", _small_weight(jdg.bf16_gemm_nt, 16), ("x", "w_f32")),
    Call("prepare_fp4: groups", _small_weight(jdg.grouped_linear), ("x", "ws_f32", "sizes")),
    Call(
        "quantize_per_channel, dequantize_per_channel, PerChannelArray", _per_channel, ("x", "ws_t", "sizes")
    ),
    Call("expand_fp4", lambda w: quantization.expand_fp4(quantization.quantize_fp4(w)).values, ("w_f32",)),
    Call("paged_mqa_logits", _scored_pages, ("queries", "pages", "page_scales", "head_weights", "k_end")),
    Call(
        "paged_mqa_logits of tokens",
        _scored_tokens,
        ("queries", "pages", "page_scales", "head_weights", "k_end", "indices"),
    ),
    Call(
        "get_paged_mqa_logits_metadata",
        functools.partial(indexer.get_paged_mqa_logits_metadata, num_sms=3),
        ("k_end",),
    ),
    Call("indexer_topk", _chosen, ("queries", "q_keys", *WINDOWS)),
    Call("paged_indexer_topk", _chosen_pages, ("queries", "pages", "page_scales", "head_weights", "k_end")),
    Call(
        "mla_append, paged_mla_attention, sparse_mla_attention", serving.attended_latents, ("queries", "keys")
    ),
    Call("indexer_quantize", indexer.indexer_quantize, ("dact",)),
    Call("indexer_quantize into pages", _written, ("dact", "indices")),
    Call("hadamard", indexer.hadamard, ("x_f32",)),
    Call("PagedKVCache, paged_append, ragged_paged_attention", serving.attended, ("x",)),
    Call("KVCache, attend_with_cache", serving.attended_slots, ("x",)),
    Call("topk", functools.partial(jdg.topk, k=3), ("x",)),
    Call(
        "topk values",
        lambda x, end: jdg.topk(x, 3, end=end, values=True, order="index"),
        ("x_f32", "indices"),
    ),
    Call("hc_prenorm_gemm", jdg.hc_prenorm_gemm, ("x", "w_f32")),
    Call("hc_prenorm_gemm splits", functools.partial(jdg.hc_prenorm_gemm, num_splits=2), ("x", "w_f32")),
    Call("expand, pre, post, head", _hyperconnection, ("keys", "hc_weight", "hc_scale", "hc_bias")),
    Call("coefficients", _coefficients, ("keys", "hc_weight", "hc_scale", "hc_bias")),
    Call("sinkhorn", lambda x: hyperconnection.sinkhorn(x[:, :TOKENS]), ("x_f32",)),
    Call("route", _route(), ("logits",)),
    Call("route sqrt_softplus", _route(score="sqrt_softplus"), ("logits",)),
    Call("route groups", _route(score="sigmoid", num_groups=2, top_groups=1, scale=2.5), ("logits", "bias")),
    Call("bias_act, residual_add, rotary, norm, norm_fp8", serving.elementwise, ("x", "hidden_bias")),
    Call(
        "QuantizedWeight, quantize, dequantize, linear, norm_linear, mlp", serving.frozen_layers, ("x", "w_t")
    ),
    Call("masked_softmax, attention", serving.attended_dense, ("heads",)),
    Call("embed, last_tokens", serving.words, ("ids", "x", "ends")),
    Call("moe_route, moe_dispatch, moe_combine", serving.through_experts, ("x", "logits")),
    Call("grouped_linear with a bias", inference.grouped_linear, ("x", "ws_t", "sizes", "group_bias")),
    Call("dispatch, combine", _dispatch_and_combine, ("x", "ids", "weights")),
    Call("plan_dispatch, spread_weights", _row_weights, ("ids", "weights")),
    Call("expert_mlp", moe.expert_mlp, ("x", "w13", "w2", "expert_sizes", "row_weights")),
    Call("moe_mlp", moe.moe_mlp, FROZEN_MOE),
    Call(
        "moe_mlp relu2", functools.partial(moe.moe_mlp, form=RELU2), ("x", "ids", "weights", "w13_half", "w2")
    ),
    Call("moe_mlp_decode", moe.moe_mlp_decode, FROZEN_MOE),
    Call("SharedExperts", _shared, (*MOE, "gate")),
    Call("moe_mlp biases", _biased, (*MOE, "b13", "b2")),
    Call("moe_mlp_decode gpt-oss", functools.partial(moe.moe_mlp_decode, form=GPT_OSS), TURNED_MOE),
    Call("moe_mlp_decode bf16", bf16_recipe(moe.moe_mlp_decode), MOE),
    Call("expert_parallel_moe", _parallel("all_to_all"), FROZEN_MOE, mesh=True),
    Call("moe_layer", _layer, MOE, mesh=True),
    Call("moe_layer tensor", _cut_inside, MOE, mesh=True),
)

GRADIENTS = (
    Call("bf16_gemm_nt", _gradient(jdg.bf16_gemm_nt, 0, 1), ("x", "w")),
    Call(
        "bf16_einsum",
        _gradient(functools.partial(jdg.bf16_einsum, "bhr,hdr->bhd"), 0, 1),
        ("heads", "ws"),
    ),
    Call("fp8_linear", _gradient(jdg.fp8_linear, 0, 1), ("x", "w_f32")),
    Call("fp8_linear frozen", _gradient(jdg.fp8_linear, 0), ("x", "q_w")),
    Call(
        "m_grouped_bf16_gemm_nt_contiguous",
        _gradient(jdg.m_grouped_bf16_gemm_nt_contiguous, 0, 1),
        ("x", "ws", "sizes"),
    ),
    Call(
        "m_grouped_bf16_gemm_nt_gathered",
        _gradient(jdg.m_grouped_bf16_gemm_nt_gathered, 0, 1),
        ("x", "ws", "rows", "sizes"),
    ),
    Call(
        "m_grouped_bf16_gemm_nt_masked",
        _gradient(jdg.m_grouped_bf16_gemm_nt_masked, 0, 1),
        ("xs", "ws", "counts"),
    ),
    Call(
        "k_grouped_bf16_gemm_tn_contiguous",
        _gradient(jdg.k_grouped_bf16_gemm_tn_contiguous, 0, 1),
        ("x_t", "w_t", "long_sizes"),
    ),
    Call("ragged_dot float32", _gradient(jdg.ragged_dot, 0, 1), ("x_f32", "ws_t", "sizes")),
    Call("grouped_linear", _gradient(jdg.grouped_linear, 0, 1), ("x", "ws_f32", "sizes")),
    Call("grouped_linear FP4", _gradient(_small_weight(jdg.grouped_linear), 0), ("x", "ws_f32", "sizes")),
    Call("mqa_logits", _gradient(indexer.mqa_logits, 0, 1, 2), ("queries", "keys", *WINDOWS)),
    Call("bf16_mqa_logits", _gradient(indexer.bf16_mqa_logits, 0, 1, 2), ("queries", "keys", *WINDOWS)),
    Call("swiglu", _gradient(activation.swiglu, 0, 1), ("x", "row_weights")),
    Call(
        "route groups", _gradient(_route(score="sigmoid", num_groups=2, top_groups=1), 0), ("logits", "bias")
    ),
    Call("hc_prenorm_gemm", _gradient(jdg.hc_prenorm_gemm, 0, 1), ("x", "w_f32")),
    Call(
        "expand, pre, post, head",
        _gradient(_hyperconnection, 0, 1, 2, 3),
        ("keys", "hc_weight", "hc_scale", "hc_bias"),
    ),
    Call("topk", _gradient(lambda x: jdg.topk(x, 3, values=True)[0], 0), ("x",)),
    Call("dispatch, combine", _gradient(_dispatch_and_combine, 0, 2), ("x", "ids", "weights")),
    Call("moe_mlp", _gradient(moe.moe_mlp, 0, 2, 3, 4), MOE),
    Call("moe_mlp biases", _gradient(_biased, 0, 2, 3, 4, 5, 6), (*MOE, "b13", "b2")),
    Call("moe_mlp biases bf16", _gradient(bf16_recipe(_biased), 0, 5, 6), (*MOE, "b13", "b2")),
    Call("moe_mlp gpt-oss", _gradient(functools.partial(moe.moe_mlp, form=GPT_OSS), 0, 2, 3, 4), TURNED_MOE),
    Call(
        "grouped_linear turned",
        _gradient(functools.partial(jdg.grouped_linear, weight_layout="kn"), 0, 1),
        ("x", "ws_t_f32", "sizes"),
    ),
    Call("SharedExperts", _gradient(_shared, 0, 2, 3, 4, 5), (*MOE, "gate")),
    Call("moe_mlp prepared", _gradient(_prepared(moe.moe_mlp), 0, 2, 3, 4), MOE),
    Call("moe_mlp bf16", _gradient(bf16_recipe(moe.moe_mlp), 0, 2, 3, 4), MOE),
    Call("moe_layer", _gradient(lambda *args: _layer(*args)[0], 0, 2, 3, 4), MOE, mesh=True),
)

CALLS = tuple(
    [Call(f"{call.name}: value", call.fn, call.operands, call.mesh) for call in FORWARD]
    + [Call(f"{call.name}: gradient", call.fn, call.operands, call.mesh) for call in GRADIENTS]
)


def called_names() -> set[str]:
    """Public names that a call of the table begins with, or lists."""
    named = (call.name.split(": ")[0].split(", ") for call in CALLS)
    return {name.split()[0] for names in named for name in names}
