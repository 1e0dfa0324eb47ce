"""attend_with_cache: a batch of sequences, each with its own slots, written to and read in one call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.attention import checks
from jax_deepgemm.ops.attention.api import ragged_paged_attention
from jax_deepgemm.ops.attention.cache import KVCache
from jax_deepgemm.ops.paged_append import paged_append
from jax_deepgemm.ops.paged_append.checks import describe, integers, wrong

_NAME = "attend_with_cache"


def attend_with_cache(
    q: ArrayLike,
    cache: KVCache,
    lengths: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    *,
    counts: ArrayLike | None = None,
    rotary: tuple[ArrayLike | None, ArrayLike] | None = None,
    interleaved: bool = False,
    layer: ArrayLike | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends keys and values to a cache of fixed slots and attends to all that it holds: prompts, decoding.

    Token j of sequence b goes to slot lengths[b] + j of the sequence, and stands at that position. Its row of
    the result is that of `ragged_paged_attention`, whose formula this is.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.attention import KVCache, attend_with_cache
    >>> cache = KVCache.create(batch=2, capacity=64, kv_heads=2, head_dim=32)
    >>> lengths = jnp.zeros(2, jnp.int32)
    >>> q = jax.random.normal(jax.random.key(0), (2, 9, 4, 32), jnp.bfloat16)
    >>> k, v = jax.random.normal(jax.random.key(1), (2, 2, 9, 2, 32), jnp.bfloat16)
    >>> whole, _ = attend_with_cache(q, cache, lengths, k, v)
    >>> out, cache = attend_with_cache(q[:, :8], cache, lengths, k[:, :8], v[:, :8])         # the prompt
    >>> last, cache = attend_with_cache(q[:, 8:], cache, lengths + 8, k[:, 8:], v[:, 8:])    # one more token
    >>> bool(jnp.allclose(last, whole[:, 8:], atol=0.01)), out.shape
    (True, (2, 8, 4, 32))

    Args:
      q: [b, s, heads, head_dim] in the cache's dtype; bfloat16 or float16 if that is FP8.
      cache: a KVCache. Donate it, and it is updated in place.
      lengths: integers [b], or a number for all: tokens that the cache has of each sequence, without the new
        ones. Not more than capacity - s: a token behind is not written, and results of its sequence mean
        nothing.
      k: [b, s, kv_heads, head_dim]. None: nothing is written, and q are the last s of the `lengths` tokens.
      v: [b, s, kv_heads, v_head_dim]; goes with k.
      counts: integers [b], where sequences have different numbers of new tokens: of the s tokens of each, the
        first so many count. The others are padding: not written, and zeros in the result. None: s.
      rotary: (positions integers [b, s], inv_freq float32 [r]) as `paged_append` takes them, of q and k.
        None in the place of positions: lengths[b] + j.
      interleaved: which pairs turn, as in `paged_append`.
      layer: of a cache with layers, which one: an int or an integer array [].
      causal, window, softcap, sinks, alibi_slopes, scale: as the parameters of
        `ragged_paged_attention`.

    Returns:
      ([b, s, heads, v_head_dim] in the dtype of q, the new cache).

    Raises:
      TypeError, ValueError: types, shapes or options outside of the above; the message says what to do.

    On a mesh heads are cut over devices; a batch is cut by jax.shard_map, each device having a cache. Has no
    derivative.
    """
    query = checks.query(_NAME, q, cache.paged.check(_NAME), "[b, s, heads, head_dim]")
    batch, new, heads, depth = query.shape
    if batch != cache.batch:
        raise ValueError(f"{_NAME}: q has {batch} sequences and the cache {cache.batch}, need as many.")
    held = _per_sequence("lengths", lengths, batch)
    number = _per_sequence("counts", new if counts is None else counts, batch)
    number = jnp.clip(number, 0, new)
    if (k is None) != (v is None):
        raise ValueError(f"{_NAME}: k and v go together; got {'v' if k is None else 'k'} alone.")
    _check_known(lengths, 0 if k is None else new, cache.capacity)
    row = jnp.arange(new, dtype=jnp.int32)[None]
    at = held[:, None] + row
    rows, paged = query.reshape(-1, heads, depth), cache.paged
    if k is not None:
        inside = (at >= 0) & (at < cache.capacity) & (row < number[:, None])
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * cache.capacity
        slots = jnp.where(inside, first + at, -1).reshape(-1)
        new_k, new_v = _flat("k", k, batch, new), _flat("v", v, batch, new)
        form: dict[str, Any] = {"layer": layer}
        if rotary is not None:
            form |= {"q": rows, "rotary": _rotary(rotary, at), "interleaved": interleaved}
        found = paged_append(paged, new_k, new_v, slots, **form)
        paged, rows = (found, rows) if rotary is None else found
        held = held + number
    elif rotary is not None:
        raise ValueError(
            f"{_NAME}: rotary is given and k is not: keys in the cache are turned. Leave it out."
        )
    tables, starts = cache.block_tables, jnp.arange(batch + 1, dtype=jnp.int32) * new
    if counts is not None:  # the padding behind each sequence is a sequence of its own, without keys
        starts = jnp.append(jnp.stack([starts[:-1], starts[:-1] + number], axis=1).reshape(-1), batch * new)
        held = jnp.stack([held, jnp.zeros_like(held)], axis=1).reshape(-1)
        tables = jnp.repeat(tables, 2, axis=0)
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    options |= {"sinks": sinks, "alibi_slopes": alibi_slopes, "layer": layer}
    out = ragged_paged_attention(rows, paged, tables, starts, held, max_q_len=max(new, 1), **options)
    return out.reshape(batch, new, heads, paged.v_head_dim), KVCache(paged, cache.capacity)


def _per_sequence(name: str, given: Any, batch: int) -> jax.Array:
    x = unwrapped(given)
    if np.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.integer):
        return jnp.full(batch, x, jnp.int32)
    return integers(_NAME, name, given, (batch,), "one of each sequence of q.")


def _flat(name: str, given: Any, batch: int, new: int) -> jax.Array:
    x = unwrapped(given)
    if not isinstance(x, (jax.Array, np.ndarray)) or x.ndim != 4 or x.shape[:2] != (batch, new):
        need = f"[{batch}, {new}, kv_heads, ..]: sequences and tokens as q has them"
        wrong(_NAME, name, x, need, "A token is [kv_heads, numbers of a head].")
    return jnp.asarray(x).reshape(-1, *x.shape[2:])


def _rotary(given: Any, at: jax.Array) -> tuple[jax.Array, Any]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{_NAME}: rotary is {describe(given)}, need (positions or None, inv_freq [r]).")
    positions, inv_freq = given
    if positions is not None:
        at = integers(_NAME, "positions", positions, at.shape, "one of each token of q.")
    return at.reshape(-1), inv_freq


def _check_known(lengths: Any, new: int, capacity: int) -> None:
    """Of lengths that are known while tracing, those for which there is no room."""
    x = unwrapped(lengths)
    if not isinstance(x, (int, np.integer, np.ndarray, list, tuple)):
        return
    most = int(np.max(x, initial=0))
    if most + new > capacity:
        raise ValueError(
            f"{_NAME}: lengths are up to {most}, and {new} tokens are new, need at most capacity = "
            f"{capacity} together. Create the cache with more capacity."
        )
