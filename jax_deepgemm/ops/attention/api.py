"""ragged_paged_attention: checks, and the call of the op."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import config_option, num_sms_option
from jax_deepgemm.ops.attention import checks
from jax_deepgemm.ops.attention.family import AttentionConfig
from jax_deepgemm.ops.attention.op import attention_op
from jax_deepgemm.ops.paged_append.cache import PagedKVCache
from jax_deepgemm.ops.paged_append.checks import layer_index

_NAME = "ragged_paged_attention"


def ragged_paged_attention(
    q: ArrayLike,
    cache: PagedKVCache,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    kv_lens: ArrayLike,
    *,
    num_seqs: ArrayLike | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    max_q_len: int | None = None,
    split: int | Literal["auto"] = "auto",
    return_lse: bool = False,
    layer: ArrayLike | None = None,
    config: AttentionConfig | None = None,
    num_sms: int | None = None,
) -> Any:
    """Attention of the new tokens of many sequences to the keys and values that these have in a paged cache.

    Rows of q are the sequences' new tokens behind each other: sequence i has rows cu_q_lens[i] up to
    cu_q_lens[i + 1], n of them, of which row j stands at position p = kv_lens[i] - n + j. Their own keys are
    in the cache already (`paged_append`). Decoding (n = 1), prompts and parts of prompts go in one call.

        score[key] = q . k[key] * scale,  then softcap * tanh(score / softcap),  then + slope * (key - p)
        out        = sum_key exp(score[key] - lse) v[key],   lse = log(sum_key exp(score[key]) + exp(sink))

    over keys 0 <= key < kv_lens[i] that are in pages of the cache, with key <= p if causal, and
    key > p - window. Head h of q reads head h // (heads / kv_heads) of the cache.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.attention import PagedKVCache, paged_append, ragged_paged_attention
    >>> cache = PagedKVCache.create(pages=8, page_size=16, kv_heads=2, head_dim=64)
    >>> k, v = jax.random.normal(jax.random.key(0), (2, 20, 2, 64), jnp.bfloat16)
    >>> slots = jnp.arange(20) + 3 * 16                 # 20 tokens of one sequence: pages 3 and 4
    >>> cache = paged_append(cache, k, v, slots)
    >>> q = jax.random.normal(jax.random.key(1), (20, 8, 64), jnp.bfloat16)
    >>> tables, starts, lens = jnp.array([[3, 4, -1]]), jnp.array([0, 20]), jnp.array([20])
    >>> out = ragged_paged_attention(q, cache, tables, starts, lens)        # a prompt
    >>> last = ragged_paged_attention(q[19:], cache, tables, jnp.array([0, 1]), lens)        # its last token
    >>> out.shape, bool(jnp.allclose(last, out[19:], atol=0.01))
    ((20, 8, 64), True)

    Args:
      q: [t, heads, head_dim] in the cache's dtype; bfloat16 or float16 if that is FP8.
      cache: a PagedKVCache; values have v_head_dim numbers.
      block_tables: integers [s, p]: page i of a sequence has its tokens i * page_size and on. Entries that
        kv_lens do not reach count for nothing; keys of a page outside of the cache, such as -1, are not seen.
      cu_q_lens: integers [s + 1], where the rows of each sequence begin, and where the last one's end. They
        are held to [0, t], and a smaller one than that before gives its sequence no rows.
      kv_lens: integers [s]: keys of each sequence, the new ones among them, held to [0, p * page_size].
      num_seqs: how many of the s sequences there are, an int or an integer array []. None: all.
      causal: whether tokens see keys up to their own alone.
      window: how many keys a token sees at most, its own among them. None: all.
      softcap: positive, the most that scores may be. None: no such limit.
      sinks: float32 [heads]: one more logit of each head, which has no value. None: none.
      alibi_slopes: float32 [heads]. None: none.
      scale: positive. None: head_dim ** -0.5.
      max_q_len: a promise that no sequence has more rows: 1 where all decode. Rows beyond are zeros.
      split: how the keys of one sequence are shared out where it has few rows. "auto": all SMs have equal
        shares of all keys, the fastest; the last bits of a sequence's result then depend on what else is in
        the batch. A number of keys, a multiple of 256: parts of so many, whatever else there is, and a
        sequence has the same bits in every batch; 2048 costs little.
      return_lse: whether lse is wanted, as for merging with attention to other keys.
      layer: of a cache with layers, which one: an int or an integer array []. Of one outside of the cache, in
        an array, no key is seen.
      config: an AttentionConfig for sequences of few rows, instead of the cost model's choice.
      num_sms: how many SMs may be used. None: all.

    Returns:
      [t, heads, v_head_dim] in the dtype of q; with return_lse, (out, lse float32 [t, heads]). Rows that see
      no key or belong to no sequence are zeros, and their lse is minus infinity, or the sink.

    Raises:
      TypeError, ValueError: types, shapes or options outside of the above; the message says what to do.

    Keys behind a sequence's last, and pages of which none of its rows sees a key, may be anything, NaN too.
    On a mesh heads are cut over devices. Has no derivative. Sources: pages, "Efficient Memory Management for
    Large Language Model Serving with PagedAttention", arXiv:2309.06180; slopes, ALiBi, arXiv:2108.12409;
    sinks as gpt-oss has them.
    """
    cache.check(_NAME)
    query = checks.query(_NAME, q, cache)
    heads = query.shape[1]
    tables, starts, lens = checks.batch(_NAME, block_tables, cu_q_lens, kv_lens, num_seqs)
    static = checks.options(
        _NAME,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        max_q_len=max_q_len,
        split=split,
        head_dim=cache.head_dim,
    )
    keys: Any = tables.shape[1] * cache.page_size
    if isinstance(keys, int) and static["window"] >= keys:  # hides nothing
        static["window"] = 0
    sink, static["with_sinks"] = checks.per_head(_NAME, "sinks", sinks, heads)
    slope, static["with_slopes"] = checks.per_head(_NAME, "alibi_slopes", alibi_slopes, heads)
    group = heads // cache.kv_heads
    arrays = (
        *(query, cache.k, cache.v, cache.k_scale, cache.v_scale),
        *(tables, starts, lens, layer_index(_NAME, cache, layer), sink, slope),
    )
    out, lse = attention_op(group)(
        *same_varying_axes(arrays),
        out_dtype=np.dtype(query.dtype),
        group=group,
        config=config_option(_NAME, config, AttentionConfig),
        num_sms=num_sms_option(_NAME, num_sms),
        **static,
    )
    return (out, lse) if return_lse else out
