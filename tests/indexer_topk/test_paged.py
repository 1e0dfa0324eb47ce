"""The choice from keys in pages: what topk finds in paged_mqa_logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import topk
from jax_deepgemm.indexer import paged_indexer_topk, paged_mqa_logits
from tests.shared import op_checks
from tests.shared.indexer_topk_oracle import operands
from tests.shared.op_checks import OpCase, Shard

B, T, H, D, PAGE, M, PAGES, K = 6, 2, 4, 32, 16, 3, 10, 9


def draw(seed: int) -> list[Any]:
    """q, values, scales, weights, contexts (of nothing, and of all, too), tables."""
    rng = np.random.default_rng(seed)
    q, k, scales, weights = operands("mixed", B * T, PAGES * PAGE, H, D, seed)
    lens = np.sort(rng.integers(0, M * PAGE + 1, (B, T)), axis=1)
    lens[0], lens[1] = 0, M * PAGE
    tables = np.stack([rng.permutation(PAGES)[:M] for _ in range(B)])
    return [
        q.reshape(B, T, H, D),
        k.reshape(PAGES, PAGE, D),
        scales.reshape(PAGES, PAGE),
        weights.reshape(B, T, H),
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(tables, jnp.int32),
    ]


def both(*given: Any, out_sharding: Any = None, **options: Any) -> Any:
    q, values, scales, *rest = given
    scores, keys = paged_indexer_topk(q, (values, scales), *rest, K, values=True, **options)
    return jnp.where(keys < 0, 0, scores), keys


@pytest.mark.any_version
@pytest.mark.parametrize("order", ["value", "index"])
def test_as_the_two_ops(order):
    q, values, scales, *rest = draw(0)
    logits = paged_mqa_logits(q, (values, scales), *rest)
    scores, keys = topk(logits.reshape(B * T, -1), K, order=order, values=True)
    for requests in (1, 4, B):
        run = functools.partial(paged_indexer_topk, order=order, scratch_bytes=4 * M * PAGE * T * requests)
        found, chosen = run(q, (values, scales), *rest, K, values=True)
        np.testing.assert_array_equal(chosen, keys.reshape(B, T, K))
        np.testing.assert_array_equal(found, scores.reshape(B, T, K))
        np.testing.assert_array_equal(run(q, (values, scales), *rest, K), chosen)
    one = rest[1][:, 1]
    np.testing.assert_array_equal(
        paged_indexer_topk(q, (values, scales), rest[0], one, rest[2], K, scratch_bytes=1),
        paged_indexer_topk(q, (values, scales), rest[0], jnp.stack([one, one], 1), rest[2], K),
    )


@pytest.mark.any_version
def test_tokens_of_any_request():
    q, values, scales, weights, lens, tables = draw(0)
    whose, lens = np.array([1, 1, 3, 0, 5]), lens.reshape(-1)[:5]
    given = q.reshape(-1, 1, H, D)[:5], (values, scales), weights.reshape(-1, 1, H)[:5], lens, tables
    logits = paged_mqa_logits(*given, indices=whose)
    keys = topk(logits[:, 0], K)
    for scratch in (1 << 28, 4 * M * PAGE * 2):
        got = paged_indexer_topk(*given, K, indices=whose, scratch_bytes=scratch)
        np.testing.assert_array_equal(got[:, 0], keys)


REQUESTS = P("x"), P(), P(), P("x"), P("x"), P("x")
CASES = [
    OpCase(
        name,
        functools.partial(both, scratch_bytes=scratch),
        draw,
        nests=(((0, 0, 0, 0, 0, 0),), ((0, None, None, 0, 0, None),)),
        shards=(Shard(REQUESTS, (P("x"), P("x")), modes=("auto", "explicit", "shard_map")),),
    )
    for name, scratch in (("at once", 1 << 28), ("in parts", 4 * M * PAGE * T * 2))
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.any_version
def test_each_part_is_two_launches():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    for scratch in (1 << 28, 1):
        run = jax.jit(functools.partial(both, scratch_bytes=scratch))
        text = run.trace(*draw(0)).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@jax_deepgemm_launch(") == 2


@pytest.mark.any_version
def test_errors():
    q, values, scales, *rest = draw(0)
    cache = values, scales
    with pytest.raises(ValueError, match="paged_indexer_topk: k is 0, need"):
        paged_indexer_topk(q, cache, *rest, 0)
    with pytest.raises(ValueError, match=r"weights are .6, 2, 3."):
        paged_indexer_topk(q, cache, rest[0][..., :3], *rest[1:], K)
    known = np.full(B, 60), np.asarray(rest[2])
    for scratch in (1, 1 << 28):
        with pytest.raises(ValueError, match=r"context_lens\[0\] is 60.*need 0 to 48"):
            paged_indexer_topk(q, cache, rest[0], *known, K, scratch_bytes=scratch)
