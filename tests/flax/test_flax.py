"""Flax NNX layers: forward, gradients, optimizers, frozen FP8 weights, checkpoints."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

from jax_deepgemm import QuantizedArray, dequantize, fp8_linear  # noqa: E402
from jax_deepgemm.flax import (  # noqa: E402
    Linear,
    MoE,
    QuantizedParam,
    RouterBias,
    named_shardings,
    quantize_module,
)
from tests.shared.arrays import normal  # noqa: E402

RECIPES = ("fp8", "bf16")
TOLERANCE = {"fp8": 0.06, "bf16": 0.01}


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def square(y: jax.Array) -> jax.Array:
    return jnp.mean(y.astype(jnp.float32) ** 2)


def small_moe(**options) -> MoE:
    return MoE(128, 128, num_experts=4, top_k=2, **{"rngs": nnx.Rngs(0), **options})


@functools.cache
def _small(recipe: str, frozen: bool):
    def make() -> Small:
        return quantize_module(Small(recipe)) if frozen else Small(recipe)

    state = jax.jit(lambda: nnx.state(make()))()  # as a whole: much faster than weight by weight
    return nnx.graphdef(nnx.eval_shape(make)), state


def make_small(recipe: str = "fp8", frozen: bool = False) -> Small:
    return nnx.merge(*_small(recipe, frozen))


@nnx.jit
def call(layer, x):
    return layer(x)


class Small(nnx.Module):
    """A linear layer, experts, and a parameter that is neither."""

    def __init__(self, recipe: str = "fp8", rngs: nnx.Rngs | None = None) -> None:
        rngs = rngs or nnx.Rngs(0)
        self.first = Linear(256, 128, recipe=recipe, rngs=rngs)
        shared = 128 if recipe == "bf16" else 0
        self.experts = small_moe(recipe=recipe, shared_intermediate=shared, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(128))

    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        experts = self.experts.decode if decode else self.experts
        return experts(jax.nn.silu(self.first(x)) * self.scale[...].astype(x.dtype))


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_is_a_product_and_a_bias(recipe: str) -> None:
    layer = Linear(256, 128, recipe=recipe, rngs=nnx.Rngs(0))
    layer.bias.set_value(normal(1, 128, dtype=jnp.float32))
    x = normal(2, 3, 5, 256)
    want = x.astype(jnp.float32) @ layer.weight.get_value().T + layer.bias.get_value()
    y = call(layer, x)
    assert y.dtype == jnp.bfloat16
    assert relative(y, want) < TOLERANCE[recipe]
    np.testing.assert_array_equal(layer(x[0, 0]), y[0, 0])  # a vector is one token


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_has_gradients_in_the_dtype_of_its_parameters(recipe: str) -> None:
    layer = Linear(256, 128, recipe=recipe, rngs=nnx.Rngs(0))
    x = normal(2, 6, 256)

    def exact(params: dict[str, jax.Array]) -> jax.Array:
        return square(x.astype(jnp.float32) @ params["weight"].T + params["bias"])

    want = jax.grad(exact)({"weight": layer.weight.get_value(), "bias": layer.bias.get_value()})
    got = nnx.jit(nnx.grad(lambda layer: square(layer(x))))(layer)
    for name in ("weight", "bias"):
        assert got[name].get_value().dtype == jnp.float32
        assert relative(got[name].get_value(), want[name]) < 2 * TOLERANCE[recipe], name


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_lowers_the_loss_and_moves_every_parameter(recipe: str) -> None:
    model, x, target = make_small(recipe), normal(1, 32, 256), normal(2, 32, 128)
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    before = jax.tree.leaves(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: square(model(x) - target))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    for old, new in zip(before, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
        assert np.isfinite(np.asarray(new)).all()


def test_quantized_weights_are_left_alone_by_gradients_and_optimizers() -> None:
    model, x = make_small(frozen=True), normal(1, 8, 256)
    before = jax.tree.map(np.asarray, nnx.state(model, QuantizedParam))
    assert sorted(before["first"]) == ["weight"]
    assert {"w13", "w2"} <= set(before["experts"])
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: square(model(x)))(model)
        optimizer.update(model, gradients)
        return gradients

    gradients = step(model, optimizer)
    assert "weight" not in gradients["first"]
    assert "w13" not in gradients["experts"]
    assert float(jnp.abs(gradients["scale"].get_value()).max()) > 0  # through the frozen experts
    after = jax.tree.map(np.asarray, nnx.state(model, QuantizedParam))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), before, after
    )
    assert (np.asarray(model.scale.get_value()) != 1).any()


def test_quantize_module_makes_a_copy_that_decodes_to_the_same_output() -> None:
    model, x = make_small(), normal(1, 8, 256)
    frozen = quantize_module(model)
    assert isinstance(model.first.weight, nnx.Param)
    assert isinstance(frozen.first.weight.get_value(), QuantizedArray)
    assert isinstance(frozen.experts.gate, nnx.Param)
    assert frozen.scale.get_value() is model.scale.get_value()
    assert relative(dequantize(frozen.first.weight.get_value()), model.first.weight.get_value()) < 0.05
    want = call(model, x)  # the master weights are quantised in the same blocks at each call
    decoded = nnx.jit(lambda model, x: model(x, decode=True))(frozen, x)
    assert relative(decoded, want) < 0.01
    with pytest.raises(ValueError, match="RMSNorm holds no Linear or MoE"):
        quantize_module(nnx.RMSNorm(8, rngs=nnx.Rngs(0)))


def test_a_quantized_linear_is_fp8_linear_of_the_array() -> None:
    layer = quantize_module(Linear(256, 128, rngs=nnx.Rngs(0)))
    x = normal(1, 4, 256)
    np.testing.assert_array_equal(layer(x), fp8_linear(x, layer.weight.get_value()))


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear: recipe is 'fp4', need 'fp8' or 'bf16'"):
        Linear(128, 128, recipe="fp4", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="MoE: recipe is 'int8'"):
        small_moe(recipe="int8")


@pytest.mark.parametrize("frozen", [False, True], ids=["master", "quantized"])
def test_checkpoints_restore_into_an_abstract_model(frozen: bool, tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    model = make_small(frozen=frozen)
    abstract = nnx.eval_shape(lambda: nnx.state(quantize_module(Small()) if frozen else Small()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", abstract)
    for old, new in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(restored), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(np.asarray(old).view(np.uint8), np.asarray(new).view(np.uint8))
    again = nnx.merge(nnx.graphdef(model), restored)
    assert isinstance(again.first.weight, QuantizedParam if frozen else nnx.Param)
    assert again.experts.w13.get_value().shape == (4, 256, 128)


def test_sharding_metadata_places_weights_and_scales() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    layer = quantize_module(small_moe(expert_axis="expert"))
    linear = quantize_module(Linear(256, 384, sharding=P("expert"), rngs=nnx.Rngs(0)))
    placed = named_shardings(nnx.state(layer), mesh)
    experts = NamedSharding(mesh, P("expert", None, None))
    assert placed["w13"].get_value().values == experts
    assert placed["w13"].get_value().scales.spec == experts.spec
    assert placed["gate"].get_value() == NamedSharding(mesh, P())
    rows = named_shardings(nnx.state(linear), mesh)["weight"].get_value()
    assert rows.values.spec == P("expert")
    assert rows.scales.spec == P(None, None)  # 192 rows a device: inside a block
    state = jax.device_put(nnx.state(layer), placed)
    assert state["w13"].get_value().values.addressable_shards[0].data.shape[0] == 2


def test_experts_over_a_mesh_compute_the_same() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    here, x = small_moe(recipe="bf16"), normal(1, 8, 4, 128)
    there = small_moe(recipe="bf16", expert_axis="expert", mesh=mesh)
    tokens = NamedSharding(mesh, P(("data", "expert")))
    nnx.update(there, jax.device_put(nnx.state(there), named_shardings(nnx.state(there), mesh)))

    @nnx.jit
    def both(layer, x):
        def loss(layer):
            y, load = layer(x, with_load=True)
            return square(y), (y, load)

        return nnx.grad(loss, has_aux=True)(layer)

    want, (y, load) = both(here, x)
    got, (y_cut, load_cut) = both(there, jax.device_put(x, tokens))
    assert got["w13"].get_value().sharding.spec[0] == "expert"
    np.testing.assert_array_equal(y_cut, y)
    np.testing.assert_array_equal(load_cut.tokens, load.tokens)
    assert int(load.tokens.sum()) == 64
    assert int(load_cut.dropped) == 0
    for name in ("w13", "w2", "gate"):
        assert relative(got[name].get_value(), want[name].get_value()) < 0.01, name


def test_copies_without_room_are_dropped_and_counted() -> None:
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    options = {"expert_axis": "expert", "mesh": mesh, "recipe": "bf16"}
    x = normal(1, 16, 128)
    for method in ("all_to_all", "ragged"):
        layer = small_moe(method=method, capacity_factor=0.25, **options)
        _, load = nnx.jit(lambda layer, x: layer(x, with_load=True))(layer, x)
        assert int(load.tokens.sum()) == 32
        assert 16 <= int(load.dropped) < 32, method


def test_inside_shard_map_the_weights_are_the_devices_own() -> None:
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    layer, x = small_moe(expert_axis="expert", recipe="bf16"), normal(1, 32, 128)
    graph, state = nnx.split(layer)
    specs = jax.tree.map(lambda s: s.spec, named_shardings(state, mesh))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("expert")), out_specs=P("expert"))
    def local(state, x):
        return nnx.merge(graph, state)(x)

    here = small_moe(recipe="bf16")
    np.testing.assert_array_equal(local(state, x), call(here, x))


def test_the_error_without_flax_names_the_package() -> None:
    script = (
        "import sys; sys.modules['flax'] = None\n"
        "try: import jax_deepgemm.flax\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install flax" in run.stdout


def test_importing_the_package_does_not_import_flax() -> None:
    script = "import sys, jax_deepgemm; print('flax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_routers_bias_moves_against_the_load() -> None:
    layer = small_moe(balance=True)
    layer.move_bias(jnp.array([6, 2, 4, 4]), 0.5)
    assert isinstance(layer.bias, RouterBias)
    assert layer.bias.get_value().tolist() == [-0.5, 0.5, 0.0, 0.0]
