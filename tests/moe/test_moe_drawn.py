"""moe_mlp, expert_mlp and grouped_linear with drawn loads: values and gradients beside those in float32.

Loads of all kinds: experts without tokens, one expert with all of them, dropped copies, 1 to 2048 experts,
and rows behind the last group that hold NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_deepgemm import grouped_linear
from jax_deepgemm.moe import expert_mlp, moe_mlp
from tests.shared import moe_oracle as oracle
from tests.shared.moe_oracle import normal, relative, wide

pytestmark = pytest.mark.any_version

F32 = jnp.float32
T, K = 24, 2
SIZES = {1: (72, 40), 5: (136, 72), 2048: (24, 16)}
"""Experts -> hidden, inner."""
LIMIT = {"fp8": 0.1, "bf16": 0.02}
FEW = settings(max_examples=8, deadline=None)


@st.composite
def loads(draw: Any, groups: int, rows: int) -> np.ndarray:
    """The group of each row, -1 for none: of all groups or of a few, perhaps of one alone."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    met = rng.permutation(groups)[: draw(st.sampled_from([1, 2, groups]))]
    dropped = rng.random(rows) < draw(st.sampled_from([0.0, 0.3, 0.97, 1.0]))
    return np.where(dropped, -1, rng.choice(met, rows)).astype(np.int32)


@st.composite
def routings(draw: Any, experts: int) -> np.ndarray:
    """ids [T, K]; what is dropped has any id outside the experts."""
    ids = draw(loads(experts, T * K)).reshape(T, K)
    outside = draw(st.sampled_from([-1, experts, 2**31 - 1, -(2**31)]))
    return np.where(ids < 0, outside, ids).astype(np.int32)


@functools.cache
def weights(experts: int) -> tuple[jax.Array, jax.Array]:
    hidden, inner = SIZES[experts]
    w13 = normal(2, experts, 2 * inner, hidden, dtype=F32, scale=hidden**-0.5)
    return w13, normal(3, experts, hidden, inner, dtype=F32, scale=inner**-0.5)


def pulled(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(routing, arguments, gradient of the result) -> value and gradients, compiled once."""

    @jax.jit
    def run(routing: jax.Array, arguments: Any, by: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda *arguments: function(routing, *arguments), *arguments)
        return y, *vjp(by.astype(y.dtype))

    return run


@functools.cache
def layer(recipe: str, experts: int) -> Any:
    return pulled(lambda ids, x, p, w13, w2: moe_mlp(x, ids, p, w13, w2, recipe=recipe))


@functools.cache
def plain(experts: int) -> Any:
    return pulled(lambda ids, x, p, w13, w2: oracle.moe_plain(x, ids, p, w13, w2))


def close(got: Any, want: Any, limit: float) -> None:
    found = [relative(one, other) for one, other in zip(got, want, strict=True)]
    assert all(value < limit for value in found), found


@pytest.mark.parametrize(("recipe", "experts"), [("fp8", 1), ("fp8", 5), ("bf16", 5), ("fp8", 2048)], ids=str)
def test_moe_mlp_with_any_load(recipe, experts):
    hidden = SIZES[experts][0]
    x, by = normal(0, T, hidden), normal(4, T, hidden)
    p = jax.nn.softmax(normal(1, T, K, dtype=F32))
    arguments = (x, p, *weights(experts))

    @FEW
    @given(routings(experts))
    def check(ids: np.ndarray) -> None:
        y, dx, dp, *dw = layer(recipe, experts)(ids, arguments, by)
        want_y, want_dx, want_dp, *want_dw = plain(experts)(ids, arguments, by)
        close((y, dx, *dw), (want_y, want_dx, *want_dw), LIMIT[recipe])
        most = np.linalg.norm(wide(by), axis=1, keepdims=True) * copies_norm(ids, arguments)
        assert (np.abs(wide(dp) - wide(want_dp)) <= LIMIT[recipe] * most).all(), "a sum of few products"
        met = np.isin(np.arange(experts), ids)
        assert not any(np.any(wide(one)[~met]) for one in dw), "an expert without tokens has no gradient"
        assert not np.any(wide(y)[((ids < 0) | (ids >= experts)).all(1)])

    check()


def copies_norm(ids: np.ndarray, arguments: tuple[jax.Array, ...]) -> np.ndarray:
    """|MLP of expert ids[t, s] of x[t]|, [T, K]; 0 of dropped ones."""
    x, _, w13, w2 = (wide(one) for one in arguments)
    known = (ids >= 0) & (ids < len(w13))
    safe = np.where(known, ids, 0)
    gate, up = np.split(np.einsum("tsnh,th->tsn", w13[safe], x), 2, axis=-1)
    y = np.einsum("tshi,tsi->tsh", w2[safe], gate / (1 + np.exp(-gate)) * up)
    return np.where(known, np.linalg.norm(y, axis=-1), 0.0)


# Rows that are sorted already ------------------------------------------------------------------------------

G, M, N, H = 5, 300, 72, 136


def sizes_of(groups: np.ndarray) -> np.ndarray:
    return np.bincount(groups[groups >= 0], minlength=G).astype(np.int32)


def poisoned(sizes: np.ndarray, x: jax.Array) -> np.ndarray:
    """x with NaN behind the last group."""
    return np.where(np.arange(M)[:, None] < sizes.sum(), wide(x), np.nan).astype(x.dtype)


def cleaned(x: Any) -> np.ndarray:
    return np.nan_to_num(wide(x)).astype(np.float32)


@functools.cache
def linear(recipe: str) -> Any:
    return pulled(lambda sizes, x, w: grouped_linear(x, w, sizes, recipe=recipe, out_dtype=F32))


def linear_float64(sizes: np.ndarray, x: Any, w: Any, by: Any) -> tuple[np.ndarray, ...]:
    x, w, by, y, dx, dw = *map(wide, (x, w, by)), np.zeros((M, N)), np.zeros((M, H)), np.zeros((G, N, H))
    for group, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        rows = slice(end - size, end)
        y[rows], dx[rows] = x[rows] @ w[group].T, by[rows] @ w[group]
        dw[group] = by[rows].T @ x[rows]
    return y, dx, dw


@pytest.mark.parametrize("recipe", LIMIT)
def test_grouped_linear_with_any_load(recipe):
    w = normal(2, G, N, H, dtype=F32, scale=H**-0.5)

    @FEW
    @given(loads(G, M))
    def check(groups: np.ndarray) -> None:
        sizes = sizes_of(groups)
        x, by = poisoned(sizes, normal(0, M, H)), poisoned(sizes, normal(1, M, N))
        got = linear(recipe)(sizes, (x, w), by)
        close(got, linear_float64(sizes, cleaned(x), w, cleaned(by)), LIMIT[recipe])

    check()


@functools.cache
def mlp(recipe: str) -> Any:
    return pulled(lambda sizes, x, p, w13, w2: expert_mlp(x, w13, w2, sizes, p, recipe=recipe))


@functools.cache
def plain_mlp() -> Any:
    """Each row is a token that goes to one expert."""
    return pulled(lambda ids, x, p, *w: oracle.moe_plain(x, ids[:, None], p[:, None], *w))


@pytest.mark.parametrize("recipe", LIMIT)
def test_expert_mlp_with_any_load(recipe):
    p = jax.nn.softmax(normal(1, M, 1, dtype=F32)[:, 0]) * M
    hidden, both = SIZES[G][0], weights(G)

    @FEW
    @given(loads(G, M))
    def check(groups: np.ndarray) -> None:
        sizes = sizes_of(groups)
        x, by = poisoned(sizes, normal(0, M, hidden)), normal(4, M, hidden)
        ids = np.repeat([*range(G), -1], [*sizes, M - sizes.sum()]).astype(np.int32)
        y, dx, _, *dw = mlp(recipe)(sizes, (x, p, *both), by)
        want_y, want_dx, _, *want_dw = plain_mlp()(ids, (cleaned(x), p, *both), by)
        close((y, dx, *dw), (want_y, want_dx, *want_dw), LIMIT[recipe])

    check()
