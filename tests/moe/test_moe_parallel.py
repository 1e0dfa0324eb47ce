"""Experts over devices: the same numbers as on one device, what a full buffer drops, gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.moe import exchange, moe_layer, moe_mlp
from tests.shared import moe_oracle as oracle
from tests.shared import op_checks
from tests.shared.cases import BLOCK
from tests.shared.moe_oracle import normal, relative

BF16, F32 = jnp.bfloat16, jnp.float32
T, H, I, E, K = 48, 136, 72, 8, 3
IDS = oracle.random_ids(0, T, K, E, dropped=0.1)
METHODS = ("all_to_all", "ragged")


def operands(x_dtype: Any = BF16) -> list[jax.Array]:
    """x, weights, w13, w2."""
    return [
        normal(0, T, H, dtype=x_dtype),
        jax.nn.softmax(normal(1, T, K, dtype=F32)),
        normal(2, E, 2 * I, H, dtype=F32, scale=H**-0.5),
        normal(3, E, H, I, dtype=F32, scale=I**-0.5),
    ]


def mesh_of(data: int, expert: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((data, expert), ("data", "expert"), axis_types=(kind,) * 2)


def value_and_gradients(layer: Any, args: list[Any], compiled: Any = jax.jit) -> Any:
    target = normal(4, T, H, dtype=F32)

    def loss(*args: Any) -> Any:
        y, dropped = layer(*args)
        return jnp.sum(y.astype(F32) * target), (y, dropped)

    return compiled(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*args)


def over_mesh(mesh: jax.sharding.Mesh, **options: Any) -> Any:
    return lambda x, p, w13, w2: moe_layer(x, IDS, p, w13, w2, mesh=mesh, **options)


def moe_mlp_alone(ids: Any, recipe: str) -> Any:
    """moe_mlp on one device, op by op."""
    layer = lambda x, p, w13, w2: (moe_mlp(x, ids, p, w13, w2, recipe=recipe), 0)  # noqa: E731
    return value_and_gradients(layer, operands(), compiled=lambda run: run)


@functools.cache
def alone(recipe: str) -> Any:
    return moe_mlp_alone(IDS, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "method"), [("fp8", "all_to_all"), ("fp8", "ragged"), ("bf16", "ragged")])
def test_same_as_one_device(recipe, method):
    """Nothing dropped. In FP8 y has equal bits; gradients of w see dx and dy quantised twice."""
    (_, (y, dropped)), got = value_and_gradients(
        over_mesh(mesh_of(2, 4), method=method, recipe=recipe), operands()
    )
    (_, (want_y, _)), want = alone(recipe)
    assert int(dropped) == 0
    np.testing.assert_array_equal(y, want_y)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, other) < (0.06 if recipe == "fp8" else 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_full_buffers_drop_copies(method):
    """The copies that count are those of a loop that fills the buffers in order; weights stay as they are."""
    devices, factor = 4, 0.7
    tokens, local = T // devices, E // devices
    x, weights, w13, w2 = operands()
    ids = jnp.where(IDS >= 0, IDS // 2, -1)  # twice the load for the first devices
    ids = jnp.where(jnp.arange(K) == 0, ids, jnp.where(ids == ids[:, :1], -1, ids))
    kept = np.asarray(ids).copy()
    room = -(-int(factor * tokens * K * 10**6) // 10**6)
    for destination in range(devices):
        used = 0
        for source in range(devices):
            used = used if method == "ragged" else 0
            limit = room if method == "ragged" else int(np.ceil(factor * tokens * K / devices))
            for token in range(source * tokens, (source + 1) * tokens):
                for slot in range(K):
                    if kept[token, slot] >= 0 and kept[token, slot] // local == destination:
                        used += 1
                        if used > limit:
                            kept[token, slot] = -1
    lost = int((kept != np.asarray(ids)).sum())
    assert lost > 5
    mesh = mesh_of(2, 4)
    y, dropped = jax.jit(
        functools.partial(
            moe_layer,
            mesh=mesh,
            token_axes="expert",
            method=method,
            capacity_factor=factor,
            recipe="bf16",
        )
    )(x, ids, weights, w13, w2)
    assert int(dropped) == lost
    assert relative(y, oracle.moe_float64(x, kept, weights, w13, w2)) < 0.015


def test_gradients_with_drops_are_those_of_the_kept_copies():
    """A copy without room has zero gradients: as if its id had been -1, on one device."""
    ids = jnp.tile(jnp.arange(K), (T, 1))  # all tokens to the first two of four devices

    layer = lambda x, p, w13, w2: moe_layer(  # noqa: E731
        x, ids, p, w13, w2, mesh=mesh_of(2, 4), recipe="bf16", capacity_factor=1.0
    )
    (_, (y, dropped)), got = value_and_gradients(layer, operands())
    copy = np.arange(T // 8 * K).reshape(-1, K)
    order = np.where(np.arange(K) < 2, copy // K * 2 + copy % K, copy // K)
    room = -(-T // 8 * K // 4)  # of each device for each destination; experts 0 and 1 share the first one
    kept = np.where(np.tile(order, (8, 1)) < room, ids, -1)
    assert int(dropped) == int((kept < 0).sum()) > 0
    (_, (want_y, _)), want = moe_mlp_alone(jnp.asarray(kept), "bf16")
    for one, other in zip((y, *got), (want_y, *want), strict=True):
        assert relative(one, other) < 1e-2


def test_frozen_weights_and_explicit_axes():
    x, weights, w13, w2 = operands()
    frozen = [jdg.quantize(w, BLOCK) for w in (w13, w2)]
    mesh = mesh_of(2, 4, AxisType.Explicit)
    placed = [jax.device_put(z, NamedSharding(mesh, P(("data", "expert")))) for z in (x, IDS, weights)]
    with jax.set_mesh(mesh):
        y, dropped = jax.jit(lambda *args: moe_layer(*args, *frozen))(*placed)
    assert y.sharding.spec[0] == ("data", "expert")
    assert int(dropped) == 0
    np.testing.assert_array_equal(y, moe_mlp(x, IDS, weights, *frozen))


def test_tokens_travel_as_bytes():
    """Forward and backward: what goes to the experts is 8-bit, as words; bfloat16 comes back."""
    text = str(jax.make_jaxpr(lambda *a: value_and_gradients(over_mesh(mesh_of(2, 4)), list(a)))(*operands()))
    sent = [line.split("= all_to_all")[0] for line in text.splitlines() if "= all_to_all" in line]
    wide = [line for line in sent if f",{H}]" in line or f",{H // 4}]" in line]
    assert sum("u32[" in line for line in wide) == 2
    assert sum("bf16[" in line for line in wide) == 2
    assert len(wide) == 4


def test_another_routing_does_not_compile_again():
    x, weights, w13, w2 = operands()
    traces = []

    @jax.jit
    def step(ids: jax.Array) -> jax.Array:
        traces.append(ids)
        return moe_layer(x, ids, weights, w13, w2, mesh=mesh_of(1, 8), recipe="bf16")[0]

    for seed in range(2):
        ids = oracle.random_ids(seed, T, K, E)
        assert relative(step(ids), oracle.moe_float64(x, ids, weights, w13, w2)) < 0.015
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert_axis": "model"}, "experts are cut over .'model',."),
        ({"token_axes": "data"}, "tokens cut over those of the experts too"),
        (
            {"x": jnp.ones((7, 16), BF16), "ids": jnp.zeros((7, 2), jnp.int32), "weights": jnp.ones((7, 2))},
            "7 tokens",
        ),
        ({"w13": jnp.ones((2, 16, 16)), "w2": jnp.ones((2, 16, 8))}, "2 experts over 4 devices"),
        ({"method": "broadcast"}, "method is 'broadcast'"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"recipe": "fp4"}, "recipe is 'fp4'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(change, words):
    call: dict[str, Any] = {
        "x": jnp.ones((8, 16), BF16),
        "ids": jnp.zeros((8, 2), jnp.int32),
        "weights": jnp.ones((8, 2)),
        "w13": jnp.ones((4, 16, 16)),
        "w2": jnp.ones((4, 16, 8)),
        "mesh": mesh_of(2, 4),
    }
    with pytest.raises(ValueError, match=words):
        moe_layer(**{**call, **change})


def test_inside_shard_map_with_all_experts_everywhere():
    """moe_mlp is data-parallel inside shard_map: the replicated weights' gradients are summed."""
    x, weights, w13, w2 = operands()
    mesh = op_checks.make_mesh("auto", (8,), ("x",))

    def layer(x: jax.Array, p: jax.Array, w13: jax.Array, w2: jax.Array) -> Any:
        tokens = P("x")
        run = jax.shard_map(moe_mlp, mesh=mesh, in_specs=(tokens, tokens, tokens, P(), P()), out_specs=tokens)
        return run(x, IDS, p, w13, w2), 0

    (_, (y, _)), got = value_and_gradients(layer, [x, weights, w13, w2])
    (_, (want_y, _)), want = alone("fp8")
    np.testing.assert_array_equal(y, want_y)
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 0.06


def test_ragged_is_the_collective_of_that_name():
    """Where it is not emulated, tokens and their gradients go through ragged_all_to_all (GPUs run it)."""
    mesh = op_checks.make_mesh("auto", (8,), ("expert",))

    def local(x: jax.Array, ids: jax.Array) -> jax.Array:
        wire = exchange.plan_wire("expert", "ragged", T // 8, K, E // 8, None, emulate=False)
        way = exchange.plan_exchange(ids, E // 8, wire)
        return exchange.return_rows(way, jnp.sin(exchange.send_tokens(way, x)))

    layer = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    text = jax.jit(jax.grad(lambda x: layer(x, IDS).sum())).lower(normal(0, T, H, dtype=F32)).as_text()
    sent = [line for line in text.splitlines() if "ragged_all_to_all" in line]
    assert len(sent) == 4  # ids, x, the gradient of the result (which does not need sin), that of x
