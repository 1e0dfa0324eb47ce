"""Weights of a byte with a scale a channel: quantised, multiplied, refused; and their kernels' text."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.mixed.problem import E4M3, FP4, INT8, MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import MixedConfig
from jax_deepgemm.ops.mixed.sm90.cost import fitted
from jax_deepgemm.ops.mixed.sm90.source import mixed_source
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

M, N, K, G = 12, 32, 64, 4
SIZES = jnp.array([3, 0, 5, 2], jnp.int32)
X, W = normal(0, M, K), jdg.quantize_per_channel(normal(1, G, K, N))
SHORT = W._replace(scales=W.scales[:2])
F32 = jnp.float32


def oracle(x: Any, w: jdg.PerChannelArray, sizes: Any) -> np.ndarray:
    matrices = np.asarray(w.values.astype(F32), np.float64) * np.asarray(w.scales, np.float64)[:, None]
    owner = np.repeat(np.arange(len(sizes) + 1), [*np.asarray(sizes), len(x) - int(np.sum(sizes))])
    matrices = np.concatenate([matrices, np.zeros_like(matrices[:1])])
    return np.stack([row @ matrices[g] for row, g in zip(np.asarray(x, np.float64), owner, strict=True)])


@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_products(kind: Any) -> None:
    w = jdg.quantize_per_channel(normal(1, G, K, N), kind)
    got = jdg.ragged_dot(X, w, SIZES, preferred_element_type=F32)
    np.testing.assert_allclose(got, oracle(X, w, SIZES), rtol=1e-5, atol=1e-5)
    layer = jdg.grouped_linear(X, w, SIZES, recipe="bf16", weight_layout="kn", out_dtype=F32)
    np.testing.assert_array_equal(layer, got)
    half = jdg.PerChannelArray(w.values, w.scales.astype(jnp.bfloat16))
    np.testing.assert_allclose(
        jdg.ragged_dot(X, half, SIZES, preferred_element_type=F32),
        oracle(X, half, SIZES),
        rtol=1e-5,
        atol=1e-5,
    )
    some = jdg.ragged_dot(X, jdg.PerChannelArray(*(one[1:] for one in w)), SIZES, group_offset=1)
    np.testing.assert_array_equal(some[:3], np.zeros((3, N)))


@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_numbers_are_near(kind: Any) -> None:
    x = normal(3, 2, 50, 7).astype(F32)
    w = jdg.quantize_per_channel(x, kind)
    assert w.shape == (2, 50, 7)
    amax = np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(jdg.dequantize_per_channel(w)) - np.asarray(x)) / amax
    assert error.max() <= (0.501 / 127 if kind == jnp.int8 else 0.036)
    assert not np.any(np.asarray(jdg.quantize_per_channel(jnp.zeros((4, 2))).values))


def test_of_qwix() -> None:
    qwix = pytest.importorskip("qwix")
    array = qwix.quantize(normal(1, G, K, N).astype(F32), jnp.int8, channelwise_axes=[0, 2])
    w = jdg.PerChannelArray(array.qvalue, array.scale[:, 0])
    np.testing.assert_array_equal(jdg.ragged_dot(X, array, SIZES), jdg.ragged_dot(X, w, SIZES))


def product(
    x: jax.Array, values: jax.Array, scales: jax.Array, sizes: jax.Array, **options: Any
) -> jax.Array:
    w = jdg.PerChannelArray(values, scales)
    return jdg.ragged_dot(x, w, sizes, preferred_element_type=F32, **options)


def operands(seed: int) -> list[jax.Array]:
    w = jdg.quantize_per_channel(normal(seed + 1, G, K, N))
    return [normal(seed, M, K), w.values, w.scales, jnp.roll(SIZES, seed)]


CASES = [
    OpCase(
        "per channel",
        product,
        operands,
        nests=(((0, None, None, 0),), ((None, 0, 0, None),)),
        shards=(
            Shard((P("x"), P(None, None, "y"), P(None, "y"), P()), P("x", "y")),
            Shard((P("x"), P("y"), P("y"), P()), P("x"), ("all-reduce",)),
            Shard((P(None, "y"), P(None, "y"), P(), P()), P(), ("all-reduce",)),
        ),
    )
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Any) -> None:
    check()


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "lhs.astype(jnp.bfloat16)", lambda: jdg.ragged_dot(X.astype(F32), W, SIZES)),
        (ValueError, "quantize_per_channel(w.mT)", lambda: jdg.ragged_dot(X, W, SIZES, rhs_layout="gnk")),
        (ValueError, "of equal k", lambda: jdg.ragged_dot(X[:, :56], W, SIZES)),
        (ValueError, "k a multiple of 8", lambda: jdg.ragged_dot(X[:, :60], cut_k(60), SIZES)),
        (ValueError, "recipe='bf16'", lambda: jdg.grouped_linear(X, W, SIZES)),
        (TypeError, "quantize_per_channel(rhs)", lambda: jdg.ragged_dot(X, W._replace(scales=SIZES), SIZES)),
        (
            ValueError,
            "one for each column",
            lambda: jdg.ragged_dot(X, W._replace(scales=W.scales[:2]), SIZES),
        ),
        (ValueError, "int8 or float8_e4m3fn", lambda: jdg.quantize_per_channel(X, jnp.int4)),
        (TypeError, "[.., k, n]", lambda: jdg.quantize_per_channel(SIZES)),
        (NotImplementedError, "dequantize_per_channel", lambda: jax.grad(loss)(X)),
    ],
)
def test_errors(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def cut_k(k: int) -> jdg.PerChannelArray:
    return jdg.PerChannelArray(W.values[:, :k], W.scales)


def loss(x: jax.Array) -> jax.Array:
    return jdg.ragged_dot(x, W, SIZES).astype(F32).sum()


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("kind", "cut"),
    [(FP4, (32, 4, 1)), (FP4, (256, 2, 1, 1, 1, True)), (INT8, (32, 2, 1, 1, 2)), (E4M3, (96, 2, 1))],
    ids=str,
)
def test_ptxas_is_content(kind: str, cut: tuple[int, ...]) -> None:
    problem = MixedProblem(
        640, 4096, 2048, weights_in=kind, grouping="rows", groups=32, expected=20, segments=32
    )
    tokens, across, deep, *more = cut
    config = fitted(problem, MixedConfig(tokens, across, deep, 0, *more), H200)
    assert config is not None
    report = compile_kernel(mixed_source(problem, config), arch="90a").report
    assert report is not None
    assert (report.spill_store_bytes, report.stack_bytes) == (0, 0)
    assert "C75" not in report.log
