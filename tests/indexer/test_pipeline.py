"""From queries and keys to what is attended to: quantise, score, choose; cut over devices, exported."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks, topk
from jax_deepgemm.indexer import bf16_mqa_logits, indexer_quantize, mqa_logits, paged_mqa_logits
from tests.shared import op_checks, topk_oracle
from tests.shared.arrays import normal
from tests.shared.logits_oracle import exact, windows
from tests.shared.op_checks import OpCase, Shard

pytestmark = pytest.mark.any_version

S, N, H, D, K = 8, 64, 8, 32, 5
PAGE, PAGES, WIDTH = 16, 12, 3


def chosen(
    q: Any, k: Any, weights: Any, start: Any, end: Any, *, logits: Any = None, out_sharding: Any = None
) -> jax.Array:
    """Which keys each token attends to. `logits`: their sharding, where it does not follow from operands."""
    queries, keys = indexer_quantize(q), indexer_quantize(k)
    scores = mqa_logits(queries, keys, weights, start, end, out_sharding=logits)
    return topk(scores, K, order="index", out_sharding=out_sharding)


def draw(seed: int) -> list[jax.Array]:
    """q, k, weights, windows."""
    q, k = normal(seed, S, H, D), normal(seed + 1, N, D)
    weights = normal(seed + 2, S, H, dtype=jnp.float32)
    return [q, k, weights, *map(jnp.asarray, windows(seed, S, N))]


def test_against_float64():
    q, k, weights, start, end = draw(0)
    scores = exact(q, k, weights, start, end)
    got = topk(bf16_mqa_logits(q, k, weights, start, end), K, order="index")
    np.testing.assert_array_equal(got, topk_oracle.topk(scores.astype(np.float32), K, by_index=True))
    assert np.mean(np.asarray(chosen(q, k, weights, start, end)) == np.asarray(got)) > 0.6  # FP8 is coarser


# Over devices ----------------------------------------------------------------------------------------------

ROWS = P("x"), P(), P("x"), P("x"), P("x")
KEYS = P(), P("y"), P(), P(), P()
BOTH = P("x"), P("y"), P("x"), P("x"), P("x")
HEADS = P(None, "y"), P(), P(None, "y"), P(), P()
ROWS_AND_HEADS = P("x", "y"), P(), P("x", "y"), P("x"), P("x")
MERGED = ("all-gather",) * 2
"""Of the best of each device, and where they are."""


def cased(name: str, logits: Any, *shards: Shard, **more: Any) -> OpCase:
    def call(*operands: jax.Array, out_sharding: Any = None) -> jax.Array:
        of_logits = None if out_sharding is None else logits
        return chosen(*operands, logits=of_logits, out_sharding=out_sharding)

    return OpCase(name, call, draw, shards=shards, **more)


CASES = [
    cased("rows", None, Shard(ROWS, P("x"), modes=("auto", "explicit", "shard_map")),
          nests=(((0, 0, 0, 0, 0),), ((0, None, 0, None, 0),))),
    cased("keys", P(None, "y"), Shard(KEYS, P(), MERGED)),
    cased("rows and keys", P("x", "y"), Shard(BOTH, P("x"), MERGED)),
    cased("heads", P(), Shard(HEADS, P(), ("all-reduce",))),
    cased("rows and heads", P("x"), Shard(ROWS_AND_HEADS, P("x"), ("all-reduce",))),
]  # fmt: skip


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_choice(check):
    check()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_no_device_has_the_scores_of_all_keys(count):
    """Of keys cut over devices: each finds the best of its own, and the best of those of all are chosen."""
    given = draw(3)
    mesh = op_checks.make_mesh("auto", (count,), ("y",))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, KEYS, strict=True)]
    compiled = jax.jit(chosen, out_shardings=NamedSharding(mesh, P())).lower(*placed).compile()
    np.testing.assert_array_equal(compiled(*placed), chosen(*given))
    text = compiled.as_text()
    assert f"f32[{S},{N // count}]" in text
    assert f"f32[{S},{N}]" not in text
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered == [f"{S},{count * K}"] * 2


def test_groups_of_heads():
    """vmap over them, keys shared: their logits add up to those of all heads."""
    q, k, weights, start, end = draw(0)
    groups = jnp.moveaxis(q.reshape(S, 4, H // 4, D), 1, 0), jnp.moveaxis(weights.reshape(S, 4, -1), 1, 0)
    logits = functools.partial(bf16_mqa_logits, k_start=start, k_end=end)
    apart = jax.jit(jax.vmap(lambda q, w: logits(q, k, w)))(*groups)
    np.testing.assert_allclose(jnp.sum(apart, axis=0), logits(q, k, weights), rtol=1e-5, atol=1e-4)


# Pages -----------------------------------------------------------------------------------------------------

LENGTHS = (20, 0, 37, 3)
"""Tokens of requests, of which the second has none."""
TABLES = np.array([[7, 3, -1], [-1, -1, -1], [0, 9, 4], [11, -1, -1]], np.int32)
WHOSE = np.repeat(np.arange(4, dtype=np.int32), LENGTHS)
PLACES = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
SLOTS = TABLES[WHOSE, PLACES // PAGE] * PAGE + PLACES % PAGE


def cache_of(k: jax.Array) -> jax.Array:
    """Keys of all tokens in their pages; NaN in the places of others."""
    return indexer_quantize(
        k, cache=jnp.full((PAGES, PAGE, D + 4), 0xFF, jnp.uint8), slots=jnp.asarray(SLOTS)
    )


def from_pages(
    q: Any, weights: Any, lens: Any, tables: Any, cache: Any, whose: Any = None, *, out_sharding: Any = None
) -> jax.Array:
    """What tokens of requests attend to; q [t, h, d] has one of each request, or `whose` says."""
    queries = indexer_quantize(q)
    queries = queries.values[:, None], queries.scales[:, None]
    logits = paged_mqa_logits(queries, cache, weights[:, None], lens, tables, indices=whose)
    return topk(logits[:, 0], K, order="index", out_sharding=out_sharding)


def test_pages_are_chosen_from_as_one_row_of_keys_is():
    """All tokens of all requests at once, as prefill does, and the last of each, as decoding does."""
    tokens = len(WHOSE)
    q, k, weights = normal(0, tokens, H, D), normal(1, tokens, D), normal(2, tokens, H, dtype=jnp.float32)
    first = np.concatenate([[0], np.cumsum(LENGTHS)])[WHOSE].astype(np.int32)
    dense = np.asarray(jax.jit(chosen)(q, k, weights, first, first + PLACES + 1))
    want = np.where(dense < 0, -1, dense - first[:, None])
    cache, lens = cache_of(k), jnp.asarray(PLACES) + 1
    got = jax.jit(from_pages)(q, weights, lens, jnp.asarray(TABLES), cache, jnp.asarray(WHOSE))
    np.testing.assert_array_equal(got, want)
    last = np.flatnonzero(np.diff(WHOSE, append=-1))
    some = TABLES[WHOSE[last]]
    np.testing.assert_array_equal(from_pages(q[last], weights[last], lens[last], some, cache), want[last])


def draw_pages(seed: int) -> list[jax.Array]:
    """q, weights, contexts and tables of eight requests, a cache, and whose eight tokens are."""
    rng = np.random.default_rng(seed)
    lens, whose = rng.integers(0, WIDTH * PAGE + 1, S), rng.integers(0, S, S)
    tables = np.stack([rng.permutation(PAGES)[:WIDTH] for _ in range(S)])
    cache = cache_of(normal(seed, len(WHOSE), D))
    held = indexer_quantize(normal(seed, PAGES * PAGE, D), cache=cache, slots=jnp.arange(PAGES * PAGE))
    given = normal(seed + 1, S, H, D), normal(seed + 2, S, H, dtype=jnp.float32)
    return [*given, *(jnp.asarray(x, jnp.int32) for x in (lens, tables)), held, jnp.asarray(whose, jnp.int32)]


REQUESTS = P("x"), P("x"), P("x"), P("x"), P()
TOKENS = P("x"), P("x"), P("x"), P(), P(), P("x")
ALL_MODES = ("auto", "explicit", "shard_map")
IN_PAGES = [
    OpCase(
        "requests",
        from_pages,
        lambda seed: draw_pages(seed)[:5],
        nests=(((0, 0, 0, 0, None),),),
        shards=(Shard(REQUESTS, P("x"), modes=ALL_MODES),),
    ),
    OpCase("tokens", from_pages, draw_pages, shards=(Shard(TOKENS, P("x"), modes=ALL_MODES),)),
]


@pytest.mark.parametrize("check", op_checks.checks(IN_PAGES))
def test_choice_from_pages(check):
    check()


# Export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "operands"), [(chosen, draw(0)), (from_pages, draw_pages(0))])
def test_export(function, operands):
    exported = export.export(jax.jit(function), platforms=["cpu", "cuda"], disabled_checks=export_checks)
    program = export.deserialize(exported(*operands).serialize())
    assert program.mlir_module().count("@jax_deepgemm_launch(") >= 3
    np.testing.assert_array_equal(program.call(*operands), jax.jit(function)(*operands))


def test_export_of_a_program_of_several_devices():
    operands = draw(0)
    mesh = op_checks.make_mesh("explicit")
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, BOTH, strict=True)]
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(chosen, out_sharding=P("x")))
        program = export.deserialize(export.export(run, disabled_checks=export_checks)(*placed).serialize())
        np.testing.assert_array_equal(jax.jit(program.call)(*placed), chosen(*operands))
