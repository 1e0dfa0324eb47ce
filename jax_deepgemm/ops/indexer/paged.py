"""paged_mqa_logits: checks, and the call of the op."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import Sharding
from jax_deepgemm.ops.indexer import checks
from jax_deepgemm.ops.indexer.checks import E4M3, FLOAT32, describe
from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer.fp4 import fp4_operand, is_fp4
from jax_deepgemm.ops.indexer.paged_op import paged_op
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.fp4 import Fp4Array

Cache: TypeAlias = ArrayLike | tuple[ArrayLike, ArrayLike] | Fp4Array
PAGES = (16, 32, 64, 128)
MOST_TOKENS = 8
_OP = "paged_mqa_logits"


def paged_mqa_logits(
    q: QuantizedLike | Fp4Array | ArrayLike,
    kv_cache: Cache,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    *,
    indices: ArrayLike | None = None,
    max_context_len: int | None = None,
    out_dtype: DTypeLike = jnp.float32,
    config: IndexerConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> jax.Array:
    """`mqa_logits` of requests whose keys lie in pages of one cache, for decoding.

        logits[b, t, j] = s[j] * sum_h weights[b, t, h] * relu(sum_d q[b, t, h, d] * k[j, d])

    for j < context_lens[b, t], and minus infinity behind. Key j of request b is row j % page of page
    block_tables[b, j // page], and s are the scales of its keys.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.indexer import paged_mqa_logits
    >>> keys = quantize(jax.random.normal(jax.random.key(0), (4 * 16, 32), jnp.bfloat16))
    >>> cache = keys.values.reshape(4, 16, 32), keys.scales.reshape(4, 16)
    >>> q = jax.random.normal(jax.random.key(1), (2, 1, 8, 32), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    >>> tables = jnp.array([[2, 0], [1, -1]])
    >>> logits = paged_mqa_logits(q, cache, jnp.ones((2, 1, 8)), jnp.array([20, 5]), tables)
    >>> logits.shape, jnp.sum(logits > -jnp.inf, axis=-1).tolist()
    ((2, 1, 32), [[20], [5]])

    Requests with different numbers of tokens: `indices` says whose each token is. Here the first two are of
    request 1, the third is of request 0:

    >>> q, weights = jnp.concatenate([q, q[:1]]), jnp.ones((3, 1, 8))
    >>> indices, lens = jnp.array([1, 1, 0]), jnp.array([4, 5, 20])
    >>> logits = paged_mqa_logits(q, cache, weights, lens, tables, indices=indices)
    >>> logits.shape, jnp.sum(logits > -jnp.inf, axis=-1).tolist()
    ((3, 1, 32), [[4], [5], [20]])

    Args:
      q: [b, next_n, h, d] float8_e4m3fn, or a QuantizedArray of block (1, 128), or (values, scales [b,
        next_n, h]), or an `Fp4Array`, as `mqa_logits` takes them; next_n is 1 to 8, h 1 to 128, d 32, 64 or
        128.
      kv_cache: uint8 [pages, page, d + 4] or [pages, page, 1, d + 4], DeepSeek's format, in which a page is
        page * d bytes of values and then page float32 scales, whatever its shape says; or (values [pages,
        page, d] float8_e4m3fn, scales [pages, page] float32). page is 16, 32, 64 or 128. Of FP4 keys, uint8
        [pages, page, d / 2 + 4], a page being page * d / 2 bytes and then page int32 of four scales, of which
        a key of fewer blocks leaves the upper ones; or an `Fp4Array` of such pages.
      weights: float32 [b, next_n, h].
      context_lens: integers [b], or [b, next_n]: how many keys a token sees. Numbers that are less than 0 or
        more than the table has keys are clipped on the device; of NumPy arrays they are an error.
      block_tables: integers [b, m], of which those that no context reaches count for nothing. A page outside
        of the cache holds zeros; of a NumPy array, with contexts in NumPy, it is an error.
      indices: integers [t], where q is [t, 1, h, d]: the request of each token, a row of block_tables
        [requests, m]. context_lens are then those of tokens, [t]. A token of a request that does not exist
        sees nothing; of a NumPy array it is an error. None: q has next_n tokens of every request.
      max_context_len: columns of the result. None: m * page.
      out_dtype: float32, or bfloat16, rounded once.
      config: an IndexerConfig to use instead of the cost model's choice.
      out_sharding: on a mesh with Explicit axes the result's, needed where heads are cut.
      num_sms: SMs that the kernel may use.

    Returns:
      [b, next_n, max_context_len] in out_dtype.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    Has no derivative. Pages that no context reaches may hold anything, NaN too. Deterministic. Source:
    DeepGEMM's fp8_paged_mqa_logits.
    """
    weights = checks.array(_OP, "weights", weights, FLOAT32, "[b, next_n, h]", "weights.astype(jnp.float32)")
    values, weights = checks.scaled_queries(_OP, q, weights, "[b, next_n, h, d]")
    requests, tokens, heads, depth = values.shape
    checks.check_heads(_OP, heads, depth)
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"{_OP}: q is {list(values.shape)}, {tokens} tokens of a request, need 1 to {MOST_TOKENS}. Call "
            "it for some at a time."
        )
    if weights.shape != values.shape[:3]:
        raise ValueError(
            f"{_OP}: weights are {list(weights.shape)} and q is {list(values.shape)}, need [b, next_n, h] = "
            f"{list(values.shape[:3])}."
        )
    cache, packed, page = _cache(kv_cache, depth)
    tables = checks.integers(_OP, "block_tables", block_tables)
    if tables.ndim != 2 or (tables.shape[0] != requests and indices is None):
        raise ValueError(
            f"{_OP}: block_tables are {describe(tables)} and q has {requests} requests, need "
            f"[{requests}, m]. Where requests have different numbers of tokens, say whose each is: indices=."
        )
    lens = _lens(context_lens, requests, tokens)
    whose = [] if indices is None else [_indices(indices, values.shape, tables.shape[0])]
    _check_known(lens, tables, whose[0] if whose else np.arange(requests), cache[0].shape[0], page)
    columns = tables.shape[1] * page if max_context_len is None else max_context_len
    options = checks.paged_form(_OP, columns, out_dtype, out_sharding, config, num_sms)
    end = jnp.clip(jnp.asarray(lens), 0, tables.shape[1] * page).astype(jnp.int32)
    end = jnp.broadcast_to(end if end.ndim == 2 else end[:, None], (requests, tokens))
    numbers = (jnp.asarray(x).astype(jnp.int32) for x in (tables, *whose))
    arrays = values, *cache, weights, jnp.zeros_like(end), end, *numbers
    return paged_op(len(cache) == 1, packed, len(whose) == 1)(*same_varying_axes(arrays), **options)[0]


def _cache(given: Any, depth: int) -> tuple[tuple[jax.Array, ...], bool, int]:
    """The arrays of a cache, whether keys are FP4, and how many are in a page."""
    given = unwrapped(given)
    if is_fp4(given):
        values, words = fp4_operand(_OP, "kv_cache", given, "[pages, page, d]")
        if 2 * values.shape[2] != depth:
            raise ValueError(
                f"{_OP}: kv_cache has FP4 values of d = {2 * values.shape[2]}, and q's d is {depth}. Keys "
                "have one head, of the size of q's heads."
            )
        return (values, words), True, _page(values.shape[1])
    if isinstance(given, (tuple, list)) and len(given) == 2:
        need = "Quantise keys: q = quantize(k), q.values.reshape(pages, page, d)."
        values = checks.array(_OP, "values of kv_cache", given[0], E4M3, "[pages, page, d]", need)
        scales = checks.array(_OP, "scales of kv_cache", given[1], FLOAT32, "[pages, page]", need)
        if scales.shape != values.shape[:2] or values.shape[2] != depth:
            raise ValueError(
                f"{_OP}: kv_cache has values {list(values.shape)} and scales {list(scales.shape)}, need "
                f"[pages, page, {depth}] (q's d) and [pages, page]: one scale for each key."
            )
        return (values, scales), False, _page(values.shape[1])
    way_out = "Two arrays are a tuple: (values [pages, page, d], scales [pages, page])."
    lead = "pages, page, 1" if getattr(given, "ndim", 3) == 4 else "pages, page"
    rank = f"[{lead}, d + 4]"
    cache = checks.array(_OP, "kv_cache", given, np.dtype(np.uint8), rank, way_out)
    pages, page, last = cache.shape[0], cache.shape[1], cache.shape[-1]
    if last not in (depth + 4, depth // 2 + 4) or cache.shape[2:-1] not in ((), (1,)):
        raise ValueError(
            f"{_OP}: kv_cache is {list(cache.shape)} and q's d is {depth}, need {rank}, d + 4 = {depth + 4}: "
            f"the bytes of a key and of its scale; or, of FP4 keys, [{lead}, d / 2 + 4], {depth // 2 + 4}."
        )
    return (cache.reshape(pages, page * last),), last != depth + 4, _page(page)


def _page(keys: int) -> int:
    if keys not in PAGES:
        raise ValueError(f"{_OP}: a page of kv_cache has {keys} keys, need {', '.join(map(str, PAGES))}.")
    return keys


def _lens(given: Any, requests: int, tokens: int) -> Any:
    lens = checks.integers(_OP, "context_lens", given)
    if lens.shape not in ((requests,), (requests, tokens)):
        raise ValueError(
            f"{_OP}: context_lens are {describe(lens)}, need [{requests}], or [{requests}, {tokens}]: one "
            "for each request, or for each of its tokens."
        )
    return lens


def _indices(given: Any, shape: tuple[int, ...], requests: int) -> Any:
    """The request of each token of q."""
    at = checks.integers(_OP, "indices", given)
    if shape[1] != 1 or at.shape != shape[:1]:
        raise ValueError(
            f"{_OP}: indices are {describe(at)} and q is {list(shape)}, need [t] and [t, 1, h, d]: a request "
            "for each token. Each has a row in q.reshape(-1, 1, h, d)."
        )
    wrong = np.flatnonzero((at < 0) | (at >= requests)) if isinstance(at, np.ndarray) else np.empty(0)
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"{_OP}: indices[{i}] is {at[i]}, need 0 to {requests - 1}: block_tables have a row for each of "
            f"{requests} requests."
        )
    return at


def _check_known(lens: Any, tables: Any, whose: Any, pages: int, page: int) -> None:
    """Of numbers that are known while tracing, those that no cache has."""
    if not isinstance(lens, np.ndarray):
        return
    most = tables.shape[1] * page
    wrong = np.argwhere((lens < 0) | (lens > most))
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{_OP}: context_lens{list(at)} is {lens[at]}, and block_tables have {tables.shape[1]} pages of "
            f"{page} keys for it, need 0 to {most}. Give it more pages."
        )
    if not (isinstance(tables, np.ndarray) and isinstance(whose, np.ndarray)):
        return
    used = -(-(lens if lens.ndim == 1 else lens.max(axis=1, initial=0)) // page)
    own = tables[whose]
    reached = np.arange(tables.shape[1])[None] < used[:, None]
    wrong = np.argwhere(reached & ((own < 0) | (own >= pages)))
    if wrong.size:
        b, i = (int(x) for x in wrong[0])
        raise ValueError(
            f"{_OP}: block_tables[{whose[b]}, {i}] is {own[b, i]}, and a context reaches it, need 0 to "
            f"{pages - 1}: the cache has {pages} pages."
        )


def get_paged_mqa_logits_metadata(
    context_lens: ArrayLike, num_sms: int, *, tile_keys: int = 192
) -> jax.Array:
    """How the tiles of all requests are divided among SMs: equal shares, counted on the device.

    No call needs it: kernels count for themselves. It is for those who want to see the division.

    >>> get_paged_mqa_logits_metadata(jnp.array([500, 0, 100]), 2).tolist()
    [[0, 0], [0, 2], [3, 0]]

    Args:
      context_lens: integers [b], or [b, next_n], of as many tokens as a block of threads takes at once.
      num_sms: shares.
      tile_keys: 64 for each warpgroup of the kernel's IndexerConfig: mostly 192; 128 for pages of 128 keys,
        and for FP4.

    Returns:
      int32 [num_sms + 1, 2]: the request, and its tile, with which each share begins; then the end of all,
      (b, 0).

    Raises nothing.
    """
    lens = jnp.asarray(context_lens, jnp.int32)
    lens = lens if lens.ndim == 1 else jnp.max(lens, axis=1)
    tiles = (jnp.maximum(lens, 0) + tile_keys - 1) // tile_keys
    up_to = jnp.cumsum(tiles)
    total = up_to[-1]
    each, rest = total // num_sms, total % num_sms
    shares = lax.iota(jnp.int32, num_sms + 1)
    begin = each * shares + rest * shares // num_sms  # total * share // num_sms, inside int32
    request = jnp.sum(up_to[None] <= begin[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(request, lens.shape[0] - 1)
    tile = jnp.where(begin < total, begin - (up_to - tiles)[inside], 0)
    request = jnp.where(begin < total, request, lens.shape[0])
    return jnp.stack([request, tile], axis=1)
