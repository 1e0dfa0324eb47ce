"""FP4 operands of logits: against float64 and a table of what four bits mean, in all forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import topk
from jax_deepgemm.indexer import (
    Fp4Array,
    dequantize_fp4,
    indexer_topk,
    mqa_logits,
    paged_indexer_topk,
    paged_mqa_logits,
    quantize_fp4,
)
from jax_deepgemm.ops.indexer import fp4
from jax_deepgemm.ops.indexer.op import logits_op
from jax_deepgemm.ops.indexer.paged_op import bytes_of, paged_op
from jax_deepgemm.ops.quantize import quantize
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import BYTES, meant, random, scales_of, words
from tests.shared.logits_oracle import calc_diff, exact, windows
from tests.shared.op_checks import OpCase, Shard

E4M3 = jnp.float8_e4m3fn
S, N, H = 8, 40, 4


# Numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.any_version
def test_quantize():
    """Scales are the smallest powers of two that reach the largest number; numbers round to the nearest."""
    x = np.array(normal(0, 7, 3, 128, dtype=jnp.float32)) * np.float32(2) ** np.arange(-20, 1).reshape(
        7, 3, 1
    )
    x[0, 0, :32] = np.repeat([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 4) * np.tile([1, -1], 16)
    x[1, :2] = 0
    q = jax.jit(quantize_fp4)(x)
    blocks = x.reshape(7, 3, 4, 32)
    scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(blocks).max(-1), np.float32(1e-4)) / np.float32(6))))
    np.testing.assert_array_equal(q.scales.astype(jnp.float32), scale)
    want = (blocks / scale[..., None]).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale[..., None]
    np.testing.assert_array_equal(meant(q), want.reshape(x.shape))
    np.testing.assert_array_equal(dequantize_fp4(q), want.reshape(x.shape))
    assert not np.any(np.asarray(q.values)[1, :2])
    assert dequantize_fp4(quantize_fp4(x.astype(jnp.bfloat16)), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.any_version
def test_what_is_not_finite_makes_its_block_nan():
    x = jnp.ones((3, 64)).at[0, 3].set(jnp.inf).at[1, 40].set(jnp.nan)
    got = np.isnan(dequantize_fp4(quantize_fp4(x)))
    want = np.zeros((3, 64), bool)
    want[0, :32] = want[1, 32:] = True
    np.testing.assert_array_equal(got, want)


@pytest.mark.any_version
@pytest.mark.parametrize("largest", [7, 8, 14, 127, 254])
def test_rows_expand_exactly(largest):
    """Every number, in blocks that are up to 2**14 smaller than the largest; zeros of any scale."""
    apart = np.arange(15)
    codes = np.stack([0 * apart + largest, largest - apart, largest - apart // 2, 0 * apart + 254], axis=-1)
    codes = np.maximum(codes, 0).astype(np.uint8)
    block = BYTES.reshape(1, 16)
    zeros = np.full((15, 16), 0x80, np.uint8)
    values = np.concatenate([np.tile(block, (15, 3)), zeros], axis=1)
    q = jnp.asarray(values), scales_of(codes)
    got, scales = jax.jit(fp4.expand)(values, jnp.asarray(codes.view(np.int32)[:, 0]))
    assert got.dtype == E4M3
    whole = np.asarray(got).astype(np.float64) * np.asarray(scales, np.float64)[:, None]
    np.testing.assert_array_equal(whole, meant(q))
    np.testing.assert_array_equal(np.signbit(whole), np.signbit(meant(q)))


@pytest.mark.any_version
def test_smaller_blocks_are_rounded():
    """To multiples of 2**-15 times the largest scale, ties to even: nothing of it is lost elsewhere."""
    apart = np.arange(15, 60)
    codes = np.stack([0 * apart + 127, 127 - apart], axis=-1).astype(np.uint8)
    values = np.tile(BYTES, (len(apart), 2))
    q = values, codes.view(ml_dtypes.float8_e8m0fnu)
    unit = 2.0**-15
    want = np.round(meant(q) / unit) * unit
    padded = np.concatenate([codes, codes * 0 + 99], axis=1).view(np.int32)[:, 0]
    got, scales = fp4.expand(jnp.asarray(values), jnp.asarray(padded))
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64) * np.asarray(scales)[:, None], want)
    assert (want[:, 32:] != meant(q)[:, 32:]).any(axis=1).all()


# Logits ----------------------------------------------------------------------------------------------------


@pytest.mark.any_version
@pytest.mark.parametrize("depth", [32, 64, 128])
@pytest.mark.parametrize("columns", [None, 9])
def test_logits(depth, columns):
    q, kv, weights = random(0, S, H, depth), random(1, N, depth), normal(2, S, H, dtype=jnp.float32)
    window = [jnp.asarray(x) for x in windows(1, S, N)]
    options = {} if columns is None else {"compressed": True, "max_len": columns}
    got = mqa_logits(q, kv, weights, *window, **options)
    want = exact(meant(q), meant(kv), weights, *window, columns)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert calc_diff(got, want) < 1e-11
    numbers = jax.lax.bitcast_convert_type(q.values, jnp.float4_e2m1fn).reshape(S, H, depth)
    for other in (
        (np.asarray(q.values).view(np.int8), words(q)),
        (numbers, q.scales),
        (q.values, words(q)[..., None]),
    ):
        np.testing.assert_array_equal(mqa_logits(other, kv, weights, *window, **options), got)
    given = np.asarray(kv.values).view(np.int8), words(kv)
    np.testing.assert_array_equal(mqa_logits(q, given, weights, *window, **options), got)


def dense(*arrays: jax.Array, out_sharding: Any = None) -> jax.Array:
    logits = logits_op(True, False, True)(*arrays, out_dtype=jnp.float32, out_sharding=out_sharding)[0]
    return jnp.where(jnp.isinf(logits), 0, logits)


def dense_operands(seed: int) -> list[jax.Array]:
    keys = random(seed, N, 64)
    q = normal(seed, S, H, 64).astype(E4M3)
    window = [jnp.asarray(x) for x in windows(seed, S, N)]
    return [q, keys.values, words(keys), normal(seed + 2, S, H, dtype=jnp.float32), *window]


ROWS = P("x"), P(), P(), P("x"), P("x"), P("x")
DENSE = OpCase(
    "fp4",
    dense,
    dense_operands,
    nests=(((0, 0, 0, 0, 0, 0),), ((0, None, None, 0, None, 0),)),
    shards=(
        Shard(ROWS, P("x"), modes=("auto", "explicit", "shard_map")),
        Shard((P(), P("y"), P("y"), P(), P(), P()), P(None, "y")),
    ),
)


@pytest.mark.any_version
def test_one_operand_may_be_fp4():
    x, k, weights = normal(0, S, H, 64), normal(1, N, 64), normal(2, S, H, dtype=jnp.float32)
    window = [jnp.asarray(x) for x in windows(1, S, N)]
    q, kv = quantize(x), quantize(k)
    of_q, of_kv = (np.asarray(one.values).astype(np.float64) * np.asarray(one.scales) for one in (q, kv))
    small_q, small_kv = quantize_fp4(x), quantize_fp4(k)
    got = mqa_logits(q, small_kv, weights, *window)
    assert calc_diff(got, exact(of_q, meant(small_kv), weights, *window)) < 1e-11
    got = mqa_logits(small_q, kv, weights, *window)
    assert calc_diff(got, exact(meant(small_q), of_kv, weights, *window)) < 1e-11
    both = mqa_logits(small_q, small_kv, weights, *window)
    assert calc_diff(both, exact(x, k, weights, *window)) < 0.02


@pytest.mark.any_version
def test_rows_of_very_different_blocks():
    """Far beyond what e4m3 has: the logits are those of the exact numbers but for 0.02, as DeepGEMM asks."""
    q, kv = random(0, S, H, 128, lowest=90), random(1, N, 128, lowest=90)
    weights = normal(2, S, H, dtype=jnp.float32)
    window = jnp.zeros(S, jnp.int32), jnp.full(S, N)
    assert calc_diff(mqa_logits(q, kv, weights, *window), exact(meant(q), meant(kv), weights, *window)) < 1e-6


@pytest.mark.any_version
def test_nan_stays_where_it_is():
    q, kv, weights = random(0, S, H, 128), random(1, N, 128), normal(2, S, H, dtype=jnp.float32)
    window = jnp.full(S, 3), jnp.full(S, N - 2)
    clean = mqa_logits(q, kv, weights, *window)
    nan = jax.lax.bitcast_convert_type(jnp.uint8(255), jnp.float8_e8m0fnu)
    bad = Fp4Array(kv.values, kv.scales.at[:3].set(nan).at[N - 2 :].set(nan))
    np.testing.assert_array_equal(mqa_logits(q, bad, weights, *window), clean)
    got = mqa_logits(Fp4Array(q.values, q.scales.at[2, 1, 3].set(nan)), kv, weights, *window)
    assert np.isnan(got[2, 3 : N - 2]).all()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(clean, 2, 0))
    column = mqa_logits(q, Fp4Array(kv.values, kv.scales.at[7, 0].set(nan)), weights, *window)
    assert np.isnan(column[:, 7]).all()
    np.testing.assert_array_equal(np.delete(column, 7, 1), np.delete(clean, 7, 1))


def test_gradient_of_weights_and_transformations():
    q, kv, weights = random(0, S, H, 64), random(1, N, 64), normal(2, S, H, dtype=jnp.float32)
    window = [jnp.asarray(x) for x in windows(1, S, N)]

    def loss(weights: jax.Array) -> jax.Array:
        logits = mqa_logits(q, kv, weights, *window)
        return jnp.sum(jnp.where(jnp.isinf(logits), 0, logits))

    got = jax.jit(jax.grad(loss))(weights)
    inside = ~np.isneginf(exact(meant(q), meant(kv), weights, *window))
    scores = np.maximum(np.einsum("shd,nd->shn", meant(q), meant(kv)), 0)
    np.testing.assert_allclose(got, np.einsum("shn,sn->sh", scores, inside), rtol=1e-5)
    batch = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (q, kv, weights, *window))
    both = jax.jit(jax.vmap(mqa_logits))(*batch)
    np.testing.assert_array_equal(both[0], mqa_logits(q, kv, weights, *window))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.tree.map(lambda x: jax.device_put(x, P("x")), (q, weights, *window))
        whole = jax.tree.map(lambda x: jax.device_put(x, P()), kv)
        apart = jax.jit(lambda q, *rest: mqa_logits(q, whole, *rest))(*cut)
        assert jax.typeof(apart).sharding.spec == P("x", None)
    np.testing.assert_array_equal(apart, both[0])


# Pages -----------------------------------------------------------------------------------------------------

B, T, PAGE, M, PAGES, D = 4, 2, 16, 3, 10, 64


def draw(seed: int, depth: int = D, page: int = PAGE) -> list[jax.Array]:
    """q, bytes and words of pages, weights, contexts (0 and all of them too), tables in any order."""
    rng = np.random.default_rng(seed)
    lens = np.sort(rng.integers(0, M * page + 1, (B, T)), axis=1)
    lens[0], lens[1] = 0, M * page
    keys = random(seed + 1, PAGES, page, depth)
    return [
        normal(seed, B, T, H, depth).astype(E4M3),
        keys.values,
        words(keys),
        normal(seed + 2, B, T, H, dtype=jnp.float32),
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(np.stack([rng.permutation(PAGES)[:M] for _ in range(B)]), jnp.int32),
    ]


@pytest.mark.any_version
@pytest.mark.parametrize(("depth", "page"), [(32, 16), (64, 64), (128, 32), (128, 128)])
def test_pages(depth, page):
    """Two arrays of each form, and bytes of both shapes."""
    q, values, scales, weights, lens, tables = draw(0, depth, page)
    codes = np.asarray(scales)[..., None].view(np.uint8)[..., : depth // 32]
    cache = Fp4Array(values, scales_of(codes))
    keys = meant(cache)[np.asarray(tables)].reshape(B, -1, depth)
    want = np.stack([exact(q[b], keys[b], weights[b], 0 * lens[b], lens[b]) for b in range(B)])
    got = paged_mqa_logits(q, cache, weights, lens, tables)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert calc_diff(got, want) < 1e-11
    joined = bytes_of(values, scales)
    for other in (
        (values, scales),
        (np.asarray(values).view(np.int8), scales),
        joined.reshape(PAGES, page, depth // 2 + 4),
        joined.reshape(PAGES, page, 1, depth // 2 + 4),
    ):
        np.testing.assert_array_equal(jax.jit(paged_mqa_logits)(q, other, weights, lens, tables), got)
    small = quantize_fp4(q.astype(jnp.float32))
    got = paged_mqa_logits(small, cache, weights, lens, tables)
    want = [exact(meant(small)[b], keys[b], weights[b], 0 * lens[b], lens[b]) for b in range(B)]
    assert calc_diff(got, np.stack(want)) < 1e-11


@pytest.mark.any_version
def test_tokens_of_requests():
    """`indices` says whose a token is; each is scored as if it were its request's only one."""
    q, values, scales, weights, lens, tables = draw(0)
    whose = jnp.array([2, 2, 1, 3])
    given = q[:, :1], (values, scales), weights[:, :1], lens[:, 1]
    want = paged_mqa_logits(*given, tables[whose])
    np.testing.assert_array_equal(paged_mqa_logits(*given, tables, indices=whose), want)


@pytest.mark.any_version
def test_what_no_context_reaches_counts_for_nothing():
    q, values, scales, weights, _, tables = draw(0)
    lens = jnp.array([0, 5, PAGE, 2 * PAGE + 1])
    clean = paged_mqa_logits(q, (values, scales), weights, lens, tables)
    used = {int(page) for row, most in zip(tables, -(-lens // PAGE), strict=True) for page in row[:most]}
    unused = jnp.asarray([page not in used for page in range(PAGES)])
    bad = jnp.where(unused[:, None], -1, scales).at[tables[1, 0], 5:].set(-1)
    beyond = jnp.where(jnp.arange(M)[None] < -(-lens // PAGE)[:, None], tables, 2**31 - 1)
    np.testing.assert_array_equal(paged_mqa_logits(q, (values, bad), weights, lens, beyond), clean)
    lost = paged_mqa_logits(q, (values, scales), weights, jnp.full(B, M * PAGE), tables.at[1, 1].set(PAGES))
    assert not np.any(lost[1, :, PAGE : 2 * PAGE])


@pytest.mark.any_version
def test_choosing_takes_fp4():
    """The choice among keys in FP4 is that among their logits."""
    q, kv, weights = random(0, S, H, 64), random(1, N, 64), normal(2, S, H, dtype=jnp.float32)
    start, end = (jnp.asarray(x) for x in windows(1, S, N))
    want = topk(mqa_logits(q, kv, weights, start, end), 7, start=start, end=end)
    np.testing.assert_array_equal(indexer_topk(q, kv, weights, start, end, 7), want)
    q, values, scales, weights, lens, tables = draw(0)
    logits = paged_mqa_logits(q, (values, scales), weights, lens, tables)
    want = topk(logits.reshape(B * T, -1), 7, end=lens.reshape(-1)).reshape(B, T, 7)
    got = paged_indexer_topk(q, Fp4Array(values, scales), weights, lens, tables, 7)
    np.testing.assert_array_equal(got, want)


def call(
    q: Any, values: Any, scales: Any, weights: Any, lens: Any, tables: Any, out_sharding: Any = None
) -> Any:
    options = {"columns": M * PAGE, "out_dtype": jnp.float32, "out_sharding": out_sharding}
    logits = paged_op(False, True)(q, values, scales, weights, 0 * lens, lens, tables, **options)[0]
    return jnp.where(jnp.isinf(logits), 0, logits)


CASE = OpCase(
    "paged fp4",
    call,
    draw,
    nests=(((0, 0, 0, 0, 0, 0),), ((0, None, None, 0, 0, None),)),
    shards=(
        Shard((P("x"), P(), P(), P("x"), P("x"), P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
        Shard((P(None, None, "y"), P(), P(), P(None, None, "y"), P(), P()), P(), ("all-reduce",)),
    ),
)


@pytest.mark.parametrize("check", op_checks.checks([DENSE, CASE]))
def test_op(check):
    check()


# Errors ----------------------------------------------------------------------------------------------------

Q, KV, W, WINDOW = random(0, S, H, 64), random(1, N, 64), jnp.ones((S, H)), (np.zeros(S, int), np.full(S, N))
REST = jnp.ones((B, T, H)), np.full(B, 20), np.zeros((B, 3), int)
QUERIES = random(3, B, T, H, 64)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (TypeError, "quantize_fp4: x is int32", lambda: quantize_fp4(jnp.ones(32, jnp.int32))),
        (ValueError, "d a multiple of 32: pad", lambda: quantize_fp4(jnp.ones((2, 48)))),
        (TypeError, "q is a tuple, need an Fp4Array", lambda: dequantize_fp4((KV.scales, KV.values))),
        (
            TypeError,
            "scales of kv are float32 .40, 2., need float8_e8m0fnu .40, 2., or int32 .40.*quantize_fp4",
            lambda: mqa_logits(Q, (KV.values, jnp.ones((N, 2))), W, *WINDOW),
        ),
        (
            ValueError,
            "scales of kv are float8_e8m0fnu .39, 2.",
            lambda: mqa_logits(Q, (KV.values, KV.scales[1:]), W, *WINDOW),
        ),
        (ValueError, "scales of q are int32", lambda: mqa_logits((Q.values, words(Q)[1:]), KV, W, *WINDOW)),
        (
            ValueError,
            "d is 256, need one of 32, 64, 128",
            lambda: mqa_logits(Q, random(0, N, 256), W, *WINDOW),
        ),
        (
            ValueError,
            "values of q are uint8 .1, 8, 4, 32., need .s, h, d / 2..*vmap",
            lambda: mqa_logits(Fp4Array(Q.values[None], Q.scales[None]), KV, W, *WINDOW),
        ),
        (ValueError, "d differs .64 and 32", lambda: mqa_logits(Q, random(0, N, 32), W, *WINDOW)),
        (
            ValueError,
            "FP4 values of d = 128, and q's d is 64",
            lambda: paged_mqa_logits(QUERIES, random(0, PAGES, PAGE, 128), *REST),
        ),
        (
            ValueError,
            "page of kv_cache has 8 keys",
            lambda: paged_mqa_logits(QUERIES, random(0, PAGES, 8, 64), *REST),
        ),
        (
            ValueError,
            "of FP4 keys, .pages, page, d / 2 . 4., 36",
            lambda: paged_mqa_logits(QUERIES, jnp.zeros((PAGES, PAGE, 35), jnp.uint8), *REST),
        ),
    ],
)
def test_errors(error, message, run):
    with pytest.raises(error, match=message):
        run()
