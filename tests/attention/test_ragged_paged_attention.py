"""ragged_paged_attention against float64, over drawn batches and every option; bad data; transformations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.attention import PagedKVCache, ragged_paged_attention
from jax_deepgemm.ops.attention.op import attention_op
from tests.shared import attention_oracle as oracle
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

LENS = {
    "decode": ([1] * 6, [1, 15, 16, 17, 40, 64]),
    "prompts": ([5, 17, 1, 33], [5, 17, 1, 33]),
    "parts of prompts": ([7, 20, 3], [30, 41, 48]),
    "mixed, and nothing": ([1, 0, 9, 2, 0, 1], [0, 12, 9, 33, 0, 50]),
}
HEADS = {"mha": (3, 3), "gqa4": (8, 2), "gqa7": (7, 1), "gqa8": (8, 1)}


def check(b: oracle.Batch, tolerance: float = 1e-2, **options: Any) -> None:
    want, want_lse = oracle.attention(b, **options)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in options.items() if isinstance(x, np.ndarray)}
    run = functools.partial(ragged_paged_attention, return_lse=True, **{**options, **arrays})
    out, lse = jax.jit(run)(*b.call())
    assert out.dtype == b.q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("lens", "heads"), list(zip(LENS, HEADS, strict=True)))
def test_against_float64(lens, heads):
    h, g = HEADS[heads]
    check(oracle.draw(0, *LENS[lens], heads=h, kv_heads=g))


SLOPES, SINKS = 2.0 ** -np.arange(1, 9), np.linspace(-1, 3, 8)
OPTIONS = {
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "not causal": {"causal": False},
    "scale": {"scale": 0.7},
    "all": {"window": 20, "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS, "scale": 0.3},
    "rows beyond": {"max_q_len": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    given = OPTIONS[name]
    check(
        oracle.draw(1, [7, 20, 0, 1, 2, 1], [30, 41, 9, 33, 2, 0], heads=8, window=given.get("window")),
        **given,
    )


@pytest.mark.parametrize("page", [16, 64, 256])
def test_page_sizes_and_lengths_at_their_edges(page):
    lens = [0, 1, page - 1, page, page + 1]
    check(oracle.draw(2, [min(n, 2) for n in lens], lens, heads=2, kv_heads=1, page=page))


def test_other_types():
    lens = LENS["parts of prompts"]
    check(oracle.draw(3, *lens, dtype=jnp.float16), 2e-3)
    check(oracle.draw(4, *lens, dtype=jnp.float8_e4m3fn), 2e-2)
    check(oracle.draw(5, *lens, head_dim=192, v_head_dim=128))


# Data that is known on the device alone ---------------------------------------------------------------------


def test_what_no_batch_has_leaves_no_array():
    """Lengths beyond the tables and below zero, rows beyond q, pages and a layer that are not there."""
    b = oracle.draw(6, [4, 3, 2], [20, 32, 9], behind=0)
    q, cache, tables, starts, lens = b.call()
    run = jax.jit(functools.partial(ragged_paged_attention, return_lse=True))

    def same(got: Any, want: Any) -> None:
        jax.tree.map(np.testing.assert_array_equal, got, want)

    same(run(q, cache, tables, starts, jnp.array([20, 2**31 - 1, 9])), run(q, cache, tables, starts, lens))
    same(
        run(q, cache, tables, starts, jnp.array([20, 32, -7])),
        run(q, cache, tables, starts, lens.at[2].set(0)),
    )
    wide = jnp.array([-(2**31), 4, 7, 2**31 - 1])
    same(run(q, cache, tables, wide, lens), run(q, cache, tables, starts, lens))
    falls = jnp.array([0, 4, 2, 9])  # the second has no rows, the third has those from 2 on
    third = run(q, cache, tables[2:], jnp.array([2, 9]), lens[2:])
    same([x[4:] for x in run(q, cache, tables, falls, lens)], [x[4:] for x in third])
    gone = dataclasses.replace(b, tables=np.where(np.arange(2) == 1, -1, b.tables))
    check(gone)
    stacked = dataclasses.replace(cache, stacked=True)
    out, lse = run(q, stacked, tables, starts, lens, layer=jnp.int32(1), sinks=jnp.arange(4.0))
    assert not np.any(out)
    np.testing.assert_array_equal(lse, np.tile(np.arange(4.0), (9, 1)))


def test_numbers_beyond_int32():
    """Options are held to what can be, and integers of other types do not wrap around."""
    b = oracle.draw(12, [4, 3, 2], [20, 32, 9], behind=0)
    q, cache, tables, starts, lens = b.call()
    want = ragged_paged_attention(q, cache, tables, starts, lens)
    for options in ({"window": 2**40}, {"max_q_len": 2**40}, {"split": 2**40}):
        got = jax.jit(functools.partial(ragged_paged_attention, **options))(q, cache, tables, starts, lens)
        np.testing.assert_array_equal(got, want)
    far = np.where(np.arange(2) == 1, b.tables.astype(np.int64) + 2**32, b.tables)
    none = ragged_paged_attention(q, cache, np.where(np.arange(2) == 1, -1, b.tables), starts, lens)
    np.testing.assert_array_equal(ragged_paged_attention(q, cache, far, starts, lens), none)
    many = np.array([20, 2**32 - 1, 9], np.uint32)
    np.testing.assert_array_equal(ragged_paged_attention(q, cache, tables, starts, many), want)


def test_number_of_sequences():
    b = oracle.draw(7, [4, 1, 2], [20, 32, 9])
    q, cache, tables, starts, lens = b.call()
    two = dataclasses.replace(b, tables=b.tables[:2], starts=b.starts[:3], lens=b.lens[:2])
    want, _ = oracle.attention(two)
    for number in (2, np.int64(2), jnp.int32(2)):
        out = ragged_paged_attention(q, cache, tables, starts, lens, num_seqs=number)
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=1e-2)
    run = jax.jit(lambda n: ragged_paged_attention(q, cache, tables, starts, lens, num_seqs=n))
    assert not np.any(run(jnp.int32(-3)))
    np.testing.assert_array_equal(run(jnp.int32(9)), ragged_paged_attention(q, cache, tables, starts, lens))


def test_layers():
    b = oracle.draw(8, [1, 3], [20, 9])
    q, cache, *rest = b.call()
    k, v = (jnp.concatenate([jnp.full_like(x, jnp.nan), x]) for x in (cache.k, cache.v))
    ones = jnp.ones((2, 2))
    stacked = PagedKVCache(k, v, ones, ones, True)
    want = ragged_paged_attention(q, cache, *rest)
    np.testing.assert_array_equal(ragged_paged_attention(q, stacked, *rest, layer=1), want)
    run = jax.jit(lambda layer: ragged_paged_attention(q, stacked, *rest, layer=layer))
    np.testing.assert_array_equal(run(jnp.int32(1)), want)
    assert np.isnan(np.asarray(run(0), np.float32)[:4]).all()


# Transformations --------------------------------------------------------------------------------------------

FORM = {
    "out_dtype": jnp.bfloat16,
    "group": 2,
    "scale": 0.2,
    "causal": True,
    "window": 0,
    "softcap": 0.0,
    "with_sinks": True,
    "with_slopes": True,
    "max_q_len": 0,
    "split": 0,
}


def attend(*arrays: jax.Array, out_sharding: Any = None) -> Any:
    return tuple(attention_op(2)(*arrays, out_sharding=out_sharding, **FORM))


def operands(seed: int) -> list[jax.Array]:
    b = oracle.draw(seed, [2, 1], [20, 9], heads=8, kv_heads=4, head_dim=16, spare=1, behind=3)
    q, cache, tables, starts, lens = b.call()
    pools = [jnp.nan_to_num(x[:, :4]) for x in (cache.k, cache.v)]
    per_head = normal(seed, 2, 8, dtype=jnp.float32)
    scales = jnp.ones((1, 4))
    return [
        q,
        *pools,
        scales,
        scales,
        tables,
        starts,
        lens,
        jnp.zeros(1, jnp.int32),
        *per_head,
    ]


HEADS_OF_Q, POOL, SCALE, OF_HEADS = P(None, "y"), P(None, None, "y"), P(None, "y"), P("y")
CUT = (HEADS_OF_Q, POOL, POOL, SCALE, SCALE, P(), P(), P(), P(), OF_HEADS, OF_HEADS)
CASES = [
    OpCase(
        "attention",
        attend,
        operands,
        nests=(((0,) * 11,), ((0, None, None, None, None, 0, 0, 0, None, None, None),)),
        shards=(
            Shard(CUT, (HEADS_OF_Q, HEADS_OF_Q), modes=("auto", "explicit", "shard_map")),
            Shard((P(), *CUT[1:9], P(), P()), (HEADS_OF_Q, HEADS_OF_Q)),
            Shard((P("x"), *(P(),) * 10), (P("x"), P("x")), ("all-gather",), modes=("auto",)),
        ),
        tolerance=1e-2,
    )
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_heads_over_devices_as_users_write_it(kind):
    """Heads of q cut or whole; over more devices than the cache has heads, too. Pages stay where they are."""
    b = oracle.draw(9, [2, 1], [20, 9], heads=8, kv_heads=4)
    q, cache, *rest = b.call()
    want = ragged_paged_attention(q, cache, *rest)
    for size in (4, 8):
        mesh = jax.make_mesh((size,), ("x",), axis_types=(kind,))
        place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: B023, E731
        pools = jax.device_put((cache.k, cache.v), place(None, None, "x") if size == 4 else place())
        held = dataclasses.replace(cache, k=pools[0], v=pools[1])
        run = jax.jit(ragged_paged_attention)
        for spec in ((), (None, "x")):
            given = jax.device_put(q, place(*spec))
            compiled = run.lower(given, held, *rest).compile()
            assert all("16,32]" not in line for line in gathers(compiled.as_text()))
            np.testing.assert_array_equal(run(given, held, *rest), want)


def gathers(hlo: str) -> list[str]:
    """Lines of what gathers: q of heads that the cache cannot be cut by, but no pages."""
    return [line for line in hlo.splitlines() if "all-gather" in line]


def test_export():
    b = oracle.draw(10, [2, 1], [20, 9])
    q, cache, *rest = b.call()
    jax.export.register_pytree_node_serialization(
        PagedKVCache,
        serialized_name="PagedKVCache",
        serialize_auxdata=lambda stacked: bytes([*stacked]),
        deserialize_auxdata=lambda data: tuple(map(bool, data)),
    )
    run = jax.jit(ragged_paged_attention)
    stored = jax.export.export(run, platforms=["cpu"])(q, cache, *rest).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(stored).call(q, cache, *rest), run(q, cache, *rest))


def test_symbolic_sizes_on_a_cpu():
    b = oracle.draw(11, [2, 1], [20, 9])
    q, cache, *rest = b.call()
    _, heads, depth = q.shape
    (symbol,) = jax.export.symbolic_shape("t")

    def run(q: Any) -> Any:
        return ragged_paged_attention(q, cache, *rest)

    given = jax.ShapeDtypeStruct((symbol, heads, depth), q.dtype)
    exported = jax.export.export(jax.jit(run), platforms=["cpu"])(given)
    np.testing.assert_array_equal(exported.call(q), run(q))


# Errors -----------------------------------------------------------------------------------------------------

CACHE = PagedKVCache.create(2, 16, 2, 32)
Q, TABLES = jnp.zeros((4, 4, 32), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32)
GIVEN = {"q": Q, "tables": TABLES, "starts": jnp.arange(3), "lens": jnp.ones(2, int)}


def call(**changed: Any) -> Any:
    given = {**GIVEN, **changed}
    q, tables, starts, lens = (given.pop(name) for name in GIVEN)
    return ragged_paged_attention(q, CACHE, tables, starts, lens, **given)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"q": Q.astype(jnp.float32)}, TypeError, r"q is float32 .* as the cache is bfloat16. Con"),
        ({"q": Q[0]}, ValueError, r"need \[t, heads, head_dim\], head_dim 32"),
        ({"q": Q[..., :16]}, ValueError, "head_dim 32 as the cache has"),
        ({"q": Q[:, :3]}, ValueError, "q has 3 heads and the cache 2, need a multiple"),
        ({"tables": TABLES[0]}, ValueError, r"block_tables are int32 \[1\], need integers \[s, p\]"),
        ({"tables": TABLES * 1.0}, TypeError, "block_tables is float32"),
        ({"starts": jnp.arange(2)}, ValueError, r"cu_q_lens is int32 \[2\], need \[3\]: block_tables have 2"),
        ({"lens": jnp.ones(1, int)}, ValueError, r"kv_lens is int32 \[1\], need \[2\]"),
        ({"num_seqs": 3}, ValueError, "num_seqs is 3, need 0 to 2"),
        ({"num_seqs": 1.5}, TypeError, "num_seqs is a float"),
        ({"causal": 1}, TypeError, "causal is 1, need True or False"),
        ({"window": 0}, ValueError, "window is 0, need a whole number, at least 1"),
        ({"window": 4, "causal": False}, ValueError, "it needs causal=True"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, need a positive number"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"sinks": jnp.zeros(2)}, ValueError, r"sinks is float32 \[2\], need \[4\]: one for each head of q"),
        ({"alibi_slopes": jnp.zeros(4, jnp.bfloat16)}, TypeError, r"alibi_slopes.astype\(jnp.float32"),
        ({"max_q_len": 0}, ValueError, "max_q_len is 0"),
        ({"split": "2"}, ValueError, "split is '2'"),
        ({"split": 999}, ValueError, "need 'auto' or a multiple of 256 keys, such as 1024"),
        ({"layer": 0}, ValueError, "so leave layer out"),
        ({"num_sms": 0}, ValueError, "num_sms is 0, need a positive int"),
        ({"config": "fast"}, TypeError, "config is 'fast', need an AttentionConfig or None"),
    ],
)  # fmt: skip
def test_errors(given, error, match):
    with pytest.raises(error, match=match):
        call(**given)


@pytest.mark.parametrize(("layers", "heads"), [(1, 0), (3, 2)])
def test_a_cache_made_by_hand(layers, heads):
    k, scale = jnp.zeros((layers, 2, heads, 16, 32), jnp.bfloat16), jnp.ones((layers, heads))
    with pytest.raises(ValueError, match=r"a head at least, and one layer unless stacked\. Make it with"):
        PagedKVCache(k, k, scale, scale).check()


def test_there_is_no_derivative():
    with pytest.raises(NotImplementedError, match="to train, attend to keys and values"):
        jax.grad(lambda q: call(q=q).astype(jnp.float32).sum())(Q)
