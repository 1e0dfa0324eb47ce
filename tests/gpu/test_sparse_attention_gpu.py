"""From queries and keys to what is attended to, on a GPU: whole steps, tokens of requests, bad input, graphs.

Run: pytest -m gpu tests/gpu/test_sparse_attention_gpu.py        (half a minute)
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
from jax_deepgemm.indexer import indexer_quantize, mqa_logits, paged_mqa_logits
from jax_deepgemm.ops.indexer.family import LogitsProblem
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from jax_deepgemm.ops.indexer_quantize.problem import RotateProblem
from jax_deepgemm.ops.quantize import dequantize
from jax_deepgemm.ops.topk.problem import TopkProblem
from tests.shared import topk_oracle
from tests.shared.arrays import normal
from tests.shared.logits_oracle import calc_diff, exact

D, PAGE, WIDTH, PAGES = 128, 64, 6, 40
E4M3 = jnp.float8_e4m3fn
BOUND = 5e-6
"""Of calc_diff, as DeepGEMM asks."""
LENGTHS = (0, 5, 1, 9, 3, 2, 1, 8)
"""Tokens of requests."""
WHOSE = np.repeat(np.arange(8, dtype=np.int32), LENGTHS)


def kernels() -> Iterator[Any]:
    yield RotateProblem(300 * 32, D)
    yield LogitsProblem(300, 4000, 4000, 32, D)
    yield TopkProblem(300, 4000, 512, by_index=True)
    for heads in (64, 32, 5):
        shape = len(WHOSE), WIDTH * PAGE, WIDTH * PAGE, heads, D
        pages = {"compressed": True, "batches": 8, "page": PAGE, "pages": PAGES}
        yield LogitsProblem(*shape, **pages, of_tokens=True)


@functools.cache
def program(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options))


def check(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert np.isfinite(got[np.isfinite(want)]).all()
    assert calc_diff(got, want) < BOUND


@pytest.mark.smoke
def test_a_chunk_of_a_prompt():
    """The last 300 of 4000 tokens: quantised, scored and chosen in one program."""
    tokens, keys, heads, k = 300, 4000, 32, 512
    q, kv = normal(0, tokens, heads, D), normal(1, keys, D)
    weights = normal(2, tokens, heads, dtype=jnp.float32)
    window = jnp.zeros(tokens, jnp.int32), jnp.arange(keys - tokens + 1, keys + 1)

    @jax.jit
    def chosen(q: Any, kv: Any, weights: Any, start: Any, end: Any) -> Any:
        queries, keys = indexer_quantize(q), indexer_quantize(kv)
        logits = mqa_logits(queries, keys, weights, start, end)
        return queries, keys, logits, topk(logits, k, order="index")

    queries, quantised, logits, indices = chosen(q, kv, weights, *window)
    check(logits, exact(dequantize(queries), dequantize(quantised), weights, *window))
    np.testing.assert_array_equal(indices, topk_oracle.topk(logits, k, by_index=True))
    for _ in range(20):
        np.testing.assert_array_equal(chosen(q, kv, weights, *window)[3], indices)


# Pages -----------------------------------------------------------------------------------------------------


def draw_tokens(heads: int, whose: np.ndarray = WHOSE) -> list[Any]:
    """q, values, scales, weights, contexts, tables, whose tokens are; what no context reaches is NaN."""
    rng = np.random.default_rng(heads)
    tokens = len(whose)
    tables = rng.permutation(PAGES)[: 6 * WIDTH].reshape(6, WIDTH)
    tables = np.concatenate([tables, tables[:2]]).astype(np.int32)  # two requests begin alike
    lens = rng.integers(0, WIDTH * PAGE + 1, tokens).astype(np.int32)
    lens[:3] = WIDTH * PAGE, 1, 0
    reached = np.zeros((8, WIDTH), bool)
    np.logical_or.at(reached, whose, np.arange(WIDTH)[None] < -(-lens // PAGE)[:, None])
    unused = np.setdiff1d(np.arange(PAGES), tables[reached])
    tables = np.where(reached, tables, 2**31 - 1)
    values = np.array(normal(1, PAGES, PAGE, D).astype(E4M3))
    scales = rng.uniform(0.5, 2, (PAGES, PAGE)).astype(np.float32)
    values[unused], scales[unused] = np.nan, np.nan
    q = normal(0, tokens, 1, heads, D).astype(E4M3)
    weights = normal(2, tokens, 1, heads, dtype=jnp.float32)
    return [q, jnp.asarray(values), jnp.asarray(scales), weights, *map(jnp.asarray, (lens, tables, whose))]


def of_tokens(
    q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any, whose: Any, **options: Any
) -> jax.Array:
    return paged_mqa_logits(q, (values, scales), weights, lens, tables, indices=whose, **options)


def want(q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any, whose: Any) -> np.ndarray:
    """In float64. Pages outside of the cache hold zeros, and tokens of nobody see nothing."""
    keys = np.asarray(values).astype(np.float64) * np.asarray(scales)[..., None]
    keys = np.concatenate([keys, np.zeros_like(keys[:1])])
    tables, whose = np.asarray(tables), np.asarray(whose)
    tables = np.where((tables >= 0) & (tables < PAGES), tables, PAGES)
    there = (whose >= 0) & (whose < len(tables))
    ends = np.where(there, np.clip(lens, 0, WIDTH * PAGE), 0)
    own = tables[np.where(there, whose, 0)]
    rows = [
        exact(q[i], keys[own[i]].reshape(-1, D), weights[i], np.zeros(1), ends[i : i + 1])
        for i in range(len(whose))
    ]
    return np.stack(rows)


@pytest.mark.smoke
@pytest.mark.parametrize("heads", [64, 32, 5])
@pytest.mark.parametrize("order", ["runs", "any"])
def test_tokens_of_requests(heads, order):
    whose = WHOSE if order == "runs" else np.random.default_rng(0).permutation(WHOSE)
    operands = draw_tokens(heads, whose)
    expected = want(*operands)
    first = program(of_tokens)(*operands)
    check(first, expected)
    for _ in range(20):
        np.testing.assert_array_equal(program(of_tokens)(*operands), first)
    check(program(of_tokens, num_sms=3)(*operands), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("wrong", [-1, PAGES, 2**31 - 1, -(2**31)])
def test_numbers_outside_are_defined(wrong):
    """A page, a context, and a request that there are not; everything else is as it was."""
    operands = draw_tokens(32)
    lens, tables, whose = (np.array(x) for x in operands[4:])
    tables[3, 0], lens[10], whose[5] = wrong, wrong, wrong
    operands[4:] = map(jnp.asarray, (lens, tables, whose))
    check(program(of_tokens)(*operands), want(*operands))


@pytest.mark.smoke
@pytest.mark.parametrize("what", ["q", "weights"])
def test_nan_of_a_token_in_pages_is_its_row_s_alone(what):
    operands = draw_tokens(64)
    clean = np.asarray(program(of_tokens)(*operands))
    at = {"q": 0, "weights": 3}[what]
    row = 6  # of a request with others, in the middle
    operands[at] = operands[at].at[row, 0, 3].set(jnp.nan)
    got = np.asarray(program(of_tokens)(*operands))
    np.testing.assert_array_equal(np.isnan(got[row]), np.isfinite(clean[row]))
    np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(clean, row, 0))
    assert np.all(np.asarray(topk(jnp.asarray(got[:, 0]), 9))[row] == -1)


# Programs --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_decoding_is_captured():
    """Steps that write keys, score and choose, one reading what the one before gave, in command buffers."""
    requests, heads, steps, runs = 6, 32, 12, 20
    tables = jnp.arange(requests * WIDTH, dtype=jnp.int32).reshape(requests, WIDTH)
    q, k = normal(0, requests, heads, D), normal(1, requests, D)
    weights = jnp.ones((requests, 1, heads))

    def step(cache: Any, lens: Any) -> Any:
        last = lens - 1
        slots = jnp.take_along_axis(tables, last[:, None] // PAGE, axis=1)[:, 0] * PAGE + last % PAGE
        cache = indexer_quantize(k, cache=cache, slots=slots)
        queries = indexer_quantize(q)
        given = (queries.values[:, None], queries.scales[:, None]), cache, weights, lens, tables
        return cache, topk(paged_mqa_logits(*given)[:, 0], 64)

    @jax.jit
    def program(cache: Any, lens: Any) -> Any:
        chosen = jnp.zeros((requests, 64), jnp.int32)
        for _ in range(steps):
            cache, chosen = step(cache, lens)
            lens = jnp.minimum(lens + 1 + chosen[:, 0] % 2, WIDTH * PAGE)
        return cache, chosen

    lens = jnp.asarray(np.random.default_rng(0).integers(1, 300, requests), jnp.int32)
    values = normal(2, PAGES, PAGE, D).astype(E4M3)
    cache = bytes_of(values, jnp.ones((PAGES, PAGE))).reshape(PAGES, PAGE, D + 4)
    first = jax.block_until_ready(program(cache, lens))
    native = launch.native()
    native.reset_execute_counters()
    for _ in range(runs):
        again = jax.block_until_ready(program(cache, lens))
    assert native.execute_count() <= 4 * steps * runs // 4, "the calls run outside command buffers"
    for one, other in zip(again, first, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.smoke
def test_a_k_beyond_the_kernel_s():
    x = jax.random.normal(jax.random.key(0), (3, 5000))
    np.testing.assert_array_equal(program(topk, k=3000)(x), topk_oracle.topk(x, 3000))
