"""Flax layers next to Flax's own: initial weights, dtypes, biases, routers, conversions, transformations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")

from jax_deepgemm.flax import Linear, MoE, SwiGLU, quantize_module  # noqa: E402
from tests.shared.arrays import normal  # noqa: E402

init = nnx.initializers
INITIALIZERS = {
    "lecun_normal": init.lecun_normal(),
    "he_normal": init.he_normal(),
    "glorot_uniform": init.glorot_uniform(),
    "variance_scaling": init.variance_scaling(2.0, "fan_out", "truncated_normal"),
}
"""Also those whose scale depends on fan-out."""
DTYPES = (jnp.bfloat16, jnp.float32)


def std(weight) -> float:
    return float(np.std(np.asarray(weight)))


@functools.cache
def scale(name: str, inputs: int, outputs: int) -> float:
    """Of the kernel of an nnx.Linear."""
    return std(INITIALIZERS[name](jax.random.key(1), (inputs, outputs), jnp.float32))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_weights_have_the_scale_of_nnx_linear(name: str) -> None:
    options = {"kernel_init": INITIALIZERS[name], "rngs": nnx.Rngs(0)}
    for inputs, outputs in ((64, 256), (256, 64)):
        layer = Linear(inputs, outputs, **options)
        assert std(layer.weight) == pytest.approx(scale(name, inputs, outputs), rel=0.03)
    mlp = SwiGLU(64, 256, **options)
    moe = MoE(64, 256, num_experts=16, top_k=2, **options)
    for w13, w2 in ((mlp.w13.weight, mlp.w2.weight), (moe.w13, moe.w2)):
        for half in (w13[..., :256, :], w13[..., 256:, :]):  # gate and up are matrices of their own
            assert std(half) == pytest.approx(scale(name, 64, 256), rel=0.05)
        assert std(w2) == pytest.approx(scale(name, 256, 64), rel=0.05)
    assert std(moe.gate) == pytest.approx(scale(name, 64, 16), rel=0.1)


@pytest.mark.parametrize("experts", [1, 4, 64])
def test_the_number_of_experts_does_not_scale_them(experts: int) -> None:
    layer = MoE(128, 64, num_experts=experts, top_k=1, rngs=nnx.Rngs(0))
    assert std(layer.w13) * np.sqrt(128) == pytest.approx(1.0, rel=0.05)
    assert std(layer.w2) * np.sqrt(64) == pytest.approx(1.0, rel=0.05)
    assert std(layer.gate) * np.sqrt(128) == pytest.approx(1.0, rel=0.15)
    assert len(np.unique(np.asarray(layer.w13[:, ::64, 0]))) == 2 * experts  # gate, up, experts: all drawn


def test_orthogonal_weights_are_so_expert_by_expert() -> None:
    layer = MoE(64, 32, num_experts=2, top_k=1, kernel_init=init.orthogonal(), rngs=nnx.Rngs(0))
    for half in (layer.w13[:, :32], layer.w13[:, 32:], jnp.swapaxes(layer.w2[...], 1, 2)):
        np.testing.assert_allclose(half @ jnp.swapaxes(half, 1, 2), np.tile(np.eye(32), (2, 1, 1)), atol=1e-5)


def test_the_default_is_that_of_nnx_linear_to_the_bit() -> None:
    ours, theirs = Linear(64, 96, rngs=nnx.Rngs(3)), nnx.Linear(64, 96, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(ours.weight[...].T, theirs.kernel[...])
    np.testing.assert_array_equal(ours.bias[...], theirs.bias[...])


def test_initialisers_that_do_not_fit_are_refused_with_a_way_out() -> None:
    rows = np.ones((96, 64), np.float32)
    with pytest.raises(
        ValueError, match=r"returned \[96, 64\], need \[64, 96\].*Transpose what has the stored"
    ):
        Linear(64, 96, kernel_init=lambda key, shape, dtype: rows, rngs=nnx.Rngs(0))
    layer = Linear(64, 96, kernel_init=lambda key, shape, dtype: rows.T, rngs=nnx.Rngs(0))
    assert layer.weight.shape == (96, 64)
    cut = init.lecun_normal()
    with pytest.raises(TypeError, match=r"MoE: .*nnx.with_partitioning.* expert_axis= of MoE"):
        MoE(64, 32, 2, 1, kernel_init=nnx.with_partitioning(cut, ("a", "b")), rngs=nnx.Rngs(0))


def layers(**options):
    yield Linear(128, 128, rngs=nnx.Rngs(0), **options)
    yield SwiGLU(128, 128, rngs=nnx.Rngs(0), **options)
    yield MoE(128, 128, num_experts=4, top_k=2, shared_intermediate=128, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_results_have_the_dtype_of_the_layer_or_of_x(recipe: str) -> None:
    x = normal(1, 4, 128)
    for given in DTYPES:
        for layer in layers(recipe=recipe):
            assert jax.eval_shape(layer, x.astype(given)).dtype == given
        for dtype in DTYPES:
            for layer in layers(recipe=recipe, dtype=dtype):
                assert jax.eval_shape(layer, x.astype(given)).dtype == dtype
                if isinstance(layer, MoE):
                    assert jax.eval_shape(layer.decode, x.astype(given)).dtype == dtype


def test_other_dtypes_are_refused_and_the_advice_works() -> None:
    x = normal(1, 4, 128, dtype=jnp.float16)
    for layer, name in zip(layers(), ("Linear", "Linear", "MoE"), strict=True):
        with pytest.raises(TypeError, match=rf"{name}: x is float16, .* dtype=jnp.bfloat16"):
            layer(x)
    for layer in layers(dtype=jnp.bfloat16):
        assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    for option in ("dtype", "param_dtype"):
        for kind in (Linear, SwiGLU, functools.partial(MoE, num_experts=2, top_k=1)):
            with pytest.raises(ValueError, match=rf"{option} is float16, need bfloat16 or float32"):
                kind(128, 128, rngs=nnx.Rngs(0), **{option: jnp.float16})


def test_parameters_have_the_dtype_asked_for_and_the_router_float32() -> None:
    for layer in layers(param_dtype=jnp.bfloat16):
        for path, value in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
            assert value.dtype == (jnp.float32 if path == ("gate",) else jnp.bfloat16), path


def test_float32_inputs_keep_their_digits() -> None:
    layer = Linear(128, 128, dtype=jnp.float32, recipe="bf16", use_bias=False, rngs=nnx.Rngs(0))
    y = layer(normal(1, 4, 128))
    assert (np.asarray(y) != np.asarray(y.astype(jnp.bfloat16), np.float32)).any()


def test_bias_as_in_nnx_linear() -> None:
    layer = Linear(128, 96, bias_init=init.ones_init(), recipe="bf16", rngs=nnx.Rngs(0))
    x = normal(1, 4, 128)
    assert layer.bias.shape == (96,)
    without = Linear(128, 96, use_bias=False, recipe="bf16", rngs=nnx.Rngs(0))
    assert without.bias is None
    np.testing.assert_array_equal(layer(x), (without(x) + 1).astype(jnp.bfloat16))
    without.bias = nnx.Param(jnp.ones(96))
    np.testing.assert_array_equal(without(x), layer(x))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtypes", [(None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)], ids=str)
def test_from_nnx_and_back_is_the_same_layer(use_bias: bool, dtypes) -> None:
    dtype, param_dtype = dtypes
    options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
    dense = nnx.Linear(128, 96, bias_init=init.normal(1.0), rngs=nnx.Rngs(0), **options)
    layer = Linear.from_nnx(dense, recipe="bf16")
    assert layer.weight.dtype == param_dtype
    x = normal(1, 4, 128)
    want = np.asarray(dense(x), np.float32)
    np.testing.assert_allclose(np.asarray(layer(x), np.float32), want, atol=0.05)
    back = layer.to_nnx()
    assert nnx.graphdef(back) == nnx.graphdef(dense)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(dense))
    again = Linear.from_nnx(back, recipe="bf16")
    assert nnx.graphdef(again) == nnx.graphdef(layer)
    layer.weight.set_value(layer.weight[...] * 0)
    assert float(jnp.abs(dense.kernel[...]).max()) > 0  # a layer of its own


def test_from_nnx_keeps_the_sharding_turned() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    metadata = {
        "kernel_metadata": {"out_sharding": (None, "model")},
        "bias_metadata": {"out_sharding": ("model",)},
    }
    with jax.set_mesh(mesh):
        dense = nnx.Linear(16, 8, rngs=nnx.Rngs(0), **metadata)
    layer = Linear.from_nnx(dense)
    assert layer.weight.get_metadata()["out_sharding"] == ("model", None)
    assert layer.weight.get_value().addressable_shards[0].data.shape == (2, 16)
    assert layer.to_nnx().kernel.get_metadata() == dense.kernel.get_metadata()
    assert layer.bias.get_metadata() == dense.bias.get_metadata()
    ours = Linear(16, 8, sharding=P("model", None), rngs=nnx.Rngs(0))
    assert ours.to_nnx().kernel.get_metadata()["out_sharding"] == P(None, "model")


def test_what_is_no_plain_linear_is_refused_with_a_way_out() -> None:
    lora = nnx.LoRALinear(128, 96, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"from_nnx: linear is a LoRALinear .* layer.weight.set_value\(kernel.T\)"
    ):
        Linear.from_nnx(lora)
    layer = Linear(128, 96, rngs=nnx.Rngs(0))
    layer.weight.set_value(lora.kernel[...].T)
    frozen = quantize_module(layer)
    with pytest.raises(ValueError, match=r"to_nnx: the weight is quantised.*jax_deepgemm.dequantize"):
        frozen.to_nnx()
    import jax_deepgemm

    frozen.weight = nnx.Param(jax_deepgemm.dequantize(frozen.weight.get_value(), jnp.float32))
    assert frozen.to_nnx().kernel.shape == (128, 96)


def test_a_router_of_one_expert_a_token_is_trained() -> None:
    x = normal(0, 16, 128)

    @nnx.jit
    def gradient_of_the_gate(layer: MoE) -> jax.Array:
        return nnx.grad(lambda layer: jnp.sum(layer._route(x)[1] ** 2))(layer)["gate"][...]

    default, without, with_two = (
        MoE(128, 128, num_experts=4, rngs=nnx.Rngs(0), **options)
        for options in ({"top_k": 1}, {"top_k": 1, "renormalize": False}, {"top_k": 2})
    )
    gradient = gradient_of_the_gate(default)
    np.testing.assert_array_equal(gradient, gradient_of_the_gate(without))
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(with_two._route(x)[1].sum(-1), 1, rtol=1e-6)  # renormalised


def test_routers_have_one_default_and_deepseek_v3_has_a_name() -> None:
    from jax_deepgemm.moe import DEEPSEEK_V3, route

    x = normal(0, 16, 128)
    for options, kwargs, biased in (({}, {}, False), (DEEPSEEK_V3, dict(DEEPSEEK_V3), True)):
        layer = MoE(128, 128, num_experts=32, top_k=4, rngs=nnx.Rngs(0), **options)
        ids, weights = layer._route(x)
        logits = x.astype(jnp.float32) @ layer.gate[...].T
        want_ids, want = route(logits, 4, **kwargs)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want, rtol=1e-4)
        assert (layer.bias is not None) == biased


def test_the_bias_for_balance_is_there_when_asked_for() -> None:
    layer = MoE(128, 128, num_experts=2, top_k=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"move_bias: the layer has no bias. Make it with balance=True"):
        layer.move_bias(jnp.array([1, 2]), 0.1)
    MoE(128, 128, num_experts=2, top_k=1, balance=True, rngs=nnx.Rngs(0)).move_bias(jnp.array([1, 2]), 0.1)
    assert MoE(128, 128, 2, 1, score="sigmoid", balance=False, rngs=nnx.Rngs(0)).bias is None


def test_inputs_may_be_variables_and_numpy_arrays() -> None:
    x = normal(1, 4, 128, dtype=jnp.float32)
    for layer in layers(recipe="bf16"):
        for given in (nnx.Param(x), np.asarray(x)):
            assert jax.eval_shape(lambda layer=layer, x=given: layer(x)).shape == (4, 128)
    np.testing.assert_array_equal(layer.shared.w2(nnx.Param(x)), layer.shared.w2(x))


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_layers_promote_nothing_implicitly(recipe: str) -> None:
    x = normal(1, 4, 128)

    def loss(layer, x: jax.Array) -> jax.Array:
        y = layer(x, with_load=True)[0] if isinstance(layer, MoE) else layer(x)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for layer in layers(recipe=recipe):
            graph, state = nnx.split(layer)
            gradient = jax.grad(lambda state, graph=graph: loss(nnx.merge(graph, state), x))
            assert jax.tree.structure(jax.eval_shape(gradient, state)) == jax.tree.structure(state)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = Linear(128, 128, recipe="bf16", rngs=rngs)
        self.moe = MoE(128, 128, num_experts=2, top_k=1, recipe="bf16", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.moe(self.dense(x))


def test_layers_scan_and_rematerialise() -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
        return Block(rngs)

    blocks, x = stack(nnx.Rngs(0)), normal(1, 4, 128)
    assert blocks.moe.w13.shape == (2, 2, 256, 128)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(block: Block, x: jax.Array) -> jax.Array:
        return nnx.remat(Block.__call__)(block, x)

    @nnx.jit
    def loss_and_gradients(blocks: Block):
        return nnx.value_and_grad(lambda blocks: jnp.sum(through(blocks, x).astype(jnp.float32) ** 2))(blocks)

    @nnx.jit
    def one_by_one(blocks: Block) -> jax.Array:
        graph, state = nnx.split(blocks)
        y = x
        for i in range(2):
            y = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(y)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    loss, gradients = loss_and_gradients(blocks)
    assert float(loss) == pytest.approx(float(one_by_one(blocks)), rel=1e-2)
    for path, gradient in nnx.to_flat_state(gradients):
        assert float(jnp.abs(gradient[...]).min(axis=0).max()) > 0, path
