"""Latent attention in jax.numpy, in float32: the paged op is ragged_paged_attention of one head of keys, the
sparse one goes token by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.products import dot_general
from jax_deepgemm.ops.attention.reference import ragged_paged


def paged(
    q: jax.Array,
    cache: jax.Array,
    tables: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    layer: jax.Array,
    *,
    v_head_dim: int,
    scale: float,
    causal: bool,
    max_q_len: int,
    **_unread: Any,
) -> list[jax.Array]:
    """out [t, h, v] and lse [t, h]; op.py says what the operands are."""
    keys, none = cache[:, :, None], jnp.zeros(q.shape[1], jnp.float32)
    ones = jnp.ones((cache.shape[0], 1), jnp.float32)
    return ragged_paged(
        *(q, keys, keys[..., :v_head_dim], ones, ones, tables, cu_q_lens, kv_lens, layer, none, none),
        scale=scale,
        causal=causal,
        window=0,
        softcap=0.0,
        with_sinks=False,
        with_slopes=False,
        max_q_len=max_q_len,
    )


def sparse(
    q: jax.Array,
    cache: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    v_head_dim: int,
    scale: float,
    **_unread: Any,
) -> list[jax.Array]:
    """The same of keys that each token names."""
    layers, pages, size, depth = cache.shape
    tokens, heads, _ = q.shape
    if 0 in (layers, pages, tokens, heads, slots.shape[1]):
        return [
            jnp.zeros((tokens, heads, v_head_dim), q.dtype),
            jnp.full((tokens, heads), -jnp.inf, jnp.float32),
        ]
    held = (layer[0] >= 0) & (layer[0] < layers)
    rows = cache.reshape(layers, pages * size, depth)
    at_layer = jnp.clip(layer[0], 0, layers - 1)

    def of_token(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mine, named = given
        seen = (named >= 0) & (named < pages * size) & held
        keys = rows[at_layer, jnp.clip(named, 0, pages * size - 1)].astype(jnp.float32)
        keys = jnp.where(seen[:, None], keys, 0)
        scores = dot_general(mine.astype(jnp.float32), keys, ((1,), (1,))) * scale
        scores = jnp.where(seen[None], scores, -jnp.inf)
        most = jnp.max(scores, axis=-1, keepdims=True)
        most = jnp.where(most == -jnp.inf, 0, most)
        weights = jnp.where(seen[None], jnp.exp(scores - most), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        sums = dot_general(weights, keys[:, :v_head_dim], ((1,), (0,)))
        out = jnp.where(total == 0, 0, sums / total).astype(q.dtype)
        return out, (jnp.log(total) + most)[:, 0]

    return list(lax.map(of_token, (q, slots)))
