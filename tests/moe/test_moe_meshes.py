"""MoE functions on Explicit axes, mixed meshes and in partly manual shard_map: as on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.moe import (
    combine,
    dispatch,
    expert_mlp,
    expert_parallel_moe,
    moe_layer,
    moe_mlp,
    moe_mlp_decode,
)
from tests.shared import moe_oracle as oracle
from tests.shared.moe_oracle import normal, relative

F32 = jnp.float32
T, H, I, E, K = 16, 64, 32, 4, 2
X, W = normal(0, T, H, dtype=F32), jax.nn.softmax(normal(1, T, K, dtype=F32))
IDS = oracle.random_ids(0, T, K, E, dropped=0.1)
W13, W2 = normal(2, E, 2 * I, H, dtype=F32, scale=0.1), normal(3, E, H, I, dtype=F32, scale=0.1)
ROWS, WHOLE = P("data"), P()
bf16 = functools.partial(moe_mlp, recipe="bf16")
LAYERS: dict[str, Any] = {"fp8": moe_mlp, "bf16": bf16, "decode": moe_mlp_decode}


def mesh_of(*kinds: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)


EXPLICIT = mesh_of(AxisType.Explicit, AxisType.Explicit)
MIXED = mesh_of(AxisType.Explicit, AxisType.Auto)
AUTO = mesh_of(AxisType.Auto, AxisType.Auto)


def placed(mesh: jax.sharding.Mesh, tokens: P, w13: P = WHOLE, w2: P = WHOLE) -> list[jax.Array]:
    specs = (tokens, P(*tokens[:1]), P(*tokens[:1]), w13, w2)
    arrays = (X, IDS, W, W13, W2)
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


@functools.cache
def alone(name: str) -> jax.Array:
    return jax.jit(LAYERS[name])(X, IDS, W, W13, W2)


def gradients(layer: Any, x: Any, ids: Any, *rest: Any) -> Any:
    return jax.grad(lambda x, *rest: jnp.sum(jnp.sin(layer(x, ids, *rest).astype(F32))), (0, 1, 2, 3))(
        x, *rest
    )


@functools.cache
def gradients_alone() -> Any:
    return jax.jit(functools.partial(gradients, bf16))(X, IDS, W, W13, W2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("mesh", "tokens"), [(EXPLICIT, ROWS), (EXPLICIT, P("data", "model")), (MIXED, ROWS), (EXPLICIT, P())]
)
def test_tokens_stay_where_they_are(name, mesh, tokens):
    with jax.set_mesh(mesh):
        y = jax.jit(LAYERS[name])(*placed(mesh, tokens))
    assert relative(y, alone(name)) < 1e-2
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, tokens), 2)


@pytest.mark.parametrize("mesh", [EXPLICIT, MIXED], ids=["explicit", "mixed"])
def test_gradients_and_weights_cut_along_features(mesh):
    """Each gradient has its argument's sharding; weights are gathered and their gradients summed."""
    args = placed(mesh, ROWS, P(None, None, "data"), P(None, "data"))
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(gradients, bf16))(*args)
    for one, want, arg in zip(got, gradients_alone(), (args[0], *args[2:]), strict=True):
        assert relative(one, want) < 1e-2
        assert one.sharding.is_equivalent_to(arg.sharding, one.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_rows_of_experts_that_are_cut(recipe):
    """Rows of one expert on several devices: gradients have their arguments' shardings."""
    sizes = jnp.array([3, 0, 8, 4])

    def pull(rows: jax.Array, w13: jax.Array, w2: jax.Array, sizes: jax.Array) -> Any:
        layer = functools.partial(expert_mlp, group_sizes=sizes, recipe=recipe)
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(layer(*args))), (0, 1, 2))(rows, w13, w2)

    want = jax.jit(pull)(X, W13, W2, sizes)
    args = [jax.device_put(x, NamedSharding(EXPLICIT, s)) for x, s in ((X, ROWS), (W13, P()), (W2, P()))]
    with jax.set_mesh(EXPLICIT):
        got = jax.jit(pull)(*args, jax.device_put(sizes, NamedSharding(EXPLICIT, P())))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(one, other) < 1e-2
    for one, arg in zip(got[1], args, strict=True):
        assert one.sharding.is_equivalent_to(arg.sharding, one.ndim)


@pytest.mark.parametrize("mesh", [EXPLICIT, MIXED], ids=["explicit", "mixed"])
def test_a_mesh_that_was_not_set(mesh):
    assert relative(moe_mlp(*placed(mesh, ROWS)), alone("fp8")) < 1e-2


@pytest.mark.parametrize("name", ["fp8", "decode"])
def test_advice_for_experts_that_are_cut(name):
    args = placed(EXPLICIT, ROWS, P("model"), P("model"))
    with jax.set_mesh(EXPLICIT):
        with pytest.raises(ValueError, match=r"w13 is \[4, 64, 64\].* moe_layer.*expert_axis='model'"):
            LAYERS[name](*args)
        if name == "fp8":  # what the message advises is the same for both
            y, _ = jax.jit(functools.partial(moe_layer, expert_axis="model"))(*args)
            assert relative(y, alone("fp8")) < 1e-2
        gathered = [jax.sharding.reshard(w, P()) for w in args[3:]]
        assert relative(jax.jit(LAYERS[name])(*args[:3], *gathered), alone(name)) < 1e-2


def through(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    rows, plan = dispatch(x, ids, E)
    return combine(jnp.sin(rows), plan, weights)


def test_advice_for_dispatch_of_cut_tokens():
    args = placed(EXPLICIT, ROWS)[:3]
    with jax.set_mesh(EXPLICIT):
        with pytest.raises(ValueError, match=r"Call it inside jax\.shard_map"):
            jax.jit(through)(*args)
        y = jax.jit(jax.shard_map(through, in_specs=(ROWS,) * 3, out_specs=ROWS))(*args)
    np.testing.assert_allclose(y, through(X, IDS, W), rtol=1e-5, atol=1e-6)


def scanned(layer: Any, x: jax.Array, *rest: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, _: (h + layer(h, *rest), None), x, None, length=2)[0]


@functools.cache
def scanned_alone() -> jax.Array:
    return jax.jit(functools.partial(scanned, bf16))(X, IDS, W, W13, W2)


@pytest.mark.parametrize(
    ("mesh", "tokens"),
    [(EXPLICIT, P()), (EXPLICIT, ROWS), (EXPLICIT, P(("data", "model"))), (MIXED, P()), (MIXED, ROWS)],
)
def test_scan_over_layers(mesh, tokens):
    """A layer's result has the sharding of its tokens on Explicit axes."""
    cut = functools.partial(moe_layer, expert_axis="model", recipe="bf16")
    with jax.set_mesh(mesh):
        y = jax.jit(functools.partial(scanned, lambda *args: cut(*args)[0]))(*placed(mesh, tokens))
    assert relative(y, scanned_alone()) < 1e-2
    if mesh is EXPLICIT:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, tokens), 2)


def partly(layer: Any, specs: Any) -> Any:
    return jax.shard_map(layer, mesh=AUTO, in_specs=specs, out_specs=ROWS, axis_names={"data"})


@pytest.mark.parametrize("name", LAYERS)
def test_partly_manual(name):
    got = jax.jit(partly(LAYERS[name], (ROWS, ROWS, ROWS, P(), P())))(X, IDS, W, W13, W2)
    assert relative(got, alone(name)) < 1e-2


def test_partly_manual_dispatch_and_gradients():
    got = jax.jit(partly(through, (ROWS,) * 3))(X, IDS, W)
    np.testing.assert_allclose(got, through(X, IDS, W), rtol=1e-5, atol=1e-6)
    layer = partly(bf16, (ROWS, ROWS, ROWS, P(), P()))
    for one, want in zip(
        jax.jit(functools.partial(gradients, layer))(X, IDS, W, W13, W2), gradients_alone(), strict=True
    ):
        assert relative(one, want) < 1e-2


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_partly_manual_experts_over_devices(method):
    layer = lambda *args: expert_parallel_moe(*args, axis="data", method=method)[0]  # noqa: E731
    assert relative(jax.jit(partly(layer, (ROWS,) * 5))(X, IDS, W, W13, W2), alone("fp8")) < 1e-2


def test_a_layer_inside_a_partly_manual_shard_map():
    layer = lambda *args: moe_layer(*args, expert_axis="model")[0]  # noqa: E731
    got = jax.jit(partly(layer, (ROWS, ROWS, ROWS, P(), P())))(X, IDS, W, W13, W2)
    assert relative(got, alone("fp8")) < 1e-2


def test_advice_for_counts_that_do_not_divide():
    """6 tokens and 3 experts over 8 and 4 devices: padded as the messages say."""
    x, ids, weights = X[:6], oracle.random_ids(0, 6, K, 3), W[:6]
    w13, w2 = W13[:3], W2[:3]
    layer = functools.partial(moe_layer, mesh=AUTO, expert_axis="model", recipe="bf16")
    with pytest.raises(ValueError, match=r"6 tokens over 8 devices.* 2 rows of zeros, ids by rows of -1"):
        layer(x, ids, weights, w13, w2)
    grow = lambda z, by, value=0: jnp.pad(z, ((0, by),) + ((0, 0),) * (z.ndim - 1), constant_values=value)  # noqa: E731
    args = grow(x, 2), grow(ids, 2, -1), grow(weights, 2)
    with pytest.raises(ValueError, match=r"3 experts over 4 devices.* w13 and w2 by 1 experts of zeros"):
        layer(*args, w13, w2)
    y, dropped = jax.jit(layer)(*args, grow(w13, 1), grow(w2, 1))
    assert int(dropped) == 0
    assert relative(y[:6], jax.jit(bf16)(x, ids, weights, w13, w2)) < 1e-2
