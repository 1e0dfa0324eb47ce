"""Calls of what serving needs, for public_calls: attention with caches, and inference functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import attention, inference
from jax_deepgemm.ops import mla as latent
from tests.shared.public_operands import EXPERTS, TOKENS, TOP_K, WIDTH


def attended(x: jax.Array) -> jax.Array:
    """Appended, turned, and attended to: heads of 32."""
    q, k = x.reshape(TOKENS, -1, 32), x[:, :64].reshape(TOKENS, 2, 32)
    at, freq = jnp.arange(TOKENS, dtype=jnp.int32), jnp.ones(16, jnp.float32)
    cache = attention.PagedKVCache.create(2, 16, 2, 32)
    cache, q = attention.paged_append(cache, k, k, at + 16, q=q, rotary=(at, freq))
    lens = jnp.full(1, TOKENS, jnp.int32)
    tables, starts = jnp.ones((1, 1), jnp.int32), jnp.arange(2, dtype=jnp.int32) * TOKENS
    slopes = jnp.ones(q.shape[1], jnp.float32)
    form = {"window": 3, "softcap": 2.0, "alibi_slopes": slopes, "sinks": slopes}
    return attention.ragged_paged_attention(q, cache, tables, starts, lens, num_seqs=lens[0], **form)


def attended_slots(x: jax.Array) -> jax.Array:
    q, k = x.reshape(2, TOKENS // 2, -1, 32), x[:, :64].reshape(2, TOKENS // 2, 2, 32)
    cache = attention.KVCache.create(2, 16, 2, 32, jnp.float8_e4m3fn)
    lengths, freq = jnp.ones(2, jnp.int32), jnp.ones(16, jnp.float32)
    out, _ = attention.attend_with_cache(q, cache, lengths, k, k, counts=lengths, rotary=(None, freq))
    return out


def attended_latents(q: jax.Array, keys: jax.Array) -> Any:
    at, form = jnp.arange(TOKENS, dtype=jnp.int32), {"scale": 0.1, "v_head_dim": 16}
    cache = latent.mla_append(jnp.zeros((2, 16, 32), keys.dtype), keys[:TOKENS], at + 16)
    tables, starts, lens = jnp.ones((1, 1), jnp.int32), jnp.arange(2) * TOKENS, jnp.full(1, TOKENS)
    dense = latent.paged_mla_attention(q, cache, tables, starts, lens, **form)
    return dense, latent.sparse_mla_attention(q, cache, at[:, None] + 16, **form)


def elementwise(x: jax.Array, bias: jax.Array) -> Any:
    turned = inference.rotary(x[:, None], jnp.arange(TOKENS, dtype=jnp.int32), dim=WIDTH)
    sums = inference.residual_add(x, x, x, bias, mode="parallel", mp_size=2)
    acted = inference.bias_act(x, bias, "gelu_erf", gated="interleaved")
    fp8 = inference.norm_fp8(x, bias, kind="rms", bias=bias)
    return turned, sums, acted, inference.norm(x, bias, bias, residual=x, return_sum=True), fp8


def frozen_layers(x: jax.Array, w: jax.Array) -> Any:
    """A layer and an MLP with weights in few bits, in the layouts that products take."""
    half, quarter = inference.quantize(w), inference.quantize(w.T, "int4", group_size=64)
    y, _ = inference.norm_linear(x, half, kind="rms")
    z, _ = inference.mlp(x, half, quarter, act="silu")
    fine = inference.QuantizedWeight(half.values, half.scales, "int8")
    return y, z, inference.linear(x, inference.dequantize(fine, jnp.bfloat16))


def attended_dense(heads: jax.Array) -> Any:
    x = heads[None]
    scores = inference.masked_softmax(x.astype(jnp.float32), causal=True, window=2)
    return scores, inference.attention(x, x, x, causal=True, q_offset=1, kv_lens=4)


def words(ids: jax.Array, x: jax.Array, ends: jax.Array) -> Any:
    return inference.embed(ids, x, x, ids, offset=1), inference.last_tokens(x, ends)


def through_experts(x: jax.Array, logits: jax.Array) -> jax.Array:
    ids, weights = inference.moe_route(logits, TOP_K)
    rows, plan = inference.moe_dispatch(x, ids, EXPERTS)
    return inference.moe_combine(rows, plan, weights)
