"""Logits of keys in pages: against float64, in both formats of the cache, under every transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.indexer import get_paged_mqa_logits_metadata, paged_mqa_logits
from jax_deepgemm.ops.indexer.paged_op import bytes_of, paged_op
from jax_deepgemm.ops.quantize import quantize
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.logits_oracle import calc_diff, exact
from tests.shared.op_checks import OpCase, Shard

B, T, H, D, PAGE, M, PAGES = 4, 2, 4, 32, 16, 3, 10
E4M3 = jnp.float8_e4m3fn


def draw(seed: int, t: int = T, page: int = PAGE) -> list[jax.Array]:
    """q, values, scales, weights, contexts (0 and all of them too), tables in any order."""
    rng = np.random.default_rng(seed)
    lens = np.sort(rng.integers(0, M * page + 1, (B, t)), axis=1)
    lens[0], lens[1] = 0, M * page
    tables = np.stack([rng.permutation(PAGES)[:M] for _ in range(B)])
    return [
        normal(seed, B, t, H, D).astype(E4M3),
        normal(seed + 1, PAGES, page, D).astype(E4M3),
        jnp.asarray(rng.uniform(0.5, 2, (PAGES, page)), jnp.float32),
        normal(seed + 2, B, t, H, dtype=jnp.float32),
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(tables, jnp.int32),
    ]


def want(q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any) -> np.ndarray:
    keys = np.asarray(values).astype(np.float64) * np.asarray(scales)[..., None]
    lens = np.asarray(lens)
    tables = np.asarray(tables)
    return np.stack(
        [exact(q[b], keys[tables[b]].reshape(-1, D), weights[b], 0 * lens[b], lens[b]) for b in range(len(q))]
    )


@pytest.mark.any_version
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_both_formats(page, tokens):
    q, values, scales, weights, lens, tables = draw(0, tokens, page)
    oracle = want(q, values, scales, weights, lens, tables)
    got = paged_mqa_logits(q, (values, scales), weights, lens, tables)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(oracle))
    assert calc_diff(got, oracle) < 1e-11
    joined = bytes_of(values, scales)
    for shape in ((PAGES, page, D + 4), (PAGES, page, 1, D + 4)):
        again = paged_mqa_logits(q, joined.reshape(shape), weights, lens, tables)
        np.testing.assert_array_equal(again, got)


@pytest.mark.any_version
def test_one_context_for_all_tokens_and_scales_of_q():
    q, values, scales, weights, lens, tables = draw(0)
    cache = values, scales
    one = paged_mqa_logits(q, cache, weights, lens[:, 1], tables)
    both = paged_mqa_logits(q, cache, weights, jnp.broadcast_to(lens[:, 1:], (B, T)), tables)
    np.testing.assert_array_equal(one, both)
    quantized = quantize(normal(5, B, T, H, D))
    folded = weights * quantized.scales[..., 0]
    np.testing.assert_array_equal(
        paged_mqa_logits(quantized, cache, weights, lens, tables),
        paged_mqa_logits(quantized.values, cache, folded, lens, tables),
    )


@pytest.mark.any_version
@pytest.mark.parametrize("columns", [1, 20, 100])
def test_columns(columns):
    """Fewer than the table has keys, or more."""
    operands = draw(0)
    q, values, scales, weights, lens, tables = operands
    got = paged_mqa_logits(
        q, (values, scales), weights, lens, tables, max_context_len=columns, out_dtype=jnp.bfloat16
    )
    whole = np.pad(want(*operands), ((0, 0), (0, 0), (0, 100)), constant_values=-np.inf)[..., :columns]
    np.testing.assert_array_equal(np.isneginf(got.astype(jnp.float32)), np.isneginf(whole))
    assert calc_diff(got, whole) < 1e-5


@pytest.mark.any_version
def test_what_no_context_reaches_counts_for_nothing():
    q, values, scales, weights, _, tables = draw(0)
    lens = jnp.array([0, 5, PAGE, 2 * PAGE + 1])
    clean = paged_mqa_logits(q, (values, scales), weights, lens, tables)
    used = {int(page) for row, most in zip(tables, -(-lens // PAGE), strict=True) for page in row[:most]}
    unused = jnp.asarray([page not in used for page in range(PAGES)])
    bad = jnp.where(unused[:, None, None], jnp.asarray(jnp.nan, E4M3), values)
    bad = bad.at[tables[1, 0], 5:].set(jnp.nan)
    bad_scales = jnp.where(unused[:, None], jnp.nan, scales)
    beyond = jnp.where(jnp.arange(M)[None] < -(-lens // PAGE)[:, None], tables, 2**31 - 1)
    got = paged_mqa_logits(q, (bad, bad_scales), weights, lens, beyond)
    np.testing.assert_array_equal(got, clean)


@pytest.mark.any_version
def test_numbers_outside_are_defined():
    """Contexts are clipped, and pages outside of the cache hold zeros."""
    q, values, scales, weights, _, tables = draw(0)
    cache = values, scales
    got = paged_mqa_logits(q, cache, weights, jnp.array([-5, 2**31 - 1, 7, M * PAGE]), tables)
    np.testing.assert_array_equal(
        got, paged_mqa_logits(q, cache, weights, jnp.array([0, M * PAGE, 7, M * PAGE]), tables)
    )
    for wrong in (-1, PAGES, 2**31 - 1, -(2**31)):
        lost = paged_mqa_logits(q, cache, weights, jnp.full(B, M * PAGE), tables.at[1, 1].set(wrong))
        assert not np.any(lost[1, :, PAGE : 2 * PAGE])
        np.testing.assert_array_equal(
            np.delete(lost, 1, 0),
            np.delete(paged_mqa_logits(q, cache, weights, jnp.full(B, M * PAGE), tables), 1, 0),
        )


# Requests of different numbers of tokens -------------------------------------------------------------------

WHOSE = [2, 2, 0, 3, 3, 3, 2]
"""Nobody is of request 1, and request 2 has tokens in two places."""


def draw_tokens(seed: int) -> list[jax.Array]:
    """q, values, scales, weights, contexts (0 too) of tokens; tables of requests; whose the tokens are."""
    tokens = len(WHOSE)
    lens = np.random.default_rng(seed).integers(1, M * PAGE + 1, tokens)
    lens[4] = 0
    q, weights = normal(seed, tokens, 1, H, D).astype(E4M3), normal(seed + 2, tokens, 1, H, dtype=jnp.float32)
    _, values, scales, _, _, tables = draw(seed)
    return [q, values, scales, weights, jnp.asarray(lens), tables, jnp.asarray(WHOSE)]


def of_tokens(
    q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any, whose: Any, **options: Any
) -> jax.Array:
    return paged_mqa_logits(q, (values, scales), weights, lens, tables, indices=whose, **options)


def of_some(operands: list[jax.Array], tokens: Any) -> list[jax.Array]:
    return [x[tokens] if i in (0, 3, 4, 6) else x for i, x in enumerate(operands)]


@pytest.mark.any_version
def test_tokens_of_requests():
    operands = draw_tokens(0)
    q, values, scales, weights, lens, tables, whose = operands
    oracle = want(q, values, scales, weights, lens[:, None], np.asarray(tables)[WHOSE])
    got = jax.jit(of_tokens)(*operands)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(oracle))
    assert calc_diff(got, oracle) < 1e-11
    np.testing.assert_array_equal(of_tokens(*operands[:4], lens[:, None], tables, whose), got)
    np.testing.assert_array_equal(of_tokens(*operands[:4], lens, *map(np.asarray, (tables, whose))), got)
    alone = [of_tokens(*of_some(operands, slice(i, i + 1))) for i in range(len(WHOSE))]
    np.testing.assert_array_equal(jnp.concatenate(alone), got)


@pytest.mark.any_version
@pytest.mark.parametrize("wrong", [-1, B, 2**31 - 1, -(2**31)])
def test_tokens_of_nobody_see_nothing(wrong):
    operands = draw_tokens(0)
    clean = of_tokens(*operands)
    got = of_tokens(*operands[:6], operands[6].at[3].set(wrong))
    assert np.isneginf(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(clean, 3, 0))
    nothing = of_tokens(*of_some(operands, slice(0)))
    assert nothing.shape == (0, 1, M * PAGE)


def finite(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isinf(logits), 0, logits)


def call(
    q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any, out_sharding: Any = None
) -> Any:
    options = {"columns": M * PAGE, "out_dtype": jnp.float32, "out_sharding": out_sharding}
    return finite(paged_op(False)(q, values, scales, weights, 0 * lens, lens, tables, **options)[0])


REQUESTS = P("x"), P(), P(), P("x"), P("x"), P("x")
HEADS = P(None, None, "y"), P(), P(), P(None, None, "y"), P(), P()
CASE = OpCase(
    "paged",
    call,
    draw,
    nests=(((0, 0, 0, 0, 0, 0),), ((0, None, None, 0, 0, None),)),
    shards=(
        Shard(REQUESTS, P("x"), modes=("auto", "explicit", "shard_map")),
        Shard(HEADS, P(), ("all-reduce",)),
        Shard((P(),) * 6, P("x", None, "y"), modes=("auto",)),
    ),
)


@pytest.mark.parametrize("check", op_checks.checks([CASE]))
def test_op(check):
    check()


TOKENS = OpCase(
    "tokens",
    lambda *arrays, **options: finite(of_tokens(*arrays, **options)),
    lambda seed: of_some(draw_tokens(seed), jnp.array([*range(len(WHOSE)), 0])),
    nests=(((0, 0, 0, 0, 0, 0, 0),), ((0, None, None, 0, 0, None, None),)),
    shards=(
        Shard(
            (P("x"), P(), P(), P("x"), P("x"), P(), P("x")), P("x"), modes=("auto", "explicit", "shard_map")
        ),
        Shard((P(None, None, "y"), P(), P(), P(None, None, "y"), P(), P(), P()), P(), ("all-reduce",)),
    ),
)


@pytest.mark.parametrize("check", op_checks.checks([TOKENS]))
def test_op_with_tokens_of_requests(check):
    check()


def test_jit_of_a_joined_cache():
    q, values, scales, weights, lens, tables = draw(0)
    joined = bytes_of(values, scales).reshape(PAGES, PAGE, D + 4)
    np.testing.assert_array_equal(
        jax.jit(paged_mqa_logits)(q, joined, weights, lens, tables),
        paged_mqa_logits(q, (values, scales), weights, lens, tables),
    )


@pytest.mark.any_version
@pytest.mark.parametrize("shares", [1, 5, 132])
@pytest.mark.parametrize("tile", [128, 192])
def test_metadata(shares, tile):
    lens = np.array([[3, 300], [0, 0], [128, 129], [100, 1]])
    tiles = -(-lens.max(1) // tile)
    every = [(b, i) for b in range(4) for i in range(tiles[b])] + [(4, 0)]
    got = np.asarray(get_paged_mqa_logits_metadata(lens, shares, tile_keys=tile))
    assert got.shape == (shares + 1, 2)
    assert [tuple(one) for one in got] == [every[(len(every) - 1) * i // shares] for i in range(shares + 1)]
    assert not np.any(np.asarray(get_paged_mqa_logits_metadata(np.zeros(3, int), 4))[:, 1])


Q, VALUES, SCALES, W, LENS, TABLES = draw(0)
CACHE = VALUES, SCALES
KNOWN = np.full(B, 20), np.asarray(TABLES)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "message", "operands"),
    [
        (TypeError, "q is float32.*need float8", (Q.astype(jnp.float32), CACHE, W, LENS, TABLES)),
        (ValueError, "q is .*need .b, next_n, h, d.", (Q[0], CACHE, W, LENS, TABLES)),
        (ValueError, "9 tokens of a request", (jnp.zeros((B, 9, H, D), E4M3), CACHE, W, LENS, TABLES)),
        (ValueError, "weights are .4, 2, 3.", (Q, CACHE, W[..., :3], LENS, TABLES)),
        (TypeError, "kv_cache is float8.*tuple", (Q, VALUES, W, LENS, TABLES)),
        (ValueError, "scales .10, 15.*one scale for each", (Q, (VALUES, SCALES[:, :15]), W, LENS, TABLES)),
        (ValueError, "page of kv_cache has 8 keys", (Q, (VALUES[:, :8], SCALES[:, :8]), W, LENS, TABLES)),
        (ValueError, "d . 4 = 36", (Q, jnp.zeros((PAGES, PAGE, D), jnp.uint8), W, LENS, TABLES)),
        (ValueError, "context_lens are int32 .3", (Q, CACHE, W, LENS[:3], TABLES)),
        (TypeError, "context_lens is float32", (Q, CACHE, W, LENS.astype(jnp.float32), TABLES)),
        (ValueError, "block_tables are int32 .3, 3.", (Q, CACHE, W, LENS, TABLES[:3])),
        (ValueError, r"context_lens\[0\] is 49.*need 0 to 48", (Q, CACHE, W, KNOWN[0] + 29, KNOWN[1])),
        (ValueError, r"block_tables\[0, 0\] is -1", (Q, CACHE, W, KNOWN[0], KNOWN[1] * 0 - 1)),
        (
            ValueError,
            r"block_tables\[0, 1\] is 10.*10 pages",
            (Q, CACHE, W, KNOWN[0], KNOWN[1] * 0 + [0, 10, 99]),
        ),
    ],
)
def test_errors(error, message, operands):
    with pytest.raises(error, match=message):
        paged_mqa_logits(*operands)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"indices are int32 .7. and q is .4, 2, 4, 32.*t, 1, h, d", {0: Q, 3: W, 4: LENS}),
        (ValueError, r"indices are int32 .6. and q is .7, 1, 4, 32", {6: jnp.asarray(WHOSE[:6])}),
        (TypeError, "indices is float32.*need integers", {6: jnp.ones(7)}),
        (ValueError, r"context_lens are int32 .4.*need .7.", {4: jnp.ones(B, jnp.int32)}),
        (ValueError, r"block_tables are int32 .3.*indices=", {5: TABLES[0]}),
        (ValueError, r"indices.0. is 4, need 0 to 3", {6: np.full(7, B)}),
        (ValueError, r"context_lens.0. is 49", {4: np.full(7, 49)}),
        (
            ValueError,
            r"block_tables.3, 0. is 10, and a context reaches it",
            {
                4: np.ones(7, int),
                5: np.array([[0], [9], [9], [10]]).repeat(3, 1),
                6: np.array([0, 1, 3, 0, 2, 2, 2]),
            },
        ),
    ],
)
def test_errors_of_tokens_of_requests(error, message, changed):
    operands = [changed.get(i, x) for i, x in enumerate(draw_tokens(0))]
    with pytest.raises(error, match=message):
        of_tokens(*operands)


@pytest.mark.any_version
def test_options_are_checked():
    operands = Q, CACHE, W, LENS, TABLES
    with pytest.raises(ValueError, match="max_context_len is -1"):
        paged_mqa_logits(*operands, max_context_len=-1)
    with pytest.raises(TypeError, match="out_dtype is float16"):
        paged_mqa_logits(*operands, out_dtype=jnp.float16)
    unreached = KNOWN[1] * 0 + [0, 1, 99]
    assert paged_mqa_logits(Q, CACHE, W, KNOWN[0], unreached).shape == (B, T, M * PAGE)
