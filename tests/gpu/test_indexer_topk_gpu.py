"""Scores and choice in one op on a GPU: bit for bit what topk finds in mqa_logits.

Run: pytest -m gpu tests/gpu/test_indexer_topk_gpu.py        (about half a minute)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import topk
from jax_deepgemm.core import launch
from jax_deepgemm.indexer import (
    IndexerConfig,
    indexer_topk,
    mqa_logits,
    paged_indexer_topk,
    paged_mqa_logits,
)
from jax_deepgemm.ops.indexer_topk.family import IndexerTopkProblem
from tests.shared.indexer_topk_oracle import HARD, operands, windows

# Tokens, keys, heads, d, k, tokens at a time.
SHAPES = [
    (130, 5000, 64, 128, 2048, 48),
    (67, 2049, 32, 128, 100, 67),
    (33, 20_001, 64, 128, 512, 16),
    (41, 777, 20, 64, 800, 32),
    (5, 300, 1, 32, 1, 5),
    (1, 65_536, 64, 128, 2048, 1),
]


def kernels() -> Iterator[Any]:
    for tokens, keys, heads, depth, k, each in SHAPES:
        for by_index in (False, True):
            scratch = 4 * keys * each
            yield IndexerTopkProblem(tokens, keys, heads, depth, k, by_index=by_index, scratch=scratch)


def call(function: Any, q: Any, keys: Any, scales: Any, *rest: Any, **options: Any) -> Any:
    return function(q, (keys, scales), *rest, **options)


@functools.cache
def program(**options: Any) -> Any:
    return jax.jit(functools.partial(call, indexer_topk, values=True, **options))


@functools.cache
def in_two(k: int, order: str = "value", **options: Any) -> Any:
    """The same from all scores in memory."""

    def run(*given: Any) -> Any:
        return topk(call(mqa_logits, *given, **options), k, order=order, values=True)

    return jax.jit(run)


def check(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("tokens", "keys", "heads", "depth", "k", "each"), SHAPES, ids=str)
def test_hard_rows(tokens, keys, heads, depth, k, each, kind):
    given = [*operands(kind, tokens, keys, heads, depth), *windows(tokens, keys)]
    for order in ("value", "index"):
        run = program(k=k, order=order, scratch_bytes=4 * keys * each)
        check(run(*given), in_two(k, order)(*given))


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_any_numbers(shape):
    """Scores that are no whole numbers, of all keys and causal ones too, with a configuration of the caller's
    too; NaN and infinite scales, NaN in a token's q, and in keys outside of windows."""
    tokens, keys, heads, depth, k, each = shape
    names = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(names[0], (tokens, heads, depth)).astype(jnp.float8_e4m3fn)
    kv = jax.random.normal(names[1], (keys, depth)).astype(jnp.float8_e4m3fn)
    scales = jnp.abs(jax.random.normal(names[2], (keys,)))
    weights = jax.random.normal(names[3], (tokens, heads))
    scratch = 4 * keys * each
    row = jnp.arange(tokens, dtype=jnp.int32)
    for start, end in (
        (0 * row, 0 * row + keys),
        (0 * row, keys - tokens + 1 + row),
        (0 * row + 7, jnp.where(row % 17 == 5, keys, 7)),
    ):
        given = q, kv, scales, weights, start, end
        check(program(k=k, scratch_bytes=scratch)(*given), in_two(k)(*given))
    start, end = windows(tokens, keys, 1)
    start, end = jnp.maximum(start, 9), jnp.minimum(end, keys - 5)
    first = program(k=k, scratch_bytes=scratch)(q, kv, scales, weights, start, end)
    check(first, in_two(k)(q, kv, scales, weights, start, end))
    for _ in range(20):
        check(program(k=k, scratch_bytes=scratch)(q, kv, scales, weights, start, end), first)
    few = IndexerConfig(tokens=1, stages=3, warpgroups=2)
    given = q, kv, scales, weights, start, end
    check(program(k=k, scratch_bytes=scratch, config=few, num_sms=7)(*given), in_two(k, config=few)(*given))
    outside = kv.at[:9].set(jnp.nan).at[keys - 5 :].set(jnp.nan)
    check(program(k=k, scratch_bytes=scratch)(q, outside, scales, weights, start, end), first)
    bad = scales.at[20].set(jnp.nan).at[30].set(jnp.inf).at[:9].set(jnp.nan)
    lost = q.at[0, 0, 0].set(jnp.nan)
    given = lost, kv, bad, weights, start, end
    got = program(k=k, scratch_bytes=scratch)(*given)
    check(got, in_two(k)(*given))
    assert (np.asarray(got[1])[0] == -1).all()


@pytest.mark.smoke
def test_nothing_of_all_scores_is_in_memory():
    """Temporary memory of the program is that of a part."""
    tokens, keys = 4096, 16_384
    given = [*operands("mixed", tokens, keys, 64, 128), *windows(tokens, keys)]
    scratch = 1 << 24
    run = program(k=64, scratch_bytes=scratch)
    used = run.lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert used < 2 * scratch < 4 * tokens * keys // 4
    check(run(*given), in_two(64)(*given))


@pytest.mark.smoke
def test_calls_are_captured():
    """All launches of a call are in the program's command buffer: the handler does not run for each call."""
    calls, runs = 10, 20
    given = [*operands("mixed", 70, 3000, 32, 128), *windows(70, 3000)]
    options = {"k": 40, "values": True, "scratch_bytes": 4 * 3000 * 32}
    step = functools.partial(call, indexer_topk, **options)

    @jax.jit
    def chain(q: Any, keys: Any, scales: Any, weights: Any, *window: Any) -> jax.Array:
        for _ in range(calls):
            found, _ = step(q, keys, scales, weights, *window)
            weights = weights.at[:, 0].add(jnp.where(jnp.isinf(found[:, 0]), 0, found[:, 0]) * 1e-3)
        return weights

    want = chain(*given).block_until_ready()
    chain(*given).block_until_ready()
    ffi = launch.native()
    ffi.reset_execute_counters()
    for _ in range(runs):
        got = chain(*given).block_until_ready()
    assert ffi.execute_count() <= calls * runs // 4, "the calls run outside command buffers"
    np.testing.assert_array_equal(got, want)


@pytest.mark.smoke
def test_batches():
    given = [[*operands("mixed", 20, 600, 8, 64, seed), *windows(20, 600, seed)] for seed in range(3)]
    stacked = [jnp.stack(one) for one in zip(*given, strict=True)]
    run = functools.partial(call, indexer_topk, k=30, values=True)
    got = jax.jit(jax.vmap(run))(*stacked)
    for i, one in enumerate(given):
        check([x[i] for x in got], in_two(30)(*one))
    own = stacked[0], given[0][1], given[0][2], *stacked[3:]
    got = jax.jit(jax.vmap(run, (0, None, None, 0, 0, 0)))(*own)
    for i in range(3):
        one = [x[i] if j not in (1, 2) else x for j, x in enumerate(own)]
        check([x[i] for x in got], in_two(30)(*one))


@pytest.mark.smoke
@pytest.mark.parametrize("requests", [9, 4])
def test_pages(requests):
    """All at once, and some at a time."""
    b, t, h, d, page, m, k = 9, 2, 64, 128, 64, 20, 300
    q, kv, scales, weights = operands("mixed", b * t, b * m * page, h, d)
    rng = np.random.default_rng(0)
    lens = np.sort(rng.integers(0, m * page + 1, (b, t)), axis=1).astype(np.int32)
    lens[0], lens[1] = 0, m * page
    tables = rng.permutation(b * m).reshape(b, m).astype(np.int32)
    cache = kv.reshape(b * m, page, d), scales.reshape(b * m, page)
    given = q.reshape(b, t, h, d), cache, weights.reshape(b, t, h), jnp.asarray(lens), jnp.asarray(tables)
    options = {"k": k, "values": True, "scratch_bytes": 4 * t * m * page * requests}
    got = jax.jit(functools.partial(paged_indexer_topk, **options))(*given)
    logits = jax.jit(paged_mqa_logits)(*given)
    want = jax.jit(functools.partial(topk, k=k, values=True))(logits.reshape(b * t, -1))
    check([x.reshape(b * t, k) for x in got], want)
