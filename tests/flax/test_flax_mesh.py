"""Flax layers on a mesh: each device makes its part of the weights, and results are cut as what came in."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")

from jax_deepgemm.flax import Linear, MoE, quantize_module  # noqa: E402
from jax_deepgemm.flax.weights import GateUp, _Draw, _program, lecun_normal  # noqa: E402
from jax_deepgemm.moe import ExpertForm  # noqa: E402

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def make_mesh(kind) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "expert"), axis_types=(kind,) * 2)


def make_moe(**options) -> MoE:
    options = {"expert_axis": "expert", "recipe": "bf16", "rngs": nnx.Rngs(0), **options}
    return MoE(128, 64, num_experts=8, top_k=2, **options)


def assert_cut(weight: nnx.Param, whole: nnx.Param, local: tuple[int, ...]) -> None:
    assert {shard.data.shape for shard in weight.get_value().addressable_shards} == {local}
    np.testing.assert_array_equal(weight.get_value(), whole.get_value())


@KINDS
def test_each_device_makes_its_own_experts(kind) -> None:
    whole, mesh = make_moe(expert_axis=None), make_mesh(kind)
    with jax.set_mesh(mesh):
        layers = [make_moe(), nnx.jit(make_moe)()]
        abstract = nnx.eval_shape(make_moe)
    layers.append(make_moe(mesh=mesh))
    for layer in layers:
        assert_cut(layer.w13, whole.w13, (2, 128, 128))
        assert_cut(layer.w2, whole.w2, (2, 128, 64))
        assert layer.w13.get_value().sharding.spec[0] == "expert"
        np.testing.assert_array_equal(layer.gate[...], whole.gate[...])
    assert abstract.w13.shape == (8, 128, 128)


@KINDS
@pytest.mark.parametrize("spec", [P("expert"), P(None, ("data", "expert")), P("data", "expert")], ids=str)
def test_each_device_makes_its_part_of_a_linear_layer(kind, spec: P) -> None:
    whole, rows = Linear(128, 64, rngs=nnx.Rngs(0)), {"expert": 16, "data": 32}
    with jax.set_mesh(make_mesh(kind)):
        layer = Linear(128, 64, sharding=spec, rngs=nnx.Rngs(0))
        stacked = nnx.vmap(lambda rngs: Linear(128, 64, sharding=spec, rngs=rngs))(nnx.Rngs(0).split(3))
    columns = {None: 128, "expert": 32, ("data", "expert"): 16}[spec[1] if len(spec) > 1 else None]
    assert_cut(layer.weight, whole.weight, (rows.get(spec[0], 64), columns))
    assert_cut(layer.bias, whole.bias, (rows.get(spec[0], 64),))
    assert stacked.weight.get_value().addressable_shards[0].data.shape == (3, rows.get(spec[0], 64), columns)


@KINDS
def test_no_device_ever_holds_all_experts(kind) -> None:
    make = _Draw("MoE", GateUp(lecun_normal), (8, 128, 256), np.dtype(np.float32))
    with jax.set_mesh(make_mesh(kind)):
        program = _program(make, P("expert", None, None), kind == AxisType.Explicit)
        compiled = program.lower(jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    part = 2 * 128 * 256 * 4
    assert memory.output_size_in_bytes == part
    assert memory.temp_size_in_bytes < 3 * part < 8 * 128 * 256 * 4


@KINDS
def test_moments_of_an_optimizer_are_cut_as_their_weights(kind) -> None:
    optax = pytest.importorskip("optax")
    with jax.set_mesh(make_mesh(kind)):
        layer = Linear(128, 64, sharding=P("expert"), use_bias=False, recipe="bf16", rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(layer, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
        moments = optimizer.opt_state[0].trace["weight"]
        assert moments.get_value().addressable_shards[0].data.shape == (16, 128)
        optimizer.update(layer, jax.tree.map(jnp.ones_like, nnx.state(layer, nnx.Param)))
        assert layer.weight.get_value().addressable_shards[0].data.shape == (16, 128)


def test_weights_that_the_mesh_cannot_cut_are_refused_with_a_way_out() -> None:
    with jax.set_mesh(make_mesh(AxisType.Auto)):
        with pytest.raises(ValueError, match=r"MoE: a weight \[6, 128, 128\].*6 is no multiple of 4 devices"):
            MoE(128, 64, num_experts=6, top_k=2, expert_axis="expert", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"Linear: .* no axis 'model'. Name one of its axes"):
            Linear(128, 64, sharding=P("model"), rngs=nnx.Rngs(0))
        with nnx.logical_axis_rules([("model", "expert")]):
            layer = Linear(128, 64, sharding=P("model"), rngs=nnx.Rngs(0))
        assert layer.weight.get_value().addressable_shards[0].data.shape == (16, 128)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_a_linear_layer_cut_along_its_inputs_says_how_the_result_is_cut(recipe: str) -> None:
    x = jax.random.normal(jax.random.key(1), (4, 8, 512), jnp.bfloat16)
    want, vector = Linear(512, 256, recipe=recipe, rngs=nnx.Rngs(0))(x), x[0, 0]
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        layer = Linear(512, 256, recipe=recipe, sharding=P(None, "expert"), rngs=nnx.Rngs(0))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        for spec in (P("data", None, None), P("data", None, "expert")):
            y = layer(x, out_sharding=spec)
            assert y.sharding.spec == spec
            np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(want, np.float32), atol=0.05)
        assert layer(vector, out_sharding=P("expert")).sharding.spec == P("expert")


def test_results_of_experts_are_cut_as_the_tokens_on_explicit_axes() -> None:
    x = jax.random.normal(jax.random.key(1), (8, 4, 128), jnp.bfloat16)
    want = nnx.jit(lambda layer, x: layer(x))(make_moe(expert_axis=None, shared_intermediate=64), x)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(make_moe(shared_intermediate=64))

        @jax.jit
        def in_a_loop(state, x):
            y, _ = jax.lax.scan(lambda x, _: (nnx.merge(graph, state)(x), None), x, length=1)
            return y

        tokens = {
            spec: jax.device_put(x, NamedSharding(mesh, spec))
            for spec in (P("data", None, None), P(None, "expert", None), P("data", None, "expert"))
        }
        for spec, cut in tokens.items():
            assert jax.eval_shape(in_a_loop, state, cut).sharding.spec == spec
        y = in_a_loop(state, cut)
    assert y.sharding.spec == spec
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(
    ("kind", "form", "local"),
    [
        (AxisType.Auto, ExpertForm(), [(2, 2, 128, 128), (2, 128, 128)]),
        (AxisType.Explicit, ExpertForm(weight_layout="kn"), [(2, 128, 2, 128), (2, 128, 128)]),
    ],
    ids=["apart", "kn"],
)
def test_the_inner_size_of_experts_is_cut(kind, form, local) -> None:
    """Each device makes its features of gate and up; the same numbers and gradients, frozen weights too."""
    x = jax.random.normal(jax.random.key(1), (16, 128), jnp.bfloat16)
    make = functools.partial(MoE, 128, 256, 4, 2, form=form, recipe="bf16")

    def loss(layer, x):
        y = layer(x)
        return jnp.mean(y.astype(jnp.float32) ** 2), y

    step = nnx.jit(nnx.grad(loss, has_aux=True))
    alone = make(rngs=nnx.Rngs(0))
    slopes, want = step(alone, x)
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        layer = make(rngs=nnx.Rngs(0), expert_axis="expert", tensor_axis="tensor")
        cut = jax.device_put(x, NamedSharding(mesh, P(("data", "expert", "tensor"))))
        slope, got = step(layer, cut)
        if form.weight_layout == "nk":
            assert quantize_module(layer).w13.get_value().shape == (4, 2, 256, 128)
    assert [w.get_value().addressable_shards[0].data.shape for w in (layer.w13, layer.w2)] == local
    np.testing.assert_array_equal(np.asarray(layer.w13[...]).reshape(alone.w13.shape), alone.w13[...])
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.02)
    for name in ("gate", "w13", "w2"):
        one, other = (np.asarray(s[name][...]) for s in (slope, slopes))
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=0.02 * np.abs(other).max())


def test_experts_without_an_axis_take_cut_tokens_on_explicit_axes() -> None:
    mesh = jax.make_mesh((8, 1), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.random.normal(jax.random.key(1), (16, 128), jnp.bfloat16)
    want = make_moe(expert_axis=None)(x)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: make_moe(expert_axis=None)(x))(
            jax.device_put(x, NamedSharding(mesh, P("data")))
        )
    assert y.sharding.spec == P("data", None)
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2, atol=2e-2)
