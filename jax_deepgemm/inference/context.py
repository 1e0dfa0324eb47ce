"""DeepSpeed's softmax_context: heads of q and k are rotated, keys and values are kept, attention is computed.

What DeepSpeed keeps between calls goes in and comes out: a `Workspace`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.attention import KVCache, attend_with_cache
from jax_deepgemm.inference import checks
from jax_deepgemm.inference.contiguous import attention
from jax_deepgemm.inference.masks import bias_of
from jax_deepgemm.inference.names import Given, there
from jax_deepgemm.inference.rotary import rotary

STEP = 16
"""Numbers of a head are a multiple of this in a KVCache."""


class Workspace(NamedTuple):
    """The keys and values of all layers, and how many tokens each sequence has.

    Attributes:
      cache: of [layers, ..], in the type that the name says. That of float32, or of heads whose width is no
        multiple of 16, is for these functions only.
      lengths: int32 [batch].
    """

    cache: KVCache
    lengths: jax.Array


def allocate_workspace(given: Given) -> Workspace:
    """A cache of zeros for the heads that one of mp_size devices has."""
    sizes = {
        name: checks.whole(given.name, name, given[name], 1)
        for name in ("hidden_dim", "num_heads", "batch_size", "num_layers", "mp_size", "max_out_tokens")
    }
    heads, parts = sizes["num_heads"], sizes["mp_size"]
    if sizes["hidden_dim"] % heads or heads % parts:
        raise ValueError(
            f"{given.name}: hidden_dim is {sizes['hidden_dim']}, num_heads {heads} and mp_size {parts}, "
            "need hidden_dim a multiple of num_heads, and that of mp_size."
        )
    batch, d = sizes["batch_size"], sizes["hidden_dim"] // heads
    rounded = -(-d // STEP) * STEP
    form: dict[str, Any] = {"layers": sizes["num_layers"]}
    cache = KVCache.create(batch, sizes["max_out_tokens"], heads // parts, rounded, jnp.bfloat16, **form)
    if given.kind != jnp.bfloat16 or rounded != d:
        k, v = (jnp.zeros((*x.shape[:-1], d), given.kind) for x in (cache.paged.k, cache.paged.v))
        cache = dataclasses.replace(cache, paged=dataclasses.replace(cache.paged, k=k, v=v))
    return Workspace(cache, jnp.zeros(batch, jnp.int32))


def reset_cache(given: Given, *, cache: Workspace | None = None) -> Workspace:
    """No tokens are kept; what they were is written over."""
    workspace = _workspace(given, cache)
    return Workspace(workspace.cache, jnp.zeros_like(workspace.lengths))


def _workspace(given: Given, cache: Any) -> Workspace:
    if not isinstance(cache, Workspace):
        raise TypeError(
            f"{given.name}: cache is {checks.described(cache)}, need cache= what "
            "allocate_workspace_{type} returned, or the last call."
        )
    return cache


def softmax_context(given: Given, *, cache: Workspace | None = None) -> tuple[jax.Array, Workspace]:
    """(out [b, s, heads * d], the workspace), whose tokens count from the last layer on."""
    workspace = _workspace(given, cache)
    kept, lengths = workspace
    q, k, v = _heads(given, kept)
    b, s, heads, d = q.shape
    positions = lengths[:, None] + jnp.arange(s, dtype=jnp.int32)
    if int(given.rotary_dim) > 0 and (given.rotate_half or given.rotate_every_two):
        style = "half" if given.rotate_half else "interleaved"
        form: dict[str, Any] = {"dim": int(given.rotary_dim), "theta": float(given.get("rope_theta", 1e4))}
        q, k = (rotary(x, positions, style=style, **form) for x in (q, k))
    k, v = (jnp.repeat(x, kept.paged.kv_heads // x.shape[2], axis=2) for x in (k, v))
    causal = bool(given.triangular) or s == 1 or bool(given.local_attention)
    window = int(given.window_size) if given.local_attention else None
    scale, layer = float(given.norm_factor) ** 2, int(given.layer_id)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    plain = not there(given.attn_mask) and not there(given.alibi)
    if plain and q.dtype != np.float32 and not d % STEP:
        out, kept = attend_with_cache(q, kept, lengths, k, v, layer=layer, **options)
    else:
        kept = _appended(kept, k, v, positions, layer)
        keys, values = (_dense(x[layer], kept) for x in (kept.paged.k, kept.paged.v))
        shape = b, heads, s, keys.shape[1]
        mask, alibi = (_long(given[one], shape[-1]) for one in ("attn_mask", "alibi"))
        bias = bias_of(given.name, mask, alibi, shape)
        out = attention(q, keys, values, bias=bias, q_offset=lengths, kv_lens=lengths + s, **options)
    last = layer == int(given.num_layers) - 1
    return out.reshape(b, s, heads * d), Workspace(kept, lengths + s if last else lengths)


def _heads(given: Given, cache: KVCache) -> tuple[jax.Array, ...]:
    """q, k and v [b, s, heads, d] of [b, s, (heads + 2 kv heads) * d]."""
    qkv = checks.floats(given.name, "query_key_value", given.query_key_value)
    heads = checks.whole(given.name, "heads", given.heads, 1)
    kv = max(int(given.get("num_kv", 0)), 0) or heads
    d, own = cache.paged.k.shape[-1], cache.paged.kv_heads
    if qkv.ndim != 3 or qkv.shape[2] != (heads + 2 * kv) * d or heads % kv or own % kv:
        raise ValueError(
            f"{given.name}: query_key_value is {list(qkv.shape)}, of {heads} heads and {kv} of keys, and "
            f"the cache has {own} of {d} numbers, need [batch, tokens, (heads + 2 kv heads) * d]."
        )
    if qkv.shape[0] != cache.batch or cache.paged.k.dtype != qkv.dtype:
        raise ValueError(
            f"{given.name}: query_key_value is {checks.described(qkv)} and the cache is of {cache.batch} "
            f"sequences in {cache.paged.k.dtype.name}, need the same."
        )
    split = qkv.reshape(*qkv.shape[:2], -1, d)
    return split[:, :, :heads], split[:, :, heads : heads + kv], split[:, :, heads + kv :]


def _appended(cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array, layer: int) -> KVCache:
    """With tokens [b, s, ..] at positions [b, s]; those behind the capacity are dropped."""
    paged, size = cache.paged, cache.paged.page_size
    first = jnp.arange(cache.batch, dtype=jnp.int32)[:, None] * (cache.capacity // size)
    page = jnp.where(positions < cache.capacity, first + positions // size, paged.pages)
    at = (layer, page, slice(None), positions % size)
    k, v = (old.at[at].set(x, mode="drop") for old, x in ((paged.k, k), (paged.v, v)))
    return dataclasses.replace(cache, paged=dataclasses.replace(paged, k=k, v=v))


def _dense(pages: jax.Array, cache: KVCache) -> jax.Array:
    """[b, capacity, heads, d] of one layer's [pages, heads, page, d]."""
    split = pages.reshape(cache.batch, -1, *pages.shape[1:]).swapaxes(2, 3)
    return split.reshape(cache.batch, cache.capacity, *split.shape[3:])


def _long(x: Any, keys: int) -> Any:
    """A mask or ALiBi of the tokens there are, for a cache with room for more, which are not seen anyway."""
    if not there(x):
        return None
    x = jnp.asarray(checks.unwrapped(x))
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(keys - x.shape[-1], 0))])
