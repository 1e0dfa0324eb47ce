"""moe_mlp and expert_mlp on one device: against loops in float64, plain autodiff, the recipe written out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.moe import dispatch, expert_mlp, moe_mlp, moe_mlp_decode, spread_weights
from tests.shared import moe_oracle as oracle
from tests.shared import op_checks
from tests.shared.cases import BLOCK
from tests.shared.moe_oracle import normal, pull_stepwise, relative

BF16, F32 = jnp.bfloat16, jnp.float32
T, H, I, E, K = 60, 136, 72, 5, 2
LIMIT = {"fp8": 0.08, "bf16": 0.015}


def operands(x_dtype: Any = BF16, w_dtype: Any = F32) -> list[jax.Array]:
    """x, weights, w13, w2."""
    return [
        normal(0, T, H, dtype=x_dtype),
        jax.nn.softmax(normal(1, T, K, dtype=F32)),
        normal(2, E, 2 * I, H, dtype=w_dtype, scale=H**-0.5),
        normal(3, E, H, I, dtype=w_dtype, scale=I**-0.5),
    ]


IDS = oracle.random_ids(0, T, K, E, dropped=0.1)


@functools.cache
def pulled(recipe: str, x_dtype: Any = BF16, w_dtype: Any = F32) -> Any:
    """y, and the gradients of x, weights, w13, w2."""
    layer = lambda x, *rest: moe_mlp(x, IDS, *rest, recipe=recipe)  # noqa: E731
    return pull_stepwise(layer, *operands(x_dtype, w_dtype), by=normal(4, T, H, dtype=x_dtype))


@pytest.mark.parametrize(
    ("recipe", "dtypes"), [("fp8", (BF16, F32)), ("fp8", (F32, BF16)), ("bf16", (F32, F32))], ids=str
)
def test_values_and_gradients(recipe, dtypes):
    args = operands(*dtypes)
    target = normal(4, T, H, dtype=dtypes[0]).astype(F32)

    def loss(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return jnp.sum(oracle.moe_plain(x, IDS, *rest) * target)

    y, *got = pulled(recipe, *dtypes)
    assert y.dtype == dtypes[0]
    assert relative(y, oracle.moe_float64(args[0], IDS, *args[1:])) < LIMIT[recipe]
    want = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)
    for one, other, arg in zip(got, want, args, strict=True):
        assert one.dtype == arg.dtype
        assert relative(one, other) < LIMIT[recipe]


@pytest.mark.slow
def test_fp8_is_the_documented_recipe():
    """Forward: dispatch, quantise, GEMM, SwiGLU with the weight, quantise, GEMM, sum."""
    x, weights, w13, w2 = operands()
    frozen = [jdg.quantize(w, BLOCK) for w in (w13, w2)]

    def written_out(x: jax.Array) -> Any:
        rows, plan = dispatch(x, IDS, E)
        gemm = functools.partial(jdg.m_grouped_fp8_gemm_nt_contiguous, group_sizes=plan.group_sizes)
        hidden = gemm(jdg.quantize(rows), frozen[0]).astype(F32)
        gate, up = jnp.split(hidden, 2, axis=-1)
        act = jax.nn.silu(gate) * up * spread_weights(weights, plan)[:, None]
        return gemm(jdg.quantize(act), frozen[1]).astype(F32), plan.position

    rows, position = map(np.asarray, written_out(x))
    want = np.zeros((T, H), np.float32)
    for (token, _), row in np.ndenumerate(position):
        want[token] += rows[row] if row < len(rows) else 0
    got = moe_mlp(x, IDS, weights, w13, w2)
    assert relative(got, want) < 4e-3  # the order of three products, and bfloat16
    np.testing.assert_array_equal(pulled("fp8")[0], got)  # the pass that keeps transposed copies too


@pytest.mark.parametrize("frozen", [(True, True), (False, True)], ids=str)
def test_frozen_weights(frozen):
    """Gradients of x and the weights are those with master weights; a master weight keeps its own."""
    x, p, *both = operands()
    used = [jdg.quantize(w, BLOCK) if cold else w for w, cold in zip(both, frozen, strict=True)]
    live = [i for i, cold in enumerate(frozen) if not cold]

    def layer(x: jax.Array, p: jax.Array, *trained: jax.Array) -> jax.Array:
        full = list(used)
        for i, w in zip(live, trained, strict=True):
            full[i] = w
        return moe_mlp(x, IDS, p, *full)

    got = pull_stepwise(layer, x, p, *(both[i] for i in live), by=normal(4, T, H))
    want = pulled("fp8")
    op_checks.assert_same(got, [*want[:3], *(want[3 + i] for i in live)], 0)


def test_dropped_tokens():
    """All copies dropped: zeros, and zero gradients, whatever the token holds."""
    x, weights, w13, w2 = operands()
    x = x.at[7].set(jnp.nan)
    ids = IDS.at[7].set(jnp.array([-1, E]))
    layer = lambda x, p, w13: moe_mlp(x, ids, p, w13, w2)  # noqa: E731
    y, dx, dp, dw13 = pull_stepwise(layer, x, weights, w13, by=jnp.ones_like(x))
    assert not np.any(oracle.wide(y[7]))
    assert np.isfinite(oracle.wide(y)).all()
    assert not np.any(oracle.wide(dx[7]))
    assert not np.any(oracle.wide(dp[7]))
    assert np.isfinite(oracle.wide(dw13)).all()


def test_another_routing_does_not_compile_again():
    x, weights, w13, w2 = operands()
    traces = []

    @jax.jit
    def step(ids: jax.Array) -> Any:
        traces.append(ids)
        return moe_mlp(x, ids, weights, w13, w2)

    for seed, dropped in ((0, 0.0), (1, 0.5), (2, 1.0)):
        ids = oracle.random_ids(seed, T, K, E, dropped)
        assert relative(step(ids), oracle.moe_float64(x, ids, weights, w13, w2)) < LIMIT["fp8"]
    assert len(traces) == 1


@pytest.mark.slow
def test_remat_and_scan_over_layers():
    """Stacked layers, each with saved FP8 residuals: the gradients without jax.checkpoint."""
    x, weights, w13, w2 = operands()
    stacked = [jnp.stack([w, 0.5 * w]) for w in (w13, w2)]
    names = ("jdg_grouped_act_fp8", "jdg_grouped_weight_fp8", "jdg_moe_hidden")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + moe_mlp(x, IDS, weights, *w), None

    def loss(stacked: Any) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, tuple(stacked))[0].astype(F32).sum()

    def plain(stacked: Any) -> jax.Array:
        return layer(layer(x, [w[0] for w in stacked])[0], [w[1] for w in stacked])[0].astype(F32).sum()

    for one, other in zip(jax.jit(jax.grad(loss))(stacked), jax.grad(plain)(stacked), strict=True):
        assert relative(one, other) < 1e-2


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_no_tokens(recipe):
    _, _, w13, w2 = operands()
    none = jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K))
    layer = lambda x, w13: moe_mlp(x, *none, w13, w2, recipe=recipe)  # noqa: E731
    empty = jnp.zeros((0, H), BF16)
    y, dx, dw13 = pull_stepwise(layer, empty, w13, by=empty)
    assert (y.shape, dx.shape) == ((0, H), (0, H))
    assert not np.any(np.asarray(dw13))


@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_no_tokens_forward(layer):
    _, _, w13, w2 = operands()
    ids, weights = jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K))
    y = layer(jnp.zeros((0, H), BF16), ids, weights, *(jdg.quantize(w, BLOCK) for w in (w13, w2)))
    assert y.shape == (0, H)


def test_numpy_weights_are_taken():
    x, weights, w13, w2 = operands()
    arrays = IDS, np.asarray(weights)
    np.testing.assert_array_equal(moe_mlp(x, *arrays, w13, w2, recipe="bf16"), pulled("bf16", BF16, F32)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": jnp.ones((2, 3, 16), BF16)}, "need 2 dimensions"),
        ({"ids": jnp.zeros((4, 2), jnp.int32)}, r"ids are \[4, 2\] and x is \[3, 16\]"),
        ({"weights": jnp.ones((3, 1))}, r"ids are \[3, 2\] and weights are \[3, 1\]"),
        ({"w13": jnp.ones((2, 8, 16))}, r"w13 is \[2, 8, 16\] and w2 is \[2, 16, 8\]"),
        ({"recipe": "fp4"}, "recipe is 'fp4'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(change, words):
    call: dict[str, Any] = {
        "x": jnp.ones((3, 16), BF16),
        "ids": jnp.zeros((3, 2), jnp.int32),
        "weights": jnp.ones((3, 2)),
        "w13": jnp.ones((2, 16, 16)),
        "w2": jnp.ones((2, 16, 8)),
    }
    with pytest.raises(ValueError, match=words):
        moe_mlp(**{**call, **change})


def test_row_weights_need_one_per_row():
    with pytest.raises(ValueError, match=r"row_weights are float32 \[2\]"):
        expert_mlp(
            jnp.ones((3, 16), BF16),
            jnp.ones((2, 16, 16)),
            jnp.ones((2, 16, 8)),
            jnp.ones(2, jnp.int32),
            jnp.ones(2),
        )
