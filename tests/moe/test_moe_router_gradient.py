"""The router's weights and their derivatives where scores vanish: against float64, and finite."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.moe import DEEPSEEK_V3, moe_mlp, route
from tests.shared.moe_oracle import normal, wide

F32 = jnp.float32
EXPERTS, TOP_K = 8, 3
LEVELS = (100.0, 10.0, 0.0, -20.0, -42.0, -46.0, -50.0, -60.0, -95.0, -1e4, -1e9)
OFFSETS = np.array([0.0, 1.5, -0.5, 0.25, 2.0, -3.0, 1.0, -1.0])
GROUPS = {"num_groups": 4, "top_groups": 2}


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def in_float64(z: np.ndarray, ids: np.ndarray, by: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """scale * s / (sum of the chosen s + 1e-20), s = sigmoid(z), and its gradient by z."""
    s, slope = sigmoid(z)[ids], (sigmoid(z) * sigmoid(-z))[ids]
    total = s.sum() + 1e-20
    gradient = np.zeros_like(z)
    gradient[ids] = scale * slope / total * (by - (by * s).sum() / total)
    return scale * s / total, gradient


@functools.cache
def run(ready: bool, **options: Any) -> Any:
    """(ids, weights, gradient by the logits, Hessian-vector product), in one program."""

    def weights(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, w = route(
            jax.nn.sigmoid(z) if ready else z, TOP_K, score=None if ready else "sigmoid", **options
        )
        return w, ids

    def all_of(z: jax.Array, by: jax.Array, v: jax.Array) -> Any:
        w, vjp, ids = jax.vjp(weights, z, has_aux=True)
        second = jax.grad(lambda z: jnp.sum(jax.vjp(weights, z, has_aux=True)[1](by)[0] * v))(z)
        return ids, w, vjp(by)[0], second

    return jax.jit(all_of)


@pytest.mark.parametrize("options", [{}, {"scale": 2.5}, GROUPS], ids=str)
@pytest.mark.parametrize("ready", [False, True], ids=["sigmoid", "ready"])
def test_values_and_gradients_at_every_level(ready, options):
    """Rows of logits from +100 to -1e9, where float32 has no scores left."""
    z = jnp.asarray(np.array(LEVELS)[:, None] + OFFSETS, F32)
    by = jnp.asarray(np.random.default_rng(0).normal(size=(len(LEVELS), TOP_K)), F32)
    ids, weights, gradient, second = run(ready, **options)(z, by, jnp.ones_like(z))
    for row in range(len(LEVELS)):
        want, slope = in_float64(wide(z[row]), np.asarray(ids[row]), wide(by[row]), options.get("scale", 1.0))
        np.testing.assert_allclose(weights[row], want, rtol=2e-5, atol=1e-16)
        np.testing.assert_allclose(gradient[row], slope, rtol=1e-4, atol=2e-6)
    assert np.isfinite(second).all()


def test_second_derivative_is_right_where_scores_are_not_faint():
    z = jnp.asarray(OFFSETS[None], F32)
    loss = lambda route: lambda z: jnp.sum(jnp.sin(route(z)) * jnp.arange(1.0, 4.0))  # noqa: E731

    def plain(z: jax.Array) -> jax.Array:
        chosen = jnp.sort(jax.nn.sigmoid(z))[:, ::-1][:, :TOP_K]
        return chosen / chosen.sum()

    got = jax.jit(jax.hessian(loss(lambda z: route(z, TOP_K, score="sigmoid")[1])))(z)
    np.testing.assert_allclose(got, jax.jit(jax.hessian(loss(plain)))(z), atol=1e-6)


@pytest.mark.parametrize("options", [{}, GROUPS, {"scale": 2.5}], ids=str)
def test_padding_scores_of_zero_do_not_touch_other_tokens(options):
    """Ready scores that a mask made zero: the router's gradient is that of the real tokens alone."""
    x, gate = normal(0, 6, 16, dtype=F32), normal(1, 8, 16, dtype=F32)
    real = jnp.array([1.0, 0, 1, 1, 0, 1])[:, None]

    def loss(gate: jax.Array, x: jax.Array, real: jax.Array) -> jax.Array:
        _, weights = route(jax.nn.softmax(x @ gate.T) * real, TOP_K, score=None, **options)
        return jnp.sum(weights * jnp.arange(1.0, TOP_K + 1))

    kept = np.flatnonzero(real)
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(gradient(gate, x, real), gradient(gate, x[kept], real[kept]), atol=1e-6)
    by_scores = jax.grad(lambda s: route(s, TOP_K, score=None, **options)[1].sum())(jnp.zeros((1, 8)))
    assert np.isfinite(by_scores).all()


def test_one_saturated_token_in_a_layer():
    """Its logits are -95 for every expert: loss and router's gradient are finite."""
    gate, w13, w2 = (
        normal(1, 4, 32, dtype=F32),
        normal(2, 4, 32, 32, dtype=F32),
        normal(3, 4, 32, 16, dtype=F32),
    )
    x = np.array(normal(0, 8, 32, dtype=F32))
    x[3] = np.linalg.lstsq(np.asarray(gate), np.full(4, -95.0), rcond=None)[0]

    def loss(gate: jax.Array) -> jax.Array:
        ids, weights = route(jnp.asarray(x) @ gate.T, 2, score="sigmoid")
        return jnp.mean(moe_mlp(jnp.asarray(x), ids, weights, w13, w2, recipe="bf16") ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(gate)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.any(np.asarray(gradient))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_with_one_expert_the_score_itself_weighs(score):
    logits = normal(0, 5, 8, dtype=F32)
    scores = getattr(jax.nn, score)(logits)
    ids, weights = route(logits, 1, score=score)
    np.testing.assert_allclose(weights, jnp.take_along_axis(scores, ids, -1))
    assert np.abs(jax.grad(lambda z: route(z, 1, score=score)[1].sum())(logits)).max() > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(logits, 1, score=score)
        route(logits, 1, score=score, renormalize=False)
        route(logits, 2, score=score, renormalize=True)


def test_one_expert_renormalised_warns():
    logits = normal(0, 5, 8, dtype=F32)
    with pytest.warns(UserWarning, match="renormalize=False") as caught:
        _, weights = route(logits, 1, renormalize=True)
    assert caught[0].filename == __file__
    assert weights.tolist() == [[1.0]] * 5


def test_deepseek_v3_by_name():
    logits, bias = normal(0, 5, 256, dtype=F32), normal(1, 256, dtype=F32, scale=0.1)
    got = route(logits, 8, bias=bias, **DEEPSEEK_V3)
    want = route(
        logits, 8, score="sigmoid", num_groups=8, top_groups=4, bias=bias, renormalize=True, scale=2.5
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert len({expert // 32 for expert in np.asarray(got[0])[0].tolist()}) <= 4
    with pytest.raises(TypeError):
        DEEPSEEK_V3["scale"] = 1.0  # type: ignore[index]


def test_groups_make_no_infinity():
    """Finite scores, the lowest ones among them, which is how people mask."""
    logits = np.array(normal(0, 6, 16, dtype=F32))
    logits[1, :8] = np.finfo(np.float32).min
    logits[2] = np.finfo(np.float32).min
    with jax.debug_infs(True):
        for score in ("softmax", "sigmoid", None):
            ids, _ = route(jnp.asarray(logits), 2, score=score, renormalize=False, num_groups=4, top_groups=2)
            assert all(expert >= 8 for expert in ids[1].tolist())
        ids, _ = route(jnp.asarray(logits), 2, score=None, renormalize=False, num_groups=4, top_groups=1)
    assert ids[2].tolist() == [0, 1]


def test_route_promotes_no_ranks_and_no_dtypes():
    logits, bias = normal(0, 6, 16), normal(1, 16, dtype=F32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        loss = lambda z: route(z, 2, bias=bias, score="sigmoid", **GROUPS)[1].sum()  # noqa: E731
        assert np.isfinite(jax.grad(loss)(logits).astype(F32)).all()
