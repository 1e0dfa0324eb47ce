"""MoE functions under strict promotion, with symbolic numbers of tokens, and with weights in wrappers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_deepgemm import export_checks
from jax_deepgemm.moe import (
    combine,
    dispatch,
    expert_mlp,
    expert_parallel_moe,
    moe_layer,
    moe_mlp,
    moe_mlp_decode,
    route,
)
from tests.shared import moe_oracle as oracle
from tests.shared import op_checks
from tests.shared.moe_oracle import normal, relative

F32 = jnp.float32
T, H, I, E, K = 12, 64, 32, 4, 2
X, LOGITS = normal(0, T, H, dtype=F32), normal(1, T, E, dtype=F32)
IDS, W = jax.jit(route, static_argnums=1)(LOGITS, K)
W13, W2 = normal(2, E, 2 * I, H, dtype=F32, scale=0.1), normal(3, E, H, I, dtype=F32, scale=0.1)


class Param:
    """A weight in an object, as flax.nnx.Param is one."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __jax_array__(self) -> jax.Array:
        return self.array


def over_mesh(*args: Any, **options: Any) -> jax.Array:
    return moe_layer(*args, mesh=op_checks.make_mesh("auto", (4,), ("expert",)), **options)[0]


def inside(*args: Any, **options: Any) -> jax.Array:
    """expert_parallel_moe, its weights wrapped inside shard_map."""

    def local(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> jax.Array:
        return expert_parallel_moe(x, ids, weights, wrap(w13), wrap(w2), axis="expert", **options)[0]

    wrap = type(args[3]) if isinstance(args[3], Param) else lambda w: w
    arrays = [getattr(arg, "array", arg) for arg in args]
    mesh, cut = op_checks.make_mesh("auto", (4,), ("expert",)), jax.P("expert")
    return jax.shard_map(local, mesh=mesh, in_specs=(cut,) * 5, out_specs=cut)(*arrays)


def experts(x: Any, ids: Any, weights: Any, w13: Any, w2: Any, **options: Any) -> jax.Array:
    rows, plan = dispatch(x, ids, E)
    return combine(expert_mlp(rows, w13, w2, plan.group_sizes, **options), plan, weights)


LAYERS: Any = [moe_mlp, moe_mlp_decode, experts, over_mesh, inside]


def program(layer: Any, wrap: Any = lambda w: w, **options: Any) -> str:
    """What the layer is lowered to, its weights wrapped."""

    def run(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> jax.Array:
        return layer(x, ids, weights, wrap(w13), wrap(w2), **options)

    return jax.jit(run).lower(X, IDS, W, W13, W2).as_text()


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_wrapped_weights_give_the_same_program(layer, recipe):
    assert program(layer, Param, recipe=recipe) == program(layer, recipe=recipe)


def test_flax_params():
    nnx = pytest.importorskip("flax.nnx")
    assert program(moe_mlp, nnx.Param) == program(moe_mlp)
    got = moe_mlp(X, IDS, W, nnx.Param(W13), nnx.Param(W2), recipe="bf16")
    np.testing.assert_array_equal(got, moe_mlp(X, IDS, W, W13, W2, recipe="bf16"))


@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode, experts])
def test_ranks_are_not_promoted(layer):
    want = program(layer)
    with jax.numpy_rank_promotion("raise"):
        assert program(layer) == want


def routed(layer: Any) -> Any:
    return jax.jit(lambda x, logits: layer(x, *route(logits, K), W13, W2))


@functools.cache
def routed_alone(layer: Any) -> jax.Array:
    return routed(layer)(X, LOGITS)


@pytest.mark.parametrize("constraints", [(), ("b >= 8", "b <= 4096")], ids=["any", "bounded"])
@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode, experts])
def test_symbolic_number_of_tokens(layer, constraints):
    (b,) = export.symbolic_shape("b", constraints=constraints)
    shapes = jax.ShapeDtypeStruct((b, H), F32), jax.ShapeDtypeStruct((b, E), F32)
    exported = export.export(routed(layer), platforms=["cpu"], disabled_checks=export_checks)(*shapes)
    assert relative(exported.call(X, LOGITS), routed_alone(layer)) < 1e-2


def test_symbolic_router_with_groups():
    (b,) = export.symbolic_shape("b")
    router = jax.jit(functools.partial(route, top_k=K, score="sigmoid", num_groups=2, top_groups=1))
    exported = export.export(router, platforms=["cpu"])(jax.ShapeDtypeStruct((b, E), F32))
    np.testing.assert_array_equal(exported.call(LOGITS)[0], router(LOGITS)[0])


def test_symbolic_dispatch_matches_a_loop():
    (b,) = export.symbolic_shape("b")
    ids = oracle.random_ids(0, T, K, E, dropped=0.3)
    there = jax.jit(lambda x, ids: dispatch(x, ids, E)[0])
    exported = export.export(there, platforms=["cpu"])(
        jax.ShapeDtypeStruct((b, H), F32), jax.ShapeDtypeStruct((b, K), jnp.int32)
    )
    np.testing.assert_array_equal(exported.call(X, ids), there(X, ids))
