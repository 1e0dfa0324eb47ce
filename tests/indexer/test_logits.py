"""Logits of an indexer: against float64, under every transformation, gradients, and errors with a way out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks
from jax_deepgemm.indexer import bf16_mqa_logits, mqa_logits
from jax_deepgemm.ops.indexer.op import gradients_op, logits_op
from jax_deepgemm.ops.quantize import QuantizedArray, dequantize, quantize
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.logits_oracle import calc_diff, exact, windows
from tests.shared.op_checks import OpCase, Shard

S, N, H, D = 8, 16, 4, 32
E4M3 = jnp.float8_e4m3fn


def operands(seed: int, s: int = S, n: int = N, h: int = H, d: int = D) -> list[jax.Array]:
    """q, kv, weights."""
    return [
        normal(seed, s, h, d),
        normal(seed + 1, n, d),
        normal(seed + 2, s, h, dtype=jnp.float32),
    ]


def bounds(seed: int, s: int = S, n: int = N) -> list[jax.Array]:
    return [jnp.asarray(x) for x in windows(seed, s, n)]


# Values ----------------------------------------------------------------------------------------------------

SHAPES = [(5, 7, 1, 32), (8, 16, 4, 32), (3, 33, 6, 64), (9, 1, 64, 128), (1, 40, 128, 128), (4, 0, 3, 32)]


@pytest.mark.any_version
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("columns", [None, 5, 64])
def test_bf16_logits(shape, columns):
    q, kv, weights = operands(0, *shape)
    window = bounds(1, *shape[:2])
    got = jax.jit(form(bf16_mqa_logits, columns))(q, kv, weights, *window)
    want = exact(q, kv, weights, *window, columns)
    assert calc_diff(got, want) < 1e-12
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))


@pytest.mark.any_version
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales_of_q", [False, True])
def test_quantised_logits(shape, scales_of_q):
    q, kv, weights = operands(0, *shape)
    window = bounds(1, *shape[:2])
    queries, keys = quantize(q), quantize(kv)
    got = mqa_logits(queries if scales_of_q else queries.values, keys, weights, *window)
    meant = dequantize(queries) if scales_of_q else queries.values
    want = exact(meant, dequantize(keys), weights, *window)
    assert calc_diff(got, want) < 1e-11
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    if scales_of_q:
        for q_given in (q, (queries.values, queries.scales[..., 0])):
            kv_given = kv if q_given is q else (keys.values, keys.scales[:, 0])
            np.testing.assert_array_equal(mqa_logits(q_given, kv_given, weights, *window), got)


def form(function: Any, columns: int | None, **options: Any) -> Any:
    given = {} if columns is None else {"compressed": True, "max_len": columns}
    return functools.partial(function, **given, **options)


@pytest.mark.any_version
@pytest.mark.parametrize("columns", [None, 9])
def test_windows_at_every_edge(columns):
    """Outside of [0, n] they are clipped, and none that ends before it begins has a key."""
    q, kv, weights = operands(0, 36)
    start, end = (jnp.asarray(x.reshape(-1), jnp.int32) for x in np.mgrid[-1:5, 11:17])
    for shift in (0, 12, -12):
        got = form(bf16_mqa_logits, columns)(q, kv, weights, start + shift, end - shift)
        want = exact(q, kv, weights, start + shift, end - shift, columns)
        assert calc_diff(got, want) < 1e-12
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    far = jnp.full(36, 2**31 - 1, jnp.int32)
    assert np.isneginf(form(bf16_mqa_logits, columns)(q, kv, weights, far, far)).all()
    whole = form(bf16_mqa_logits, columns)(q, kv, weights, -far - 1, far)
    np.testing.assert_array_equal(whole, form(bf16_mqa_logits, columns)(q, kv, weights, 0 * far, 0 * far + N))


@pytest.mark.any_version
def test_bfloat16_logits_are_rounded_once():
    q, kv, weights = operands(0)
    call = functools.partial(mqa_logits, quantize(q), quantize(kv), weights, *bounds(1))
    np.testing.assert_array_equal(call(out_dtype=jnp.bfloat16), call().astype(jnp.bfloat16))


@pytest.mark.any_version
def test_nan_stays_where_it_is():
    q, kv, weights = operands(0)
    start, end = jnp.full(S, 3), jnp.full(S, N - 2)
    clean = bf16_mqa_logits(q, kv, weights, start, end)
    poisoned = kv.at[:3].set(jnp.nan).at[N - 2 :].set(jnp.nan)
    np.testing.assert_array_equal(bf16_mqa_logits(q, poisoned, weights, start, end), clean)
    got = bf16_mqa_logits(q.at[2, 1, 5].set(jnp.nan), kv, weights, start, end)
    assert np.isnan(got[2, 3 : N - 2]).all()
    assert np.isneginf(got[2, :3]).all()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(clean, 2, 0))


# The op, under every transformation ------------------------------------------------------------------------


def finite(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isinf(logits), 0, logits)


def scaled(*arrays: jax.Array, columns: int | None = None, out_sharding: Any = None) -> jax.Array:
    given = {} if columns is None else {"columns": columns}
    op = logits_op(True, columns is not None)
    return finite(op(*arrays, out_dtype=jnp.float32, out_sharding=out_sharding, **given)[0])


def plain(*arrays: jax.Array, columns: int | None = None, out_sharding: Any = None) -> jax.Array:
    return finite(form(bf16_mqa_logits, columns, out_sharding=out_sharding)(*arrays))


def scaled_operands(seed: int) -> list[jax.Array]:
    q, kv, weights = operands(10 * seed)
    scales = jnp.abs(normal(seed + 3, N, dtype=jnp.float32))
    return [q.astype(E4M3), kv.astype(E4M3), scales, weights, *bounds(seed)]


def in_jnp(q: Any, kv: Any, weights: Any, start: Any, end: Any, *, columns: int | None = None) -> jax.Array:
    x = jnp.einsum("shd,nd->shn", q.astype(jnp.float32), kv.astype(jnp.float32), precision="highest")
    scores = jnp.einsum("shn,sh->sn", jax.nn.relu(x), weights, precision="highest")
    key = jnp.arange(kv.shape[0])[None] if columns is None else start[:, None] + jnp.arange(columns)[None]
    key = jnp.broadcast_to(key, (q.shape[0], key.shape[1]))
    inside = (key >= start[:, None]) & (key < end[:, None])
    at = jnp.clip(key, 0, kv.shape[0] - 1)
    return jnp.where(inside, jnp.take_along_axis(scores, at, axis=1), 0)


ROWS = P("x"), P(), P(), P("x"), P("x"), P("x")
COLUMNS = P(), P("y"), P("y"), P(), P(), P()
HEADS = P(None, "y"), P(), P(), P(None, "y"), P(), P()
BOTH = P("x"), P("y"), P("y"), P("x"), P("x"), P("x")
NESTS = (
    ((0, 0, 0, 0, 0, 0),),
    ((0, None, None, None, None, None),),
    ((None, 0, 0, None, 0, None), (0, None, None, 0, None, None)),
)


def without_scales(specs: tuple[Any, ...]) -> tuple[Any, ...]:
    return specs[:2] + specs[3:]


SCALED = OpCase(
    "scaled",
    scaled,
    scaled_operands,
    nests=NESTS,
    shards=(
        Shard(ROWS, P("x"), modes=("auto", "explicit", "shard_map")),
        Shard(COLUMNS, P(None, "y")),
        Shard(BOTH, P("x", "y")),
        Shard(HEADS, P(), ("all-reduce",)),
        Shard(HEADS, P("y"), ("reduce-scatter",)),
        Shard((P(None, None, "x"), *COLUMNS[1:]), P(None, "y"), ("all-gather",)),
    ),
)
COMPRESSED = OpCase(
    "compressed",
    functools.partial(scaled, columns=12),
    scaled_operands,
    nests=NESTS[:1],
    shards=(
        Shard(ROWS, P("x"), modes=("auto", "explicit", "shard_map")),
        Shard(HEADS, P(), ("all-reduce",)),
        Shard((P(),) * 6, P("x", "y"), modes=("auto",)),
    ),
)
PLAIN = OpCase(
    "plain",
    plain,
    lambda seed: [*operands(10 * seed), *bounds(seed)],
    nests=(((0, None, 0, None, None),),),
    shards=(
        Shard(without_scales(ROWS), P("x"), modes=("auto", "explicit", "shard_map")),
        Shard(without_scales(BOTH), P("x", "y")),
        Shard(without_scales(HEADS), P(), ("all-reduce",)),
    ),
    plain=in_jnp,
    wrt=(0, 1, 2),
    grad_tolerance=2e-2,
)


@pytest.mark.parametrize("check", op_checks.checks([SCALED, COMPRESSED, PLAIN]))
def test_op(check):
    check()


# Gradients -------------------------------------------------------------------------------------------------


@pytest.mark.any_version
@pytest.mark.parametrize("columns", [None, 11])
def test_gradients_are_exact_in_float32(columns):
    given = [x.astype(jnp.float32) for x in operands(0)]
    window, by = bounds(1), normal(5, S, columns or N, dtype=jnp.float32)
    options = {} if columns is None else {"columns": columns}
    want = jax.vjp(lambda *x: in_jnp(*x, *window, columns=columns), *given)[1](by)
    got = gradients_op(columns is not None)(*given, *window, by, **options)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_gradients_go_straight_through_the_quantisation():
    q, kv, weights = operands(0)
    window, by = bounds(1), normal(5, S, N, dtype=jnp.float32)
    logits, pull = jax.vjp(lambda *x: finite(mqa_logits(*x, *window)), q, kv, weights)
    meant = [dequantize(quantize(x)) for x in (q, kv)]
    want, pull_meant = jax.vjp(lambda *x: in_jnp(*x, *window), *meant, weights)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-4)
    for one, other, x in zip(pull(by), pull_meant(by), (q, kv, weights), strict=True):
        assert one.dtype == x.dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=2e-2 * float(jnp.abs(other).max()))
    [of_weights] = jax.vjp(lambda w: finite(mqa_logits(quantize(q), quantize(kv), w, *window)), weights)[1](
        by
    )
    np.testing.assert_allclose(of_weights, pull_meant(by)[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [mqa_logits, bf16_mqa_logits])
def test_second_derivatives_say_what_to_write(function):
    q, kv, weights = operands(0)

    def loss(weights: jax.Array) -> jax.Array:
        return jnp.sum(finite(function(q, kv, weights, *bounds(1))) ** 2)

    rule = "gradients of logits are of first order.*use jnp: jnp.einsum"
    with pytest.raises(TypeError, match=rule):
        jax.jvp(loss, (weights,), (weights,))
    with pytest.raises(TypeError, match=rule):
        jax.jvp(jax.grad(loss), (weights,), (weights,))


# Programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mqa_logits, bf16_mqa_logits])
def test_export(function):
    given = [*operands(0), *bounds(1)]
    exported = export.export(jax.jit(function), platforms=["cpu", "cuda"], disabled_checks=export_checks)
    program = export.deserialize(exported(*given).serialize())
    assert "jax_deepgemm_launch" in program.mlir_module()
    np.testing.assert_array_equal(program.call(*given), jax.jit(function)(*given))


@pytest.mark.any_version
@pytest.mark.parametrize("batched", ["nothing", "all", "tokens", "keys"])
def test_each_is_one_launch(batched):
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    lead = {"nothing": "", "all": "qkw", "tokens": "qw", "keys": "k"}[batched]

    def array(name: str, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((3, *shape) if name in lead else shape, dtype)

    q, weights = array("q", 5, H, D, dtype=E4M3), array("w", 5, H)
    keys = QuantizedArray(array("k", 40, D, dtype=E4M3), array("k", 40, 1), (1, 128))
    bound = array("-", 5, dtype=jnp.int32)
    axes = tuple(0 if name in lead else None for name in "qkw--")
    function = jax.vmap(mqa_logits, axes) if lead else mqa_logits
    text = (
        jax.jit(function).trace(q, keys, weights, bound, bound).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert text.count("@jax_deepgemm_launch(") == 1


# Errors ----------------------------------------------------------------------------------------------------

Q, KV, W = operands(0)
QUANTIZED = quantize(Q).values, quantize(KV), W
FULL = np.zeros(S, np.int32), np.full(S, N, np.int32)


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            "q is float32.*quantize",
            lambda: mqa_logits(Q.astype(jnp.float32), quantize(KV), W, *FULL),
        ),
        (TypeError, "kv is bfloat16 .*need a QuantizedArray", lambda: mqa_logits(QUANTIZED[0], KV, W, *FULL)),
        (TypeError, "q is float8.*need bfloat16", lambda: bf16_mqa_logits(QUANTIZED[0], KV, W, *FULL)),
        (
            TypeError,
            "weights is bfloat16.*astype",
            lambda: bf16_mqa_logits(Q, KV, W.astype(jnp.bfloat16), *FULL),
        ),
        (ValueError, "q is .*need .s, h, d..*vmap", lambda: bf16_mqa_logits(Q[None], KV, W, *FULL)),
        (ValueError, "d differs .32 and 16", lambda: bf16_mqa_logits(Q, KV[:, :16], W, *FULL)),
        (
            ValueError,
            "d is 16, need one of 32, 64, 128",
            lambda: bf16_mqa_logits(Q[..., :16], KV[:, :16], W, *FULL),
        ),
        (ValueError, "weights are .8, 3.", lambda: bf16_mqa_logits(Q, KV, W[:, :3], *FULL)),
        (
            ValueError,
            "129 heads",
            lambda: bf16_mqa_logits(jnp.zeros((1, 129, 32), jnp.bfloat16), KV, jnp.zeros((1, 129)), [0], [1]),
        ),
        (
            ValueError,
            r"scales of kv are \[15\]",
            lambda: mqa_logits(QUANTIZED[0], (KV.astype(E4M3), W[:15, 0].repeat(2)[:15]), W, *FULL),
        ),
        (
            ValueError,
            "block .128, 128.",
            lambda: mqa_logits(QUANTIZED[0], quantize(KV, (128, 128)), W, *FULL),
        ),
        (
            TypeError,
            "k_start is float32",
            lambda: bf16_mqa_logits(Q, KV, W, FULL[0].astype(np.float32), FULL[1]),
        ),
        (ValueError, "k_end is int32 .7.", lambda: bf16_mqa_logits(Q, KV, W, FULL[0], FULL[1][:7])),
        (ValueError, "token 0 is .0, 17.", lambda: bf16_mqa_logits(Q, KV, W, FULL[0], FULL[1] + 1)),
        (ValueError, "token 0 is .-1, 16.", lambda: bf16_mqa_logits(Q, KV, W, FULL[0] - 1, FULL[1])),
        (ValueError, "token 0 is .16, 0.", lambda: bf16_mqa_logits(Q, KV, W, FULL[1], FULL[0])),
        (TypeError, "out_dtype is float16", lambda: bf16_mqa_logits(Q, KV, W, *FULL, out_dtype=jnp.float16)),
        (
            ValueError,
            "max_len is 4 and compressed is False",
            lambda: bf16_mqa_logits(Q, KV, W, *FULL, max_len=4),
        ),
        (ValueError, "max_len is 0", lambda: bf16_mqa_logits(Q, KV, W, *FULL, compressed=True, max_len=0)),
        (TypeError, "config is 3, need an IndexerConfig", lambda: bf16_mqa_logits(Q, KV, W, *FULL, config=3)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
