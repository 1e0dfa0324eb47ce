"""paged_mla_attention, sparse_mla_attention and mla_append: checks, and calls of the ops."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import num_sms_option
from jax_deepgemm.ops.attention.checks import batch
from jax_deepgemm.ops.attention.checks import options as paged_options
from jax_deepgemm.ops.mla import checks
from jax_deepgemm.ops.mla.op import PAGED, SPARSE
from jax_deepgemm.ops.paged_append.checks import array, integers, shaped


def paged_mla_attention(
    q: ArrayLike,
    cache: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    kv_lens: ArrayLike,
    *,
    scale: float,
    causal: bool = True,
    v_head_dim: int = 512,
    num_seqs: ArrayLike | None = None,
    max_q_len: int | None = None,
    split: int | Literal["auto"] = "auto",
    return_lse: bool = False,
    layer: ArrayLike | None = None,
) -> Any:
    """Multi-head latent attention (MLA) of the new tokens of many sequences, in its absorbed form.

    All heads read one row of the cache for a token: its key, of which the first v_head_dim numbers are its
    value too (of DeepSeek's models, 512 of the latent and 64 with rotary embedding). Rows of q are the
    sequences' new tokens behind each other: sequence i has rows cu_q_lens[i] up to cu_q_lens[i + 1], n of
    them, of which row j stands at position p = kv_lens[i] - n + j. Their own rows are in the cache already
    (`mla_append`).

        score[key] = q . cache[key] * scale
        lse        = log(sum_key exp(score[key]))
        out        = sum_key exp(score[key] - lse) cache[key][:v_head_dim]

    over keys 0 <= key < kv_lens[i] that are in pages of the cache, with key <= p if causal.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.attention import mla_append, paged_mla_attention
    >>> cache = jnp.zeros((8, 16, 576), jnp.bfloat16)
    >>> keys = jax.random.normal(jax.random.key(0), (20, 576), jnp.bfloat16)
    >>> cache = mla_append(cache, keys, jnp.arange(20) + 3 * 16)     # 20 tokens of one sequence, pages 3, 4
    >>> q = jax.random.normal(jax.random.key(1), (2, 16, 576), jnp.bfloat16)
    >>> tables, starts, lens = jnp.array([[3, 4, -1]]), jnp.array([0, 2]), jnp.array([20])
    >>> out = paged_mla_attention(q, cache, tables, starts, lens, scale=192**-0.5)       # its last two tokens
    >>> out.shape
    (2, 16, 512)

    Args:
      q: [t, heads, head_dim] in the cache's dtype: queries by the absorbed key projection, then their rotary
        part.
      cache: [pages, page_size, head_dim] bfloat16 or float16, page_size 16, 32, 64, 128 or 256; kernels take
        head_dim up to 576 in steps of 64. With `layer`, [layers, pages, page_size, head_dim].
      block_tables: integers [s, p]: page i of a sequence has its tokens i * page_size and on. Entries that
        kv_lens do not reach count for nothing; keys of a page outside of the cache, such as -1, are not seen.
      cu_q_lens: integers [s + 1], where the rows of each sequence begin, and where the last one's end. They
        are held to [0, t], and a smaller one than that before gives its sequence no rows.
      kv_lens: integers [s]: keys of each sequence, the new ones among them, held to [0, p * page_size].
      scale: positive. It is of heads before they were absorbed, so it has no default.
      causal: whether tokens see keys up to their own alone.
      v_head_dim: numbers of a value; kernels take up to 512 in steps of 128.
      num_seqs: how many of the s sequences there are, an int or an integer array []. None: all.
      max_q_len: a promise that no sequence has more rows: 1 where all decode. Rows beyond are zeros.
      split: how the keys of one sequence are shared out. "auto": all SMs have equal shares of all keys. A
        number, a multiple of 256: in parts of so many keys, and results of a sequence are then the same bits
        in every batch.
      return_lse: whether lse is wanted, as for merging with attention to other keys.
      layer: of a cache with layers, which one: an int or an integer array []. Of one outside of the cache, in
        an array, no key is seen.

    Returns:
      [t, heads, v_head_dim] in the dtype of q; with return_lse, (out, lse float32 [t, heads]). Rows that see
      no key or belong to no sequence are zeros, and their lse is minus infinity.

    Raises:
      TypeError, ValueError: types, shapes or options outside of the above; the message says what to do.

    Keys that no row of their sequence sees may be anything, NaN too. On a mesh heads are cut over devices,
    the cache is whole. Has no derivative. Source: "DeepSeek-V2", arXiv:2405.04434, 2.1; pages:
    arXiv:2309.06180.
    """
    name = "paged_mla_attention"
    rows = checks.latents(name, cache, layer)
    query = checks.query(name, q, rows)
    tables, starts, lens = batch(name, block_tables, cu_q_lens, kv_lens, num_seqs)
    static = checks.options(name, rows, v_head_dim, scale, split)
    more = paged_options(
        name,
        causal=causal,
        window=None,
        softcap=None,
        scale=scale,
        max_q_len=max_q_len,
        split=split,
        head_dim=query.shape[-1],
    )
    static |= {
        "causal": more["causal"],
        "max_q_len": more["max_q_len"],
        "num_sms": num_sms_option(name, None),
    }
    arrays = same_varying_axes((query, rows.rows, tables, starts, lens, rows.layer))
    out, lse = PAGED(*arrays, out_dtype=np.dtype(query.dtype), **static)
    return (out, lse) if return_lse else out


def sparse_mla_attention(
    q: ArrayLike,
    cache: ArrayLike,
    indices: ArrayLike,
    *,
    scale: float,
    v_head_dim: int = 512,
    return_lse: bool = False,
    layer: ArrayLike | None = None,
) -> Any:
    """Multi-head latent attention of tokens to keys that each of them names, as an indexer has chosen them.

    As `paged_mla_attention`, over keys cache[slot] for the slots of a token's row of `indices`, where slot s
    is token s % page_size of page s // page_size. It knows of no sequences and of no order: whoever chooses
    leaves later keys out.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.attention import sparse_mla_attention
    >>> cache = jax.random.normal(jax.random.key(0), (8, 16, 576), jnp.bfloat16)
    >>> q = jax.random.normal(jax.random.key(1), (2, 16, 576), jnp.bfloat16)
    >>> indices = jnp.array([[3, 100, -1], [7, -1, -1]])
    >>> out = sparse_mla_attention(q, cache, indices, scale=192 ** -0.5)
    >>> out.shape, bool(jnp.all(out[1] == cache[0, 7, :512]))            # one key is all that the second sees
    ((2, 16, 512), True)

    Args:
      q: [t, heads, head_dim] in the cache's dtype.
      cache: as the one of `paged_mla_attention`.
      indices: integers [t, n]: slots, in any order. Those outside of the cache, such as -1, name no key. One
        that is named twice counts twice.
      scale, v_head_dim, return_lse, layer: as the ones of `paged_mla_attention`.

    Returns:
      [t, heads, v_head_dim] in the dtype of q; with return_lse, (out, lse float32 [t, heads]). Rows that see
      no key are zeros, and their lse is minus infinity.

    Raises:
      TypeError, ValueError: types, shapes or options outside of the above; the message says what to do.

    Keys that nobody names may be anything, NaN too. On a mesh tokens and heads are cut over devices, the
    cache is whole. Has no derivative. Source: "DeepSeek-V3.2-Exp", 2.1 (DeepSeek Sparse Attention).
    """
    name = "sparse_mla_attention"
    rows = checks.latents(name, cache, layer)
    query = checks.query(name, q, rows)
    slots = checks.named_slots(name, indices, query.shape[0])
    static = checks.options(name, rows, v_head_dim, scale)
    del static["split"]
    static["num_sms"] = num_sms_option(name, None)
    arrays = same_varying_axes((query, rows.rows, slots, rows.layer))
    out, lse = SPARSE(*arrays, out_dtype=np.dtype(query.dtype), **static)
    return (out, lse) if return_lse else out


def mla_append(
    cache: ArrayLike, keys: ArrayLike, slots: ArrayLike, *, layer: ArrayLike | None = None
) -> jax.Array:
    """Writes the rows of tokens to their slots of a cache of latent attention.

    Slot s is token s % page_size of page s // page_size. One scatter of XLA, in place if the cache is
    donated.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.attention import mla_append
    >>> cache, keys = jnp.zeros((2, 16, 64), jnp.bfloat16), jnp.ones((3, 64), jnp.bfloat16)
    >>> cache = mla_append(cache, keys, jnp.array([17, -1, 0]))
    >>> jnp.argwhere(cache[..., 0] != 0).tolist()
    [[0, 0], [1, 1]]

    Args:
      cache: as the one of `paged_mla_attention`. Donate it, and it is updated in place.
      keys: [t, head_dim] in the cache's dtype: normalized latents, then the rotated part.
      slots: integers [t]. Slots outside of the cache, such as -1, skip their token. Slots are distinct: of
        several tokens with one slot, any may be written.
      layer: of a cache with layers, which one: an int or an integer array []. One outside of the cache, in an
        array, skips all tokens.

    Returns:
      The new cache.

    Raises:
      TypeError, ValueError: types and shapes that do not fit; the message says what to do.
    """
    name = "mla_append"
    old = checks.latents(name, cache, layer)
    kind, depth = np.dtype(old.rows.dtype), old.rows.shape[-1]
    need = f"{kind.name}, as the cache is"
    new = array(name, "keys", keys, kind, need, f"Convert them: keys.astype({kind.name!r}).")
    if new.ndim != 2 or new.shape[1] != depth:
        shaped(name, "keys", new, (*new.shape[:1], depth), "rows of the cache.")
    at = integers(name, "slots", slots, new.shape[:1], "one of each token of keys.")
    page = jnp.where((at >= 0) & (at < old.slots), at // old.page_size, -1)
    where = (old.layer[0], page, at % old.page_size)
    bits, fresh = (lax.bitcast_convert_type(x, jnp.uint16) for x in (old.rows, new))
    written = bits.at[where].set(fresh, mode="drop", wrap_negative_indices=False)
    rows = lax.bitcast_convert_type(written, kind)
    return rows if old.stacked else rows[0]
