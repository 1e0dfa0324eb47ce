"""Attention to keys in pages in jax.numpy, in float32: sequence by sequence, some of its rows at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.products import dot_general

ROWS = 32
"""Rows of a sequence that are computed at once."""


def ragged_paged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array,
    v_scale: jax.Array,
    tables: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    layer: jax.Array,
    sinks: jax.Array,
    slopes: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    with_sinks: bool,
    with_slopes: bool,
    max_q_len: int,
    **_unread: object,
) -> list[jax.Array]:
    """out [t, h, v] and lse [t, h]; op.py says what the operands are."""
    heads, group = k.shape[2], q.shape[1] // k.shape[2]
    tokens, depth = q.shape[0], q.shape[2]
    q = q.reshape(tokens, heads, group, depth)
    sinks, slopes = sinks.reshape(heads, group), slopes.reshape(heads, group)
    layers, pages, _, size, _ = k.shape
    sequences, columns = tables.shape
    sink = sinks if with_sinks else jnp.full((heads, group), -jnp.inf, jnp.float32)
    out = jnp.zeros((tokens, heads, group, v.shape[-1]), q.dtype)
    lse = jnp.broadcast_to(sink, (tokens, heads, group)).astype(jnp.float32)
    out, lse, *_rest = same_varying_axes([out, lse, q, k])  # as what the loops end with
    if 0 in (tokens, heads, group, layers, pages, sequences, columns):
        return _flat(out, lse)
    held = (layer[0] >= 0) & (layer[0] < layers)
    at_layer = jnp.clip(layer[0], 0, layers - 1)
    key = jnp.arange(columns * size)
    begins = jnp.clip(cu_q_lens, 0, tokens)
    step = min(ROWS, tokens) if isinstance(tokens, int) else ROWS

    def keys_of(x: jax.Array, by: jax.Array, table: jax.Array, seen: jax.Array) -> jax.Array:
        """float32 [keys, g, d] of one sequence, zeros where nothing is to be read."""
        mine = (
            x[at_layer, jnp.clip(table, 0, pages - 1)].astype(jnp.float32) * by[at_layer][None, :, None, None]
        )
        rows = jnp.moveaxis(mine, 1, 2).reshape(columns * size, heads, -1)
        return jnp.where(seen[:, None, None], rows, 0)

    def of_sequence(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, end = begins[i], begins[i + 1]
        count = jnp.maximum(end - first, 0)
        length = jnp.clip(kv_lens[i], 0, columns * size)
        table = tables[i]
        there = jnp.repeat((table >= 0) & (table < pages), size) & (key < length) & held
        keys, values = keys_of(k, k_scale, table, there), keys_of(v, v_scale, table, there)

        def of_rows(chunk: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            j = chunk * step + jnp.arange(step)
            mine = (j < count) & ((j < max_q_len) | (max_q_len == 0))
            at = jnp.where(mine, first + j, tokens)
            position = length - count + j
            seen = there[None] & mine[:, None] & (position >= 0)[:, None]
            if causal:
                seen &= key[None] <= position[:, None]
            if window:
                seen &= key[None] > position[:, None] - window
            rows = q.at[at].get(mode="fill", fill_value=0).astype(jnp.float32)
            products = dot_general(rows, keys, ((3,), (2,)), ((1,), (1,)))  # [g, j, r, k]
            scores = jnp.moveaxis(products, 0, 1) * scale
            if softcap:
                scores = softcap * jnp.tanh(scores / softcap)
            if with_slopes:
                distance = (key[None] - position[:, None]).astype(jnp.float32)
                scores += slopes[None, ..., None] * distance[:, None, None]
            scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
            most = jnp.maximum(jnp.max(scores, axis=-1), sink[None])
            most = jnp.where(most == -jnp.inf, 0, most)
            weights = jnp.where(seen[:, None, None], jnp.exp(scores - most[..., None]), 0)
            total = jnp.sum(weights, axis=-1) + jnp.exp(sink[None] - most)
            read = jnp.where(jnp.any(seen, axis=0)[:, None, None], values, 0)
            sums = jnp.moveaxis(dot_general(weights, read, ((3,), (0,)), ((1,), (1,))), 0, 1)
            sums = jnp.where(total[..., None] == 0, 0, sums / total[..., None])
            parts = sums, jnp.log(total) + most
            return tuple(
                x.at[at].set(part.astype(x.dtype), mode="drop")
                for x, part in zip(results, parts, strict=True)
            )  # type: ignore[return-value]

        return lax.fori_loop(0, (count + step - 1) // step, of_rows, results)

    return _flat(*lax.fori_loop(0, sequences, of_sequence, (out, lse)))


def _flat(out: jax.Array, lse: jax.Array) -> list[jax.Array]:
    tokens, heads, group, depth = out.shape
    return [out.reshape(tokens, heads * group, depth), lse.reshape(tokens, heads * group)]
