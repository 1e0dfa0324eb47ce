"""paged_append: checks, and calls of the ops."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.ops.paged_append import checks
from jax_deepgemm.ops.paged_append.cache import BFLOAT16, FLOAT16, PagedKVCache
from jax_deepgemm.ops.paged_append.checks import FLOAT32, describe
from jax_deepgemm.ops.paged_append.op import append_op

_NAME = "paged_append"


def paged_append(
    cache: PagedKVCache,
    k: ArrayLike,
    v: ArrayLike,
    slots: ArrayLike,
    *,
    q: ArrayLike | None = None,
    rotary: tuple[ArrayLike, ArrayLike] | None = None,
    interleaved: bool = False,
    layer: ArrayLike | None = None,
) -> Any:
    """Writes the keys and values of tokens to their slots of a cache, rotated and in FP8 where asked.

    Slot s is token s % page_size of page s // page_size. With `rotary`, angle i of a token is its position
    times inv_freq[i], and turns a pair of numbers (a, b) of each head, in float32:

        a' = a cos - b sin,   b' = a sin + b cos

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.attention import PagedKVCache, paged_append
    >>> cache = PagedKVCache.create(pages=4, page_size=16, kv_heads=2, head_dim=64)
    >>> k, v = jax.random.normal(jax.random.key(0), (2, 3, 2, 64), jnp.bfloat16)
    >>> q = jax.random.normal(jax.random.key(1), (3, 8, 64), jnp.bfloat16)
    >>> inv_freq = 10000.0 ** (-jnp.arange(32) / 32)
    >>> slots, positions = jnp.array([17, -1, 40]), jnp.array([5, 6, 0])
    >>> cache, q = paged_append(cache, k, v, slots, q=q, rotary=(positions, inv_freq))
    >>> q.shape, jnp.any(cache.v[0] != 0, axis=(1, 3)).sum(axis=1).tolist()
    ((3, 8, 64), [0, 1, 1, 0])

    Args:
      cache: a PagedKVCache. Donate it, and it is updated in place.
      k: [t, kv_heads, head_dim], bfloat16, float16 or float32.
      v: [t, kv_heads, v_head_dim] in the dtype of k.
      slots: integers [t]. Slots outside of the cache, such as -1, skip their token. Slots are distinct: of
        several tokens with one slot, parts of any may be written.
      q: [t, heads, head_dim] in the dtype of k, to be rotated too; heads is a multiple of kv_heads.
      rotary: (positions integers [t], inv_freq float32 [r]); the first 2 r numbers of a head turn, 2 r up to
        head_dim, the others stay. The products are float32. None: nothing turns.
      interleaved: pairs are numbers 2 i and 2 i + 1 (GPT-J), else i and i + r (Llama, GPT-NeoX).
      layer: of a cache with layers, which one: an int or an integer array []. One outside of the cache, in an
        array, skips all tokens.

    Returns:
      The new cache; with q, (cache, q). Numbers are rounded once to the cache's dtype, to nearest even; of an
      FP8 cache number / scale is, held to +-448.

    Raises:
      TypeError, ValueError: types and shapes that do not fit; the message says what to do.

    On a mesh heads are cut over devices, and pages too if the cache is so. Has no derivative. Source:
    "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864; pages:
    arXiv:2309.06180.
    """
    cache.check(_NAME)
    k, v = _new(cache, k, v)
    tokens = k.shape[0]
    at = checks.integers(_NAME, "slots", slots, (tokens,), "one of each token of k.")
    arrays = [k, v, at, cache.k, cache.v, cache.k_scale, cache.v_scale]
    arrays.append(checks.layer_index(_NAME, cache, layer))
    dtypes: tuple[np.dtype, ...] = (cache.dtype, cache.dtype)
    op = append_op()
    if rotary is None and q is not None:
        raise ValueError(f"{_NAME}: q is given to be rotated, and rotary is None. Give both, or neither.")
    if rotary is not None:
        op = append_op("rotary")
        arrays += _rotary(rotary, tokens, cache.head_dim)
    if q is not None:
        query = _query(cache, k, q)
        op = append_op("query", query.shape[1] // cache.kv_heads)
        arrays.append(query)
        dtypes = (*dtypes, np.dtype(query.dtype))
    new_k, new_v, *turned = op(
        *same_varying_axes(arrays), dtypes=dtypes, interleaved=bool(interleaved), fallback="reference"
    )
    new = PagedKVCache(new_k, new_v, cache.k_scale, cache.v_scale, cache.stacked)
    return (new, turned[0]) if turned else new


def _new(cache: PagedKVCache, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
    given = unwrapped(k)
    allowed = (BFLOAT16, FLOAT16, FLOAT32)
    if getattr(given, "dtype", None) not in allowed:
        known = ", ".join(one.name for one in allowed)
        checks.wrong(_NAME, "k", given, known, "Convert it: k.astype(jnp.bfloat16). FP8 is made here.")
    kind = np.dtype(given.dtype)
    k = checks.array(_NAME, "k", given, kind, "", "")
    v = checks.array(_NAME, "v", v, kind, f"{kind.name}, as k is", f"Convert it: v.astype({kind.name!r}).")
    if k.ndim != 3:
        raise ValueError(
            f"{_NAME}: k is {describe(k)}, need [t, kv_heads, head_dim], all sequences' tokens behind each "
            "other: k.reshape(-1, *k.shape[-2:])."
        )
    for name, x, depth in (("k", k, cache.head_dim), ("v", v, cache.v_head_dim)):
        want = (k.shape[0], cache.kv_heads, depth)
        checks.shaped(_NAME, name, x, want, f"tokens of k, and heads and numbers of the cache's {name}.")
    return k, v


def _rotary(given: Any, tokens: int, depth: int) -> list[jax.Array]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{_NAME}: rotary is {describe(given)}, need (positions [t], inv_freq [r]).")
    positions = checks.integers(_NAME, "positions", given[0], (tokens,), "one of each token of k.")
    way_out = "Convert it: inv_freq.astype(jnp.float32)."
    inv_freq = checks.array(_NAME, "inv_freq", given[1], FLOAT32, "float32 [r]", way_out)
    if inv_freq.ndim != 1 or not 1 <= inv_freq.shape[0] <= depth // 2:
        raise ValueError(
            f"{_NAME}: inv_freq is {describe(inv_freq)}, need [r], r from 1 to head_dim / 2 = {depth // 2}: "
            "a frequency for each pair of numbers that turns."
        )
    return [positions, inv_freq]


def _query(cache: PagedKVCache, k: jax.Array, q: Any) -> jax.Array:
    kind = np.dtype(k.dtype)
    q = checks.array(_NAME, "q", q, kind, f"{kind.name}, as k is", f"Convert it: q.astype({kind.name!r}).")
    if q.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != cache.head_dim:
        raise ValueError(
            f"{_NAME}: q is {describe(q)} and k is {describe(k)}, need [t, heads, head_dim] = "
            f"[{k.shape[0]}, heads, {cache.head_dim}]."
        )
    if q.shape[1] < 1 or q.shape[1] % cache.kv_heads:
        raise ValueError(
            f"{_NAME}: q has {q.shape[1]} heads and the cache {cache.kv_heads}, need a multiple of them: so "
            "many heads of q share one."
        )
    return q
