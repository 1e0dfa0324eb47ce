"""Logits of sparse attention's indexer, of keys in a row and in pages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.calls import run
from jax_deepgemm.ops import indexer

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_paged_mqa_logits_metadata",
]

SPLIT = 256
"""Keys of a piece of a context, as DeepGEMM divides it."""


def fp8_fp4_mqa_logits(
    q: Any,
    kv: Any,
    weights: ArrayLike,
    cu_seq_len_k_start: ArrayLike,
    cu_seq_len_k_end: ArrayLike,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> jax.Array:
    """Scores of keys for tokens: `jax_deepgemm.indexer.mqa_logits` as DeepGEMM's users call it.

    >>> from jax_deepgemm import deep_gemm
    >>> q = jnp.ones((2, 8, 64), jnp.float8_e4m3fn)
    >>> kv = jnp.ones((5, 64), jnp.float8_e4m3fn), jnp.ones(5)
    >>> start, end = jnp.array([0, 1]), jnp.array([2, 5])
    >>> deep_gemm.fp8_fp4_mqa_logits((q, None), kv, jnp.ones((2, 8)), start, end)[0].tolist()
    [512.0, 512.0, -inf, -inf, -inf]

    Args:
      q: (values, scales): float8_e4m3fn [s, h, d] and None, whose scales are in the weights; or of FP4, int8
        [s, h, d / 2] and int32 [s, h]. An array alone is the values.
      kv: (values, scales): float8_e4m3fn [n, d] and float32 [n]; or of FP4, int8 [n, d / 2] and int32 [n].
      weights: float32 [s, h].
      cu_seq_len_k_start, cu_seq_len_k_end: integers [s], the window of keys of each token.
      clean_logits: changes nothing: what lies outside of a window is minus infinity.
      max_seqlen_k: columns of the compressed form, in which column j is key start + j; 0: column j is key j.
      logits_dtype: float32 or bfloat16.
      options: keyword arguments of `jax_deepgemm.indexer.mqa_logits` (config, out_sharding), and settings of
        `jax_deepgemm.config` for this call.

    Returns:
      [s, n], or [s, max_seqlen_k], in logits_dtype.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above.

    Source: DeepGEMM's function of this name.
    """
    compressed = {"compressed": True, "max_len": max_seqlen_k} if max_seqlen_k else {}
    window = cu_seq_len_k_start, cu_seq_len_k_end
    more = {"out_dtype": logits_dtype} | compressed | options
    result: jax.Array = run(indexer.mqa_logits, _queries(q), kv, weights, *window, **more)
    return result


def fp8_mqa_logits(
    q: ArrayLike,
    kv: Any,
    weights: ArrayLike,
    cu_seq_len_k_start: ArrayLike,
    cu_seq_len_k_end: ArrayLike,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    **options: Any,
) -> jax.Array:
    """`fp8_fp4_mqa_logits` of FP8 operands, in float32.

    >>> from jax_deepgemm import deep_gemm
    >>> q = jnp.ones((2, 8, 64), jnp.float8_e4m3fn)
    >>> kv = jnp.ones((5, 64), jnp.float8_e4m3fn), jnp.ones(5)
    >>> window = jnp.array([0, 1]), jnp.array([2, 5])
    >>> deep_gemm.fp8_mqa_logits(q, kv, jnp.ones((2, 8)), *window, clean_logits=False, max_seqlen_k=4).shape
    (2, 4)

    Args:
      q: float8_e4m3fn [s, h, d].
      kv: (values float8_e4m3fn [n, d], scales float32 [n]).
      weights: float32 [s, h].
      cu_seq_len_k_start, cu_seq_len_k_end: integers [s], as in `fp8_fp4_mqa_logits`.
      clean_logits, max_seqlen_k, options: as in `fp8_fp4_mqa_logits`.

    Returns:
      float32 [s, n], or [s, max_seqlen_k].

    Raises:
      TypeError, ValueError: as `fp8_fp4_mqa_logits`.

    Source: DeepGEMM's function of this name.
    """
    window = cu_seq_len_k_start, cu_seq_len_k_end
    return fp8_fp4_mqa_logits(q, kv, weights, *window, clean_logits, max_seqlen_k, **options)


def fp8_fp4_paged_mqa_logits(
    q: Any,
    kv_cache: ArrayLike,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_table: ArrayLike,
    schedule_meta: ArrayLike | None = None,
    max_context_len: int | None = None,
    clean_logits: bool = False,
    logits_dtype: DTypeLike = jnp.float32,
    indices: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """Scores of keys in pages: `jax_deepgemm.indexer.paged_mqa_logits` as DeepGEMM's users call it.

    >>> from jax_deepgemm import deep_gemm
    >>> q, cache = jnp.ones((2, 1, 8, 64), jnp.float8_e4m3fn), jnp.zeros((3, 64, 1, 68), jnp.uint8)
    >>> lens, table = jnp.array([[70], [3]]), jnp.array([[0, 1], [2, 0]])
    >>> logits = deep_gemm.fp8_fp4_paged_mqa_logits(
    ...     (q, None), cache, jnp.ones((2, 8)), lens, table, max_context_len=128)
    >>> logits.shape, jnp.sum(logits == 0, axis=1).tolist()
    ((2, 128), [70, 3])

    Args:
      q: (values, scales): float8_e4m3fn [b, next_n, h, d] and None, whose scales are in the weights; or of
        FP4, int8 [b, next_n, h, d / 2] and int32 [b, next_n, h]. An array alone is the values.
      kv_cache: uint8 [pages, page, 1, d + 4], or [.., d / 2 + 4] of FP4: a page is all its values, then all
        its scales.
      weights: float32 [b next_n, h].
      context_lens: integers [b, next_n], or [b].
      block_table: integers [b, m], the pages of each request.
      schedule_meta: int32 [num_sms + 1, 2], as `get_paged_mqa_logits_metadata` returns it; changes nothing:
        kernels divide the work themselves. None will do.
      max_context_len: columns of the result; None: those of m pages.
      clean_logits: changes nothing: columns behind a context are minus infinity.
      logits_dtype: float32 or bfloat16.
      indices: integers [b], with next_n = 1: the row of block_table of each token.
      options: keyword arguments of `jax_deepgemm.indexer.paged_mqa_logits` (config, out_sharding), and
        settings of `jax_deepgemm.config` for this call.

    Returns:
      [b next_n, max_context_len] in logits_dtype.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above.

    Source: DeepGEMM's function of this name.
    """
    queries, rows = _queries(q), unwrapped(weights)
    values = unwrapped(queries[0] if isinstance(queries, (tuple, list)) else queries)
    if values.ndim == 4 and rows.ndim == 2 and rows.shape[0] == values.shape[0] * values.shape[1]:
        rows = jnp.asarray(rows).reshape(*values.shape[:3])
    more = {"indices": indices, "max_context_len": max_context_len, "out_dtype": logits_dtype} | options
    operands = queries, kv_cache, rows, context_lens, block_table
    logits: jax.Array = run(indexer.paged_mqa_logits, *operands, **more)
    return logits.reshape(-1, logits.shape[-1])


def fp8_paged_mqa_logits(
    q: ArrayLike,
    kv_cache: ArrayLike,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_table: ArrayLike,
    schedule_meta: ArrayLike | None = None,
    max_context_len: int | None = None,
    clean_logits: bool = False,
    **options: Any,
) -> jax.Array:
    """`fp8_fp4_paged_mqa_logits` of FP8 operands, in float32.

    >>> from jax_deepgemm import deep_gemm
    >>> q, cache = jnp.ones((2, 1, 8, 64), jnp.float8_e4m3fn), jnp.zeros((3, 64, 1, 68), jnp.uint8)
    >>> lens, table = jnp.array([[70], [3]]), jnp.array([[0, 1], [2, 0]])
    >>> deep_gemm.fp8_paged_mqa_logits(q, cache, jnp.ones((2, 8)), lens, table).shape
    (2, 128)

    Args:
      q: float8_e4m3fn [b, next_n, h, d].
      kv_cache: uint8 [pages, page, 1, d + 4].
      weights: float32 [b next_n, h].
      context_lens, block_table: integers [b, next_n] and [b, m], as in `fp8_fp4_paged_mqa_logits`.
      schedule_meta, max_context_len, clean_logits, options: as in `fp8_fp4_paged_mqa_logits`.

    Returns:
      float32 [b next_n, max_context_len].

    Raises:
      TypeError, ValueError: as `fp8_fp4_paged_mqa_logits`.

    Source: DeepGEMM's function of this name.
    """
    operands = q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len
    return fp8_fp4_paged_mqa_logits(*operands, **options)


def get_paged_mqa_logits_metadata(
    context_lens: ArrayLike, block_kv: int, num_sms: int, indices: ArrayLike | None = None
) -> jax.Array:
    """How DeepGEMM divides contexts among SMs of Hopper, in pieces of 256 keys.

    No call of this package needs it: kernels count for themselves
    (`jax_deepgemm.indexer.get_paged_mqa_logits_metadata` shows how). The first SMs have one piece less than
    the others where they do not come out even.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.get_paged_mqa_logits_metadata(jnp.array([[600], [0], [100]]), 64, 2).tolist()
    [[0, 0], [0, 2], [3, 0]]

    Args:
      context_lens: integers [b, next_n]; the last of a request counts.
      block_kv: keys of a page: 64.
      num_sms: shares.
      indices: None, where DeepGEMM takes [b] on newer GPUs.

    Returns:
      int32 [num_sms + 1, 2]: which pair of tokens of which request, counted through, and which piece of its
      context, each share begins with; then the end of all.

    Raises:
      ValueError: another rank, or another number of keys of a page, or no SMs.
      NotImplementedError: indices are given.

    Source: DeepGEMM's function of this name, which reads beyond its numbers where all contexts are empty.
    """
    where = "get_paged_mqa_logits_metadata"
    lens = jnp.asarray(context_lens, jnp.int32)
    if lens.ndim != 2 or block_kv != 64 or num_sms < 1:
        raise ValueError(
            f"{where}: context_lens are {list(lens.shape)}, block_kv {block_kv} and num_sms {num_sms}; need "
            "[b, next_n], 64 and a positive int. For other pages pass schedule_meta=None to the call."
        )
    if indices is not None:
        raise NotImplementedError(
            f"{where}: indices are for compute capability 10. fp8_fp4_paged_mqa_logits takes indices without "
            "this: schedule_meta=None."
        )
    requests, tokens = lens.shape
    atoms = max(-(-tokens // 2), 1)
    pieces = -(-jnp.maximum(lens[:, -1], 0) // SPLIT)
    up_to = jnp.cumsum(pieces * atoms, dtype=jnp.int32)
    total = up_to[-1] if requests else jnp.int32(0)
    each, more = total // num_sms, total % num_sms
    share = jnp.arange(num_sms + 1, dtype=jnp.int32)
    start = share * each + jnp.maximum(share - (num_sms - more), 0)
    request = jnp.sum(up_to[None] <= start[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(request, requests - 1)
    unit, length = start - (up_to - pieces * atoms)[inside], jnp.maximum(pieces[inside], 1)
    ended = start >= total
    first = jnp.where(ended, requests * atoms, request * atoms + unit // length)
    return jnp.stack([first, jnp.where(ended, 0, unit % length)], axis=1).astype(jnp.int32)


def _queries(q: Any) -> Any:
    """(values, None) as the values."""
    return q[0] if isinstance(q, (tuple, list)) and len(q) == 2 and q[1] is None else q
