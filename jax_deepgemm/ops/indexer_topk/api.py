"""indexer_topk: checks, and the call of the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import Sharding, config_option, num_sms_option, sharding_option
from jax_deepgemm.ops.indexer import checks
from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer_topk.checks import check_choice
from jax_deepgemm.ops.indexer_topk.family import SCRATCH
from jax_deepgemm.ops.indexer_topk.op import best_of_all, indexer_topk_op
from jax_deepgemm.ops.quantize import quantize
from jax_deepgemm.ops.quantize.array import QuantizedLike
from jax_deepgemm.ops.quantize.fp4 import Fp4Array
from jax_deepgemm.ops.topk.problem import MOST_COLUMNS


def indexer_topk(
    q: QuantizedLike | Fp4Array | ArrayLike,
    kv: QuantizedLike | Fp4Array | ArrayLike,
    weights: ArrayLike,
    k_start: ArrayLike,
    k_end: ArrayLike,
    k: int,
    *,
    values: bool = False,
    order: str = "value",
    scratch_bytes: int = SCRATCH,
    config: IndexerConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> Any:
    """The k best keys of every token, exactly: `topk` of `mqa_logits`, without logits of all keys in memory.

    The scores are those of `mqa_logits`, bit for bit. Of equal ones the lower key comes first; a score that
    is NaN or minus infinity is never chosen, so a token whose q holds NaN has no key.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import quantize, topk
    >>> from jax_deepgemm.indexer import indexer_topk, mqa_logits
    >>> q = quantize(jax.random.normal(jax.random.key(0), (4, 8, 128), jnp.bfloat16))
    >>> kv = quantize(jax.random.normal(jax.random.key(1), (6, 128), jnp.bfloat16))
    >>> weights, start, end = jnp.ones((4, 8)), jnp.zeros(4, jnp.int32), jnp.arange(2, 6)
    >>> keys = indexer_topk(q, kv, weights, start, end, 3)
    >>> jnp.sum(keys >= 0, axis=1).tolist()
    [2, 3, 3, 3]
    >>> bool(jnp.all(keys == topk(mqa_logits(q, kv, weights, start, end), 3)))
    True

    Args:
      q, kv, weights, k_start, k_end: as those of `mqa_logits`: q [s, h, d] and kv [n, d] FP8 or FP4 with
        scales, or both bfloat16, quantised here; weights float32 [s, h]; k_start, k_end integers [s].
      k: how many, 1 to 2048.
      values: whether the scores are returned too.
      order: "value", the best first, or "index", by ascending keys, as attention gathers them best.
      scratch_bytes: how many bytes of scores may be in memory at once: tokens are taken in parts whose scores
        fit. Parts are never less than 16 tokens, or a 120th of all.
      config: an IndexerConfig for the scores, to use instead of the cost model's choice.
      out_sharding: of the results on a mesh with Explicit axes, needed where keys are cut.
      num_sms: SMs that the kernels may use.

    Returns:
      keys int32 [s, k], -1 at the end of rows that have fewer; with values=True (scores float32 [s, k],
      keys), minus infinity where there is no key. The sign of a score that is zero is not kept.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    Has no derivative: compute the scores of the chosen keys in jnp for one. Deterministic. On a mesh rows of
    tokens are cut freely; where keys are cut, devices exchange k candidates of each row.
    """
    op = "indexer_topk"
    weights = checks.weights_of(op, weights)
    if all(getattr(unwrapped(x), "dtype", None) == checks.BFLOAT16 for x in (q, kv)):
        q = quantize(checks.plain_operand(op, "q", q, "[s, h, d]"))
        kv = quantize(checks.plain_operand(op, "kv", kv, "[n, d]"))
    queries, weights = checks.scaled_queries(op, q, weights)
    keys, scales = checks.scaled_keys(op, kv)
    checks.check_shapes(op, queries, keys, weights)
    window = checks.check_window(op, (k_start, k_end), queries.shape[0], keys.shape[0])
    check_choice(op, k, order, scratch_bytes)
    spec = sharding_option(op, out_sharding)
    options = {
        "best": int(k),
        "by_index": order == "index",
        "scratch": int(scratch_bytes),
        "config": config_option(op, config, IndexerConfig),
        "num_sms": num_sms_option(op, num_sms),
        "out_sharding": None if spec is None else (spec, spec),
    }
    arrays = same_varying_axes([queries, keys, scales, weights, *window])
    if not values:
        arrays = [lax.stop_gradient(x) for x in arrays]
    scores, chosen = _of_keys(*arrays, **{name: x for name, x in options.items() if x is not None})
    return (scores, chosen) if values else chosen


def _of_keys(*arrays: jax.Array, **options: Any) -> list[jax.Array]:
    """The op, for as many keys at a time as its kernels take, and then the best of what was found."""
    q, k, scales, weights, start, end = arrays
    keys, op = k.shape[0], indexer_topk_op()
    if not isinstance(keys, int) or keys <= MOST_COLUMNS:
        return op(*arrays, **options)
    start, end = (jnp.clip(x, 0, keys) for x in (start, end))
    found = []
    for first in range(0, keys, MOST_COLUMNS):
        some = slice(first, first + MOST_COLUMNS)
        scores, chosen = op(q, k[some], scales[some], weights, start - first, end - first, **options)
        found.append((scores, jnp.where(chosen < 0, -1, chosen + first)))
    every = (jnp.concatenate(one, axis=1) for one in zip(*found, strict=True))
    return best_of_all(_outer, every, best=options["best"], by_index=options["by_index"])


def _outer(op: Any, x: jax.Array, *, batch: tuple[Any, ...], **options: Any) -> list[jax.Array]:
    found: list[jax.Array] = op(x, **options)
    return found
