"""Scores and choice as an op. Rows of tokens are cut freely. Where keys are cut, each device chooses among
its own, and then among what all have chosen: of equal scores the lower key is first there too. Heads are
whole: scores are sums over all of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan, pieces_of_whole
from jax_deepgemm.ops.indexer.prepare import prepare
from jax_deepgemm.ops.indexer_topk import reference
from jax_deepgemm.ops.topk.op import of_all, piece_of, topk_op
from jax_deepgemm.ops.topk.reference import at

HINT = "Choose with it, and compute the scores of what is chosen in jnp, which has gradients."
_pieces = pieces_of_whole("k")


def _result(q: Dims, *_: Dims, best: int, **__: Any) -> list[tuple[Dims, Any]]:
    return [((*q[:-2], best), np.dtype(np.float32)), ((*q[:-2], best), np.dtype(np.int32))]


def best_of_all(bind: Any, candidates: Iterable[jax.Array], *, best: int, by_index: bool) -> list[jax.Array]:
    """Of candidates (scores, keys), [.., c], in the order of their keys the best ones, [.., best].

    Args:
      bind: binds the op that chooses.
      candidates, best, by_index: as said.
    """
    scores, keys = candidates
    op = topk_op(False, True, by_index, True)
    rows = scores.reshape(-1, scores.shape[-1])
    options = {"k": best, "dtype": np.dtype(np.float32), "fallback": "reference"}
    found, places = bind(op, rows, batch=(), **options)
    chosen = at(keys.reshape(rows.shape), places, -1)
    return [x.reshape(*scores.shape[:-1], best) for x in (found, chosen)]


def _on_shard(plan: ShardingPlan, local: Any, *arrays: jax.Array) -> Any:
    """The `spmd` of the op."""
    if not plan.cut("n"):
        return _pieces(plan, local, *arrays)
    *others, start, end = arrays
    first, keys = plan.offset("n"), plan.size["n"]
    scores, chosen = local(*others, *(jnp.clip(x, 0, keys) - first for x in (start, end)))
    every = (of_all(plan, x) for x in (scores, jnp.where(chosen < 0, -1, chosen + first)))
    options = {name: local.keywords[name] for name in ("best", "by_index")}
    found = best_of_all(local.func, every, **options)
    return None, [piece_of(plan, x) for x in found]


@functools.cache
def indexer_topk_op() -> Op:
    """(q [s, h, d], k [n, d], scales [n], weights [s, h], start [s], end [s]) -> scores, keys [s, best]."""
    return Op(
        "indexer_topk",
        "s h d, n d, n, s h, s, s -> s k, s k",
        _result,
        reference.best_keys,
        reduces=("n",),
        spmd=_on_shard,
        kernel=LazyKernel("jax_deepgemm.ops.indexer_topk.kernel", "dense"),
        kernel_prepare=functools.partial(prepare, True),
        grad_hint=HINT,
    )
