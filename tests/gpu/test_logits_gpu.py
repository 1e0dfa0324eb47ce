"""Logits of an indexer on a GPU: against float64, window edges to the key, poisoned keys, equal reruns.

Run: pytest -m gpu tests/gpu/test_logits_gpu.py        (half a minute)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.indexer import IndexerConfig, bf16_mqa_logits, mqa_logits, paged_mqa_logits
from jax_deepgemm.ops.indexer import sm90
from jax_deepgemm.ops.indexer.family import LogitsProblem
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from jax_deepgemm.ops.quantize import QuantizedArray, dequantize, quantize
from tests.shared.arrays import normal
from tests.shared.logits_oracle import calc_diff, exact, windows

# Tokens, keys, heads, d.
SHAPES = [
    (130, 1000, 64, 128),
    (67, 2049, 32, 128),
    (9, 129, 128, 128),
    (33, 517, 16, 64),
    (70, 300, 8, 32),
    (41, 777, 24, 128),
    (6, 4100, 120, 64),
    (100, 255, 1, 32),
    (13, 640, 40, 128),
    (1, 5000, 64, 128),
    (3, 1, 5, 128),
]
EDGES = (64, 128)
BOUND = 5e-6
"""Of calc_diff, as DeepGEMM asks."""


def problem(shape: tuple[int, ...], dtype: str = "e4m3", columns: int | None = None, **other: Any) -> Any:
    tokens, keys, heads, depth = shape
    return LogitsProblem(
        tokens,
        keys,
        keys if columns is None else columns,
        heads,
        depth,
        dtype,
        compressed=columns is not None,
        **other,
    )


def configurations(shape: tuple[int, ...]) -> list[IndexerConfig]:
    """A third of those that the cost model chooses among, another third for each shape."""
    return list(sm90.candidates(problem(shape), H200))[SHAPES.index(shape) % 3 :: 3]


def kernels() -> Iterator[Any]:
    for shape in SHAPES:
        for dtype in ("e4m3", "bf16"):
            yield problem(shape, dtype)
        yield problem(shape, columns=100, out="bfloat16")
        for config in configurations(shape):
            yield sm90.kernel_source(problem(shape), config)


def draw(seed: int, tokens: int, keys: int, heads: int, depth: int) -> tuple[Any, ...]:
    """q, kv, weights, first and last keys."""
    q, kv = normal(seed, tokens, heads, depth), normal(seed + 1, keys, depth)
    weights = normal(seed + 2, tokens, heads, dtype=jnp.float32)
    return q, kv, weights, *map(jnp.asarray, windows(seed, tokens, keys))


def check(got: Any, want: np.ndarray, bound: float = BOUND) -> None:
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert np.isfinite(got[np.isfinite(want)]).all()
    assert calc_diff(got, want) < bound


@functools.cache
def program(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8(shape):
    """Many configurations; rows that begin with their window."""
    q, kv, weights, *window = draw(0, *shape)
    q, kv = quantize(q), quantize(kv)
    meant = dequantize(q), dequantize(kv)
    want = exact(*meant, weights, *window)
    check(program(mqa_logits)(q, kv, weights, *window), want)
    for config in configurations(shape):
        check(program(mqa_logits, config=config, num_sms=3)(q, kv, weights, *window), want)
    rows = program(mqa_logits, compressed=True, max_len=100, out_dtype=jnp.bfloat16)
    check(rows(q, kv, weights, *window), exact(*meant, weights, *window, 100), 3e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16(shape):
    operands = draw(1, *shape)
    check(program(bf16_mqa_logits)(*operands), exact(*operands))


@pytest.mark.smoke
@pytest.mark.parametrize("compressed", [False, True])
def test_windows_at_every_edge(compressed):
    """All pairs of bounds around edges of tiles and of the array, and beyond it; what lies outside is NaN."""
    keys = 389
    near = sorted({edge + by for edge in (0, *EDGES, 256, 384, keys) for by in (-2, -1, 0, 1, 2)})
    start, end = (x.reshape(-1).astype(np.int32) for x in np.meshgrid(near, near))
    q, kv, weights = draw(2, start.size, keys, 8, 128)[:3]
    options = {"compressed": True, "max_len": 140} if compressed else {}
    want = exact(q, kv, weights, start, end, options.get("max_len"))
    got = program(bf16_mqa_logits, **options)(q, kv, weights, jnp.asarray(start), jnp.asarray(end))
    check(got, want)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(130, 1000, 64, 128), (70, 517, 16, 32)], ids=str)
@pytest.mark.parametrize("tensor_sums", [False, True])
def test_nan_stays_where_it_is(shape, tensor_sums):
    """That of keys outside of all windows, and of their scales, in nothing; that of a token in its row."""
    run = program(mqa_logits, config=IndexerConfig(128 // shape[2], 3, tensor_sums=tensor_sums))
    tokens, keys = shape[:2]
    q, kv, weights, *_ = draw(3, *shape)
    q, kv = quantize(q), quantize(kv)
    start, end = np.full(tokens, 130), np.full(tokens, keys - 61)
    start[::3] += 10
    window = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)
    clean = np.asarray(run(q, kv, weights, *window))
    outside = np.ones((keys, 1), bool)
    outside[130 : keys - 61] = False
    nan = jnp.asarray(jnp.nan, kv.values.dtype)
    bad = QuantizedArray(jnp.where(outside, nan, kv.values), jnp.where(outside, jnp.nan, kv.scales), kv.block)
    np.testing.assert_array_equal(run(q, bad, weights, *window), clean)
    values = q.values.at[5, 0, 7].set(nan)
    got = np.asarray(run(q.with_values(values), kv, weights, *window))
    assert np.isnan(got[5, start[5] : end[5]]).all()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(clean))
    np.testing.assert_array_equal(np.delete(got, 5, 0), np.delete(clean, 5, 0))


@pytest.mark.smoke
@pytest.mark.parametrize("tensor_sums", [False, True])
@pytest.mark.parametrize("function", [mqa_logits, bf16_mqa_logits])
def test_runs_are_equal(function, tensor_sums):
    operands = draw(4, 1030, 5000, 64, 128)
    run = program(function, config=IndexerConfig(2, 2, tensor_sums=tensor_sums, warpgroups=2))
    first = np.asarray(run(*operands))
    for _ in range(20):
        np.testing.assert_array_equal(run(*operands), first)


@pytest.mark.smoke
def test_causal_and_packed_windows():
    """The last tokens of a sequence, and several sequences one behind the other: shares begin anywhere."""
    q, kv, weights, *_ = draw(5, 700, 3000, 32, 128)
    last = np.arange(2301, 3001), np.zeros(700)
    edges = np.array([0, 100, 101, 350, 690, 700])
    which = np.searchsorted(edges, np.arange(700), side="right") - 1
    packed = edges[which] * 3000 // 700, np.arange(700) * 3000 // 700 + 1
    for start, end in ((last[1], last[0]), packed, (last[1], last[1])):
        window = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)
        check(program(bf16_mqa_logits)(q, kv, weights, *window), exact(q, kv, weights, *window))


@pytest.mark.smoke
@pytest.mark.parametrize("own_keys", [False, True])
def test_batches(own_keys):
    draws = [draw(10 * i, 21, 300, 16, 64) for i in range(3)]
    q, kv, weights, start, end = (jnp.stack(x) for x in zip(*draws, strict=True))
    kv = kv if own_keys else kv[0]
    for options in ({}, {"compressed": True, "max_len": 77}):
        function = functools.partial(bf16_mqa_logits, **options)
        got = jax.jit(jax.vmap(function, (0, 0 if own_keys else None, 0, 0, 0)))(q, kv, weights, start, end)
        for i in range(3):
            one = q[i], kv[i] if own_keys else kv, weights[i], start[i], end[i]
            check(got[i], exact(*one, options.get("max_len")))


@pytest.mark.smoke
def test_more_elements_than_int32():
    """The last rows of a result of 2^31 elements and more."""
    tokens, keys = 4200, 520_000
    q, kv = normal(0, tokens, 1, 32), normal(1, keys, 32)
    weights = normal(2, tokens, 1, dtype=jnp.float32)
    start, end = jnp.full(tokens, keys - 300, jnp.int32), jnp.full(tokens, keys, jnp.int32)
    got = program(bf16_mqa_logits, out_dtype=jnp.bfloat16)(q, kv, weights, start, end)
    tail = np.asarray(got[-50:, -400:])
    want = exact(q[-50:], kv[-400:], weights[-50:], np.full(50, 100), np.full(50, 400))
    check(tail, want, 3e-5)
    assert int(jnp.sum(jnp.isneginf(got), dtype=jnp.uint32)) == (tokens * (keys - 300)) % 2**32


# Page, heads, tokens of a request, whether a page's scales lie behind its values.
PAGES = [
    (64, 64, 1, True),
    (64, 64, 2, True),
    (16, 64, 1, False),
    (32, 32, 4, True),
    (128, 128, 8, False),
    (64, 24, 3, True),
]


def draw_pages(page: int, heads: int, tokens: int, requests: int = 9, width: int = 12) -> tuple[Any, ...]:
    """q, values, scales, weights, contexts, tables; what no context reaches is NaN, or is no page."""
    rng = np.random.default_rng(page + heads)
    lens = np.sort(rng.integers(0, width * page + 1, (requests, tokens)), axis=1).astype(np.int32)
    lens[0], lens[1], lens[2] = 0, width * page, 1
    pages = requests * width + 3
    tables = rng.permutation(pages)[: requests * width].reshape(requests, width).astype(np.int32)
    reached = np.arange(width)[None] < -(-lens.max(1) // page)[:, None]
    unused = np.setdiff1d(np.arange(pages), tables[reached])
    tables = np.where(reached, tables, 2**31 - 1)
    values = np.array(normal(1, pages, page, 128).astype(jnp.float8_e4m3fn))
    scales = rng.uniform(0.5, 2, (pages, page)).astype(np.float32)
    values[unused], scales[unused] = np.nan, np.nan
    q = normal(0, requests, tokens, heads, 128).astype(jnp.float8_e4m3fn)
    weights = normal(2, requests, tokens, heads, dtype=jnp.float32)
    return q, values, scales, weights, lens, tables


@pytest.mark.smoke
@pytest.mark.parametrize(("page", "heads", "tokens", "joined"), PAGES, ids=str)
def test_pages(page, heads, tokens, joined):
    q, values, scales, weights, lens, tables = draw_pages(page, heads, tokens)
    keys = values.astype(np.float64) * scales[..., None]
    keys = np.concatenate([keys, np.zeros_like(keys[:1])])
    want = np.stack(
        [
            exact(
                q[b],
                keys[np.minimum(tables[b], len(values))].reshape(-1, 128),
                weights[b],
                0 * lens[b],
                lens[b],
            )
            for b in range(len(q))
        ]
    )
    cache = (jnp.asarray(values), jnp.asarray(scales))
    given = bytes_of(*cache).reshape(len(values), page, 132) if joined else cache
    operands = q, given, weights, jnp.asarray(lens), jnp.asarray(tables)
    first = program(paged_mqa_logits)(*operands)
    check(first, want)
    for _ in range(20):
        np.testing.assert_array_equal(program(paged_mqa_logits)(*operands), first)
    warpgroups = 2 if page == 128 else 3
    most = 128 // (-(-heads // 8) * 8)
    for config in (IndexerConfig(1, 4, warpgroups=2), IndexerConfig(most, 3, warpgroups=warpgroups)):
        check(program(paged_mqa_logits, config=config, num_sms=5)(*operands), want)


@pytest.mark.smoke
def test_gradients():
    q, kv, weights, *window = draw(6, 64, 300, 8, 64)

    def loss(function: Any, *live: jax.Array) -> jax.Array:
        logits = function(*live, *window)
        return jnp.sum(jnp.where(jnp.isinf(logits), 0, logits) ** 2)

    got = jax.jit(jax.grad(functools.partial(loss, bf16_mqa_logits), (0, 1, 2)))(q, kv, weights)
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = jax.device_get((q, kv, weights))
        want = jax.grad(functools.partial(loss, bf16_mqa_logits), (0, 1, 2))(*on_cpu)
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert calc_diff(one, other) < 1e-4


@pytest.mark.smoke
def test_a_configuration_is_taken():
    operands = draw(7, 40, 300, 64, 128)
    few = IndexerConfig(tokens=1, stages=2)
    check(program(bf16_mqa_logits, config=few)(*operands), exact(*operands))
