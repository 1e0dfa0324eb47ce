"""Hyper-connections against float64, written from the formulas; gradients against finite differences of that;
transformations; errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import hyperconnection as hc
from tests.shared import op_checks

TOKENS, N, D = 6, 4, 40
COLUMNS = N * (N + 2)


# The formulas, token by token, in float64 -------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def oracle_sinkhorn(logits: np.ndarray, iterations: int = 20, eps: float = 1e-6) -> np.ndarray:
    m = np.exp(logits)
    for i in range(iterations):
        rows = m.sum(axis=1) + (eps if i else 0)
        m = m / rows[:, None] + (0 if i else eps)
        m = m / (m.sum(axis=0) + eps)[None, :]
    return m


def oracle_normed(streams: np.ndarray, weight: np.ndarray, norm_eps: float = 1e-6) -> np.ndarray:
    z = streams.reshape(-1)
    return weight @ (z / np.sqrt(np.mean(z * z) + norm_eps))


def oracle_pre(streams: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Any:
    xs, qs, ms = [], [], []
    for token in streams:
        h = oracle_normed(token, weight)
        p = [sigmoid(scale[0] * h[i] + bias[i]) + 1e-6 for i in range(N)]
        xs.append(sum(p[i] * token[i] for i in range(N)))
        qs.append([2 * sigmoid(scale[1] * h[N + i] + bias[N + i]) for i in range(N)])
        ms.append(oracle_sinkhorn((scale[2] * h[2 * N :] + bias[2 * N :]).reshape(N, N)))
    return np.stack(xs), np.array(qs), np.stack(ms)


def oracle_post(y: np.ndarray, streams: np.ndarray, q: np.ndarray, m: np.ndarray) -> np.ndarray:
    out = np.zeros_like(streams)
    for t in range(len(streams)):
        for j in range(N):
            out[t, j] = q[t, j] * y[t] + sum(m[t, i, j] * streams[t, i] for i in range(N))
    return out


def oracle_step(streams: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x, q, m = oracle_pre(streams, weight, scale, bias)
    return oracle_post(np.tanh(x), streams, q, m)


def step(streams: jax.Array, *parameters: jax.Array) -> jax.Array:
    x, q, m = hc.pre(streams, *parameters)
    return hc.post(jnp.tanh(x), streams, q, m)


def operands(seed: int = 0, tokens: int = TOKENS) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.standard_normal((tokens, N, D)), jnp.bfloat16),
        jnp.asarray(rng.standard_normal((COLUMNS, N * D)) / 8, jnp.float32),
        jnp.asarray([0.3, 0.5, 0.7], jnp.float32),
        jnp.asarray(rng.standard_normal(COLUMNS), jnp.float32),
    ]


def wide(arrays: list[jax.Array]) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float64) for x in arrays]


# Values -----------------------------------------------------------------------------------------------------


def test_pre_is_the_formula() -> None:
    given = operands()
    x, q, m = jax.jit(hc.pre)(*given)
    want_x, want_q, want_m = oracle_pre(*wide(given))
    assert (x.dtype, q.dtype, m.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(np.asarray(x, np.float64), want_x, rtol=2.0**-8, atol=1e-5)
    np.testing.assert_allclose(q, want_q, rtol=1e-5)
    np.testing.assert_allclose(m, want_m, rtol=1e-4, atol=1e-6)
    own, (streams, weight, _, bias) = hc.coefficients(*given)[0], wide(given)
    want = [sigmoid(0.3 * oracle_normed(token, weight)[:N] + bias[:N]) + 1e-6 for token in streams]
    np.testing.assert_allclose(own, want, rtol=1e-5)


def test_post_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    shapes = ((TOKENS, D), (TOKENS, N, D), (TOKENS, N), (TOKENS, N, N))
    given = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    np.testing.assert_allclose(hc.post(*given), oracle_post(*wide(given)), rtol=1e-5, atol=1e-5)
    rounded = hc.post(given[0], given[1].astype(jnp.bfloat16), *given[2:])
    assert rounded.dtype == jnp.bfloat16


def test_a_step_and_the_head() -> None:
    given = operands(2)
    np.testing.assert_allclose(
        np.asarray(step(*given), np.float64), oracle_step(*wide(given)), rtol=2.0**-7, atol=2.0**-7
    )
    streams, weight, _, bias = given
    got = hc.head(streams, weight[:N], jnp.array([0.3]), bias[:N])
    for token, x in zip(wide([streams])[0], np.asarray(got, np.float64), strict=True):
        p = sigmoid(0.3 * oracle_normed(token, wide([weight])[0][:N]) + wide([bias])[0][:N]) + 1e-6
        np.testing.assert_allclose(x, p @ token, rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_sinkhorn_is_the_formula(iterations: int, eps: float) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 3, 3)) * 4
    got = hc.sinkhorn(jnp.asarray(logits, jnp.float32), iterations=iterations, eps=eps)
    for one, m in zip(logits, got, strict=True):
        np.testing.assert_allclose(m, oracle_sinkhorn(one, iterations, eps), rtol=1e-4, atol=1e-7)
        if iterations == 20 and eps < 1e-3:
            np.testing.assert_allclose(m.sum(axis=0), 1, atol=1e-4)


def test_sinkhorn_of_large_logits_is_finite() -> None:
    m = hc.sinkhorn(jnp.array([[0.0, 300.0], [300.0, -300.0]]))
    np.testing.assert_allclose(m, [[0, 1], [1, 0]], atol=1e-4)


def test_expand_copies() -> None:
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(hc.expand(x, 4), np.stack([x] * 4, axis=1))


# Gradients --------------------------------------------------------------------------------------------------


def difference(function: Callable[..., Any], at: list[np.ndarray], along: list[np.ndarray]) -> float:
    """The derivative of a sum of sines, by central differences in float64."""
    size = 1e-5

    def value(sign: float) -> float:
        moved = [x + sign * size * v for x, v in zip(at, along, strict=True)]
        return sum(np.sin(one).sum() for one in jax.tree.leaves(function(*moved)))

    return (value(1) - value(-1)) / (2 * size)


@pytest.mark.parametrize("which", range(4))
def test_gradients_of_a_step(which: int) -> None:
    given = operands(3)
    along = [np.zeros(x.shape) for x in given]
    along[which] = np.random.default_rng(4).standard_normal(given[which].shape)
    want = difference(oracle_step, wide(given), along)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(step(*a).astype(jnp.float32))), which))(*given)
    assert gradient.dtype == given[which].dtype
    got = float(np.sum(np.asarray(gradient, np.float64) * along[which]))
    scale = float(np.linalg.norm(np.asarray(gradient, np.float64)) * np.linalg.norm(along[which]))
    assert abs(got - want) < 2e-3 * scale  # streams are bfloat16


def test_gradients_of_sinkhorn() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 4, 4))
    along = np.random.default_rng(1).standard_normal((2, 4, 4))
    want = difference(lambda x: np.stack([oracle_sinkhorn(one) for one in x]), [logits], [along])
    x, v = jnp.asarray(logits, jnp.float32), jnp.asarray(along, jnp.float32)
    loss = lambda x: jnp.sum(jnp.sin(hc.sinkhorn(x)))  # noqa: E731
    np.testing.assert_allclose(jnp.sum(jax.grad(loss)(x) * v), want, rtol=1e-3)
    np.testing.assert_allclose(jax.jvp(loss, (x,), (v,))[1], want, rtol=1e-3)


# Transformations --------------------------------------------------------------------------------------------


def test_leading_dimensions_and_vmap() -> None:
    streams, *parameters = operands(tokens=6)
    stacked = streams.reshape(2, 3, N, D)
    want = jax.tree.leaves(hc.pre(streams, *parameters))
    several = jax.tree.leaves(hc.pre(stacked, *parameters))
    mapped = jax.tree.leaves(jax.vmap(lambda s: hc.pre(s, *parameters))(stacked))
    for one, two, three in zip(want, several, mapped, strict=True):
        np.testing.assert_allclose(two.reshape(one.shape), one, rtol=1e-5)
        np.testing.assert_allclose(three.reshape(one.shape), one, rtol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_tokens_are_cut_without_an_exchange(mode: str) -> None:
    mesh = op_checks.make_mesh(mode)
    streams, *parameters = operands(tokens=8)
    placed = jax.device_put(streams, jax.sharding.NamedSharding(mesh, P("x")))
    whole = jax.device_put(parameters, jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(placed, *whole).compile()
    assert not op_checks.collectives(compiled.as_text())
    got = compiled(placed, *whole)
    assert got.sharding.spec[0] == "x"
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(step(streams, *parameters), np.float32), rtol=0.02, atol=0.02
    )


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda s, w, a, b: hc.pre(s.astype(jnp.float32), w, a, b),
            TypeError,
            "streams are float32, need bf",
        ),
        (lambda s, w, a, b: hc.pre(s[0], w, a, b), ValueError, r"streams\[None\] for one token"),
        (lambda s, w, a, b: hc.pre(s, w[:-1], a, b), ValueError, r"weight is \[23, 160\], need \[24, 160\]"),
        (lambda s, w, a, b: hc.pre(s, w, a[:2], b), ValueError, r"scale is \[2\], need \[3\] for 4 streams"),
        (
            lambda s, w, a, b: hc.pre(s, w, a, b.astype(jnp.bfloat16)),
            TypeError,
            "bias is bfloat16, need float",
        ),
        (lambda s, w, a, b: hc.head(s, w, a[:1], b), ValueError, r"weight is \[24, 160\], need \[4, 160\]"),
        (lambda s, w, a, b: hc.post(s[:, 0], s, b, w), ValueError, r"post_weights is \[24\] and streams are"),
        (lambda s, w, a, b: hc.sinkhorn(w), ValueError, r"logits are \[24, 160\], need square matrices"),
        (
            lambda s, w, a, b: hc.sinkhorn(w[:, :24], iterations=0),
            ValueError,
            "iterations is 0, need a whole",
        ),
        (lambda s, w, a, b: hc.expand(s, True), ValueError, "n is True, need a whole number"),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        functools.partial(call)(*operands())
