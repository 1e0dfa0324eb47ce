"""moe_mlp_decode: fixed rows for every expert, against a loop in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.moe import moe_mlp_decode
from tests.shared import moe_oracle as oracle
from tests.shared.cases import BLOCK
from tests.shared.moe_oracle import normal, relative

BF16, F32 = jnp.bfloat16, jnp.float32
T, H, I, E, K = 12, 136, 72, 6, 3
LIMIT = {"fp8": 0.08, "bf16": 0.015}
X, WEIGHTS = normal(0, T, H), jax.nn.softmax(normal(1, T, K, dtype=F32))
W13 = normal(2, E, 2 * I, H, dtype=F32, scale=H**-0.5)
W2 = normal(3, E, H, I, dtype=F32, scale=I**-0.5)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_any_routing_and_one_compilation(recipe):
    prepared = [jdg.quantize(w, BLOCK) if recipe == "fp8" else w for w in (W13, W2)]
    traces = []

    @jax.jit
    def step(ids: jax.Array) -> jax.Array:
        traces.append(ids)
        return moe_mlp_decode(X, ids, WEIGHTS, *prepared, recipe=recipe)

    everywhere = [
        oracle.random_ids(seed, T, K, E, dropped) for seed, dropped in ((0, 0.0), (1, 0.5), (2, 1.0))
    ]
    for ids in (*everywhere, jnp.tile(jnp.array([5, 0, 2]), (T, 1))):
        assert relative(step(ids), oracle.moe_float64(X, ids, WEIGHTS, W13, W2)) < LIMIT[recipe]
    assert len(traces) == 1


def test_what_has_no_row_is_dropped():
    """max_rows=2: of each expert's tokens only the first two count."""
    ids = oracle.random_ids(0, T, K, E)
    kept = np.asarray(ids).copy()
    for expert in range(E):
        late = np.argwhere(kept == expert)[2:]
        kept[late[:, 0], late[:, 1]] = -1
    assert (kept == -1).any()
    y = jax.jit(functools.partial(moe_mlp_decode, max_rows=2))(X, ids, WEIGHTS, W13, W2)
    assert relative(y, oracle.moe_float64(X, kept, WEIGHTS, W13, W2)) < LIMIT["fp8"]


def test_errors():
    ids = oracle.random_ids(0, T, K, E)
    with pytest.raises(ValueError, match="recipe is 'fp4'"):
        moe_mlp_decode(X, ids, WEIGHTS, W13, W2, recipe="fp4")
    with pytest.raises(ValueError, match="max_rows is 0"):
        moe_mlp_decode(X, ids, WEIGHTS, W13, W2, max_rows=0)
    with pytest.raises(NotImplementedError, match="grouped_linear"):
        jax.grad(lambda w: moe_mlp_decode(X, ids, w, W13, W2).astype(F32).sum())(WEIGHTS)
