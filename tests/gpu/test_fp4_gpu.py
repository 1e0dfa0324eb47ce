"""Logits of FP4 operands on a GPU: against float64, and bit for bit against those of expanded keys.

Run: pytest -m gpu tests/gpu/test_fp4_gpu.py        (half a minute)
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
from jax_deepgemm.indexer import (
    Fp4Array,
    IndexerConfig,
    dequantize_fp4,
    mqa_logits,
    paged_mqa_logits,
    quantize_fp4,
)
from jax_deepgemm.ops.indexer import fp4, sm90
from jax_deepgemm.ops.indexer.family import LogitsProblem
from jax_deepgemm.ops.indexer.paged_op import bytes_of
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import meant, random, scales_of, words
from tests.shared.logits_oracle import calc_diff, exact, windows

# Page, heads, tokens of a request, d, whether a page's scales lie behind its values.
PAGES = [
    (64, 64, 1, 128, True),
    (64, 64, 2, 128, False),
    (16, 32, 4, 128, True),
    (32, 24, 3, 64, False),
    (128, 128, 8, 128, True),
    (16, 8, 1, 32, True),
]
REQUESTS, WIDTH = 9, 12
BOUND = 5e-6


def problem(page: int, heads: int, tokens: int, depth: int, joined: bool, packed: bool = True) -> Any:
    return LogitsProblem(
        tokens * REQUESTS,
        WIDTH * page,
        WIDTH * page,
        heads,
        depth,
        compressed=True,
        batches=REQUESTS,
        page=page,
        pages=REQUESTS * WIDTH + 3,
        joined=joined,
        packed=packed,
    )


def configurations(*shape: Any) -> list[IndexerConfig]:
    """A quarter of those that the cost model chooses among, another for each shape, and one of few slots."""
    candidates = list(sm90.candidates(problem(*shape), H200))
    some = candidates[PAGES.index(shape) % 4 :: 4]
    return [*some, IndexerConfig(candidates[0].tokens, 2, warpgroups=2)]


def kernels() -> Iterator[Any]:
    for shape in PAGES:
        for config in configurations(*shape):
            yield sm90.kernel_source(problem(*shape), config)
            yield sm90.kernel_source(problem(*shape[:-1], False, packed=False), config)
    yield LogitsProblem(130, 1000, 1000, 64, 128)
    yield LogitsProblem(130, 1000, 1000, 24, 64)
    yield LogitsProblem(3, 1000, 1000, 64, 128, packed=True)
    yield LogitsProblem(5, 1000, 1000, 24, 64, packed=True)


@functools.cache
def program(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options))


@pytest.mark.smoke
def test_numbers():
    """Quantised and expanded as on a CPU, rows of any scales too, bit for bit."""
    x = normal(0, 64, 128, dtype=jnp.float32) * jnp.exp2(jnp.arange(64.0) - 40)[:, None]
    wide = random(1, 512, 128, lowest=0, highest=255)
    near = random(2, 512, 128, lowest=100, highest=125)

    def everything(x: Any, *rows: Any) -> Any:
        expanded = [fp4.expand(*fp4.fp4_operand("test", "q", one, "[n, d]")) for one in rows]
        return quantize_fp4(x), dequantize_fp4(quantize_fp4(x)), expanded

    got = jax.device_get(jax.jit(everything)(x, wide, near))
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.device_get(jax.jit(everything)(*jax.device_get((x, wide, near))))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("tokens", "heads", "depth"), [(130, 64, 128), (130, 24, 64), (3, 64, 128), (5, 24, 64), (7, 8, 32)]
)
def test_dense(tokens, heads, depth):
    """Of many tokens, of which keys are expanded before, and of a few, of which the kernel does it."""
    q, kv = random(0, tokens, heads, depth), random(1, 1000, depth)
    weights = normal(2, tokens, heads, dtype=jnp.float32)
    window = [jnp.asarray(x) for x in windows(0, tokens, 1000)]
    got = np.asarray(program(mqa_logits)(q, kv, weights, *window))
    rows = program(mqa_logits, compressed=True, max_len=100)
    assert calc_diff(rows(q, kv, weights, *window), exact(meant(q), meant(kv), weights, *window, 100)) < BOUND
    want = exact(meant(q), meant(kv), weights, *window)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert calc_diff(got, want) < BOUND


def draw(page: int, heads: int, tokens: int, depth: int) -> tuple[Any, ...]:
    """q, a cache, weights, contexts, tables; what no context reaches is NaN, or is no page."""
    rng = np.random.default_rng(page + heads)
    lens = np.sort(rng.integers(0, WIDTH * page + 1, (REQUESTS, tokens)), axis=1).astype(np.int32)
    lens[0], lens[1], lens[2] = 0, WIDTH * page, 1
    pages = REQUESTS * WIDTH + 3
    tables = rng.permutation(pages)[: REQUESTS * WIDTH].reshape(REQUESTS, WIDTH).astype(np.int32)
    reached = np.arange(WIDTH)[None] < -(-lens.max(1) // page)[:, None]
    unused = np.setdiff1d(np.arange(pages), tables[reached])
    tables = np.where(reached, tables, 2**31 - 1)
    keys = random(1, pages, page, depth)
    codes = np.array(keys.scales).view(np.uint8)
    codes[unused] = 255
    q = normal(0, REQUESTS, tokens, heads, depth).astype(jnp.float8_e4m3fn)
    weights = normal(2, REQUESTS, tokens, heads, dtype=jnp.float32)
    return q, Fp4Array(keys.values, scales_of(codes)), weights, jnp.asarray(lens), jnp.asarray(tables)


@pytest.mark.smoke
@pytest.mark.parametrize(("page", "heads", "tokens", "depth", "joined"), PAGES, ids=str)
def test_pages(page, heads, tokens, depth, joined):
    """Against float64; every configuration gives the bits that it gives of expanded keys; 20 equal runs."""
    q, cache, weights, lens, tables = draw(page, heads, tokens, depth)
    keys = meant(cache)
    keys = np.concatenate([keys, np.zeros_like(keys[:1])])
    at = np.minimum(tables, len(keys) - 1)
    of_requests = [keys[at[b]].reshape(-1, depth) for b in range(REQUESTS)]
    want = np.stack([exact(q[b], of_requests[b], weights[b], 0 * lens[b], lens[b]) for b in range(REQUESTS)])
    bytes_ = bytes_of(cache.values, words(cache)).reshape(len(keys) - 1, page, depth // 2 + 4)
    operands = q, bytes_ if joined else cache, weights, lens, tables
    first = np.asarray(program(paged_mqa_logits)(*operands))
    np.testing.assert_array_equal(np.isneginf(first), np.isneginf(want))
    assert calc_diff(first, want) < BOUND
    for _ in range(20):
        np.testing.assert_array_equal(program(paged_mqa_logits)(*operands), first)
    expanded = fp4.expand(cache.values, words(cache))
    for config in configurations(page, heads, tokens, depth, joined):
        run = program(paged_mqa_logits, config=config, num_sms=5)
        np.testing.assert_array_equal(run(*operands), run(q, expanded, weights, lens, tables))


@pytest.mark.smoke
def test_nan_of_a_key_is_its_own():
    q, cache, weights, lens, tables = draw(64, 64, 2, 128)
    clean = np.asarray(program(paged_mqa_logits)(q, cache, weights, lens, tables))
    nan = jax.lax.bitcast_convert_type(jnp.uint8(255), jnp.float8_e8m0fnu)
    bad = Fp4Array(cache.values, cache.scales.at[tables[1, 3], 17, 2].set(nan))
    got = np.array(program(paged_mqa_logits)(q, bad, weights, lens, tables))
    column = 3 * 64 + 17
    assert np.isnan(got[1, :, column]).all()
    got[1, :, column] = clean[1, :, column]
    np.testing.assert_array_equal(got, clean)
