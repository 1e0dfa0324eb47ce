"""What the device does: a step of many requests over a paged cache; and one request anew, without it."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from serving.model import Config, Tree, forward, logits_of

from jax_deepgemm.attention import PagedKVCache, paged_append, ragged_paged_attention


class Batch(NamedTuple):
    """The new tokens of all slots behind each other, int32. A slot that has none has no rows.

    Attributes:
      tokens: [rows]; -1: the token that the step before made in this slot.
      tables: [slots, pages]: which pages a slot has.
      starts: [slots + 1], where rows of each slot begin.
      lens: [slots], tokens of each slot, the new ones among them.
    """

    tokens: Any
    tables: Any
    starts: Any
    lens: Any


@functools.partial(jax.jit, static_argnames=("config", "decode"), donate_argnames="cache")
def step(
    params: Tree, cache: PagedKVCache, made: jax.Array, batch: Batch, *, config: Config, decode: bool
) -> tuple[PagedKVCache, jax.Array, jax.Array]:
    """The cache with the new tokens' keys, and of each slot the likeliest next token and its logit.

    Prompts, parts of them and single tokens are sequences of one attention. decode: all are single tokens.
    """
    tables, starts, lens = batch.tables, batch.starts, batch.lens
    row = jnp.arange(batch.tokens.shape[0])
    valid = row < starts[-1]
    slot = jnp.where(valid, jnp.sum(starts[1:] <= row[:, None], axis=1), 0)
    position = jnp.where(valid, lens[slot] - starts[slot + 1] + row, 0)
    page = tables[slot, position // cache.page_size]
    where = jnp.where(valid, page * cache.page_size + position % cache.page_size, -1)
    tokens = jnp.where(batch.tokens < 0, made[slot], batch.tokens)
    rotary = position, jnp.asarray(config.inv_freq)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal cache
        cache, q = paged_append(cache, k, v, where, q=q, rotary=rotary, layer=layer)
        most = 1 if decode else None
        return ragged_paged_attention(q, cache, tables, starts, lens, max_q_len=most, layer=layer)

    x = forward(params, tokens, valid, attend, config, few=decode)
    logits = logits_of(params, x[jnp.maximum(starts[1:] - 1, 0)])
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "rounded"))
def recompute(
    params: Tree, tokens: jax.Array, count: jax.Array, *, config: Config, rounded: bool = False
) -> tuple[jax.Array, ...]:
    """One whole sequence of count tokens, by attention of plain JAX, alone: which token follows each of them.

    rounded: attention's probabilities are bfloat16, as kernels multiply them; else all is float32.

    Returns:
      the likeliest successor of each token, its logit, the logit of the successor that is there, and the
      logits' standard deviation.
    """
    position = jnp.arange(len(tokens))
    angle = position[:, None, None] * jnp.asarray(config.inv_freq)
    past = position <= position[:, None]

    def turn(x: jax.Array) -> jax.Array:
        a, b, rest = jnp.split(x.astype(jnp.float32), [config.rotary // 2, config.rotary], axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1).astype(x.dtype)

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.astype(jnp.float32) for x in (turn(q), turn(k), v))
        q = q.reshape(len(tokens), config.kv_heads, -1, config.head_dim)
        exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        scores = exact("qgrd,kgd->grqk", q, k) * config.head_dim**-0.5
        shares = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        shares = shares.astype(jnp.bfloat16).astype(jnp.float32) if rounded else shares
        out = exact("grqk,kgd->qgrd", shares, v)
        return out.reshape(len(tokens), config.heads, -1).astype(jnp.bfloat16)

    logits = logits_of(params, forward(params, tokens, position < count, attend, config))
    there = jnp.take_along_axis(logits, jnp.roll(tokens, -1)[:, None], axis=-1)[:, 0]
    return jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1), there, jnp.std(logits)


def copies_of(cache: PagedKVCache, program: Any) -> int:
    """How many copies of the cache's keys or values a compiled program makes."""
    shapes = {",".join(map(str, x.shape)) for x in (cache.k, cache.v)}
    made = re.findall(r"= \(?\w+\[([\d,]+)\].*? copy(?:-start)?\(", program.as_text())
    return sum(shape in shapes for shape in made)
