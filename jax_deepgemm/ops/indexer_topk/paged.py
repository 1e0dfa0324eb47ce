"""paged_indexer_topk: logits of some requests at a time, and the choice from them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer.paged import Cache, paged_mqa_logits
from jax_deepgemm.ops.indexer_topk.checks import check_choice
from jax_deepgemm.ops.indexer_topk.family import SCRATCH
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.fp4 import Fp4Array
from jax_deepgemm.ops.topk.api import topk


def paged_indexer_topk(
    q: QuantizedLike | Fp4Array | ArrayLike,
    kv_cache: Cache,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    k: int,
    *,
    values: bool = False,
    order: str = "value",
    indices: ArrayLike | None = None,
    scratch_bytes: int = SCRATCH,
    config: IndexerConfig | None = None,
    num_sms: int | None = None,
) -> Any:
    """The k best keys of every token of requests whose keys lie in pages: `topk` of `paged_mqa_logits`.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.indexer import paged_indexer_topk
    >>> keys = quantize(jax.random.normal(jax.random.key(0), (4 * 16, 32), jnp.bfloat16))
    >>> cache = keys.values.reshape(4, 16, 32), keys.scales.reshape(4, 16)
    >>> q = jax.random.normal(jax.random.key(1), (2, 1, 8, 32), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    >>> tables = jnp.array([[2, 0], [1, -1]])
    >>> keys = paged_indexer_topk(q, cache, jnp.ones((2, 1, 8)), jnp.array([20, 2]), tables, 3, order="index")
    >>> keys.shape, keys[1, 0].tolist()
    ((2, 1, 3), [0, 1, -1])

    Args:
      q, kv_cache, weights, context_lens, block_tables: as those of `paged_mqa_logits`: q [b, next_n, h, d],
        a cache of pages, weights float32 [b, next_n, h], integers [b] or [b, next_n], and [b, m].
      k, values, order: as those of `indexer_topk`.
      indices: integers [t], the request of each token of q [t, 1, h, d], as `paged_mqa_logits` takes them.
      scratch_bytes: how many bytes of scores may be in memory at once: requests are taken in parts whose
        scores fit, of at least one request (on a mesh, one of each device that has some).
      config: an IndexerConfig for the scores, to use instead of the cost model's choice.
      num_sms: SMs that the logits' kernel may use.

    Returns:
      keys int32 [b, next_n, k], as they are counted in a request, -1 at the end of rows that have fewer; with
      values=True (scores float32 [b, next_n, k], keys), minus infinity where there is no key.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    Has no derivative. Deterministic. Requests are cut over devices freely.
    """
    check_choice("paged_indexer_topk", k, order, scratch_bytes)
    scored: Any = functools.partial(paged_mqa_logits, config=config, num_sms=num_sms)
    own = {"block_tables": block_tables} if indices is None else {"indices": indices}
    if indices is not None:
        scored = functools.partial(scored, block_tables=block_tables)
    whole = jax.eval_shape(
        lambda: scored(q, kv_cache, weights, context_lens, **own)
    )  # checks, of known numbers
    given = q, weights, context_lens, own
    if not values:
        given, kv_cache = jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), (given, kv_cache))

    def of_requests(given: Any) -> list[jax.Array]:
        q, weights, lens, own = given
        logits = scored(q, kv_cache, weights, lens, **own)
        requests, tokens, columns = logits.shape
        lens = jnp.asarray(lens)
        end = jnp.broadcast_to(lens if lens.ndim == 2 else lens[:, None], (requests, tokens))
        rows = logits.reshape(-1, columns)
        found = topk(rows, k, end=jnp.clip(end, 0, columns).reshape(-1), order=order, values=True)
        return [x.reshape(requests, tokens, k) for x in found]

    scores, keys = _in_parts(of_requests, given, _parts(whole.shape, scratch_bytes))
    return (scores, keys) if values else keys


def _parts(shape: tuple[Any, ...], scratch: int) -> int:
    """How often scratch memory is used; once where sizes are symbols."""
    requests, tokens, columns = shape
    if not all(isinstance(size, int) for size in shape):
        return 1
    each = max(scratch // (4 * max(tokens * columns, 1)), 1)
    return max(-(-requests // each), 1)


def _in_parts(function: Any, given: Any, parts: int) -> list[jax.Array]:
    """A function of requests, of every so-manyth request at a time, as requests that are cut over devices lie
    one behind the other."""
    if parts == 1:
        return list(function(given))
    requests = jax.tree.leaves(given)[0].shape[0]
    each = -(-requests // parts)

    def cut(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        padded = jnp.pad(x, ((0, parts * each - requests), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(padded.reshape(each, parts, *x.shape[1:]), 1, 0)

    found = lax.map(function, jax.tree.map(cut, given))
    return [jnp.moveaxis(x, 0, 1).reshape(parts * each, *x.shape[2:])[:requests] for x in found]
