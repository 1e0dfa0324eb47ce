"""prepared_weights: what a module's layers use inside, what is left of it outside."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
optax = pytest.importorskip("optax")

from flax import nnx  # noqa: E402

from jax_deepgemm.flax import (  # noqa: E402
    Linear,
    MoE,
    WeightCopies,
    accumulate_gradients,
    prepared_weights,
    quantize_module,
)
from tests.shared.arrays import normal  # noqa: E402

pytestmark = pytest.mark.any_version

F32 = jnp.float32
BATCHES = normal(0, 2, 16, 128)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, recipe: str = "fp8") -> None:
        self.dense = Linear(128, 256, rngs=rngs, recipe=recipe)
        self.head = Linear(256, 128, rngs=rngs, recipe="bf16")
        self.moe = MoE(128, 128, num_experts=2, top_k=1, shared_intermediate=128, rngs=rngs, recipe=recipe)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.moe(self.head(self.dense(x)))


def loss(model: Any, batches: jax.Array) -> jax.Array:
    def body(total: Any, x: Any) -> Any:
        return total + jnp.mean(jnp.square(model(x).astype(F32))), None

    return jax.lax.scan(body, jnp.zeros((), F32), batches)[0]


@functools.cache
def plain() -> tuple[float, Any]:
    """The loss of a new model and its gradients, a batch after the other, without copies."""
    return nnx.value_and_grad(lambda model: sum(one_loss(model, x) for x in BATCHES))(Model(nnx.Rngs(0)))


def names(model: Any) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}


def test_inside_the_copies_stand_beside_the_weights() -> None:
    model = Model(nnx.Rngs(0))
    before = names(model)
    with prepared_weights(model):
        added = names(model) - before
        parts = nnx.state(model, WeightCopies)
    assert names(model) == before
    weights = {"dense/weight", "moe/w13", "moe/w2", "moe/shared/w13/weight", "moe/shared/w2/weight"}
    assert added == {f"{name}_copies" for name in weights}
    assert {leaf.dtype for leaf in jax.tree.leaves(parts)} == {jnp.dtype("uint8"), jnp.dtype("uint32")}
    with pytest.raises(ZeroDivisionError), prepared_weights(model):
        1 / 0  # noqa: B018
    assert names(model) == before


def test_same_result_and_quantised_once() -> None:
    model = Model(nnx.Rngs(0))
    x = BATCHES[0]
    want = model(x)
    with prepared_weights(model):
        np.testing.assert_array_equal(model(x), want)
        text = str(jax.make_jaxpr(lambda x: model(x))(x))
    assert not re.search(r"= quantize_weight_|128x128", text)

    def step(model: Any, batches: Any) -> Any:
        with prepared_weights(model):
            return nnx.value_and_grad(loss)(model, batches)

    graph, state = nnx.split(model)
    text = str(jax.make_jaxpr(lambda state: step(nnx.merge(graph, state), BATCHES))(state))
    assert len(re.findall(r"= quantize_weight_\w+\[", text)) == 5


def test_training_step() -> None:
    """Value and gradients as without copies, and the copies end with the context: an update is seen by the
    next step."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> tuple[jax.Array, Any]:
        with prepared_weights(model):
            value, gradients = nnx.value_and_grad(loss)(model, BATCHES)
        optimizer.update(model, gradients)
        return value, gradients

    before = names(model)
    steps = [step(model, optimizer) for _ in range(4)]
    value, gradients = steps[0]
    assert float(value) == pytest.approx(float(plain()[0]), rel=1e-4)
    near(gradients, plain()[1])
    assert steps[-1][0] < value
    assert names(model) == before


def test_stacked_layers_that_rematerialise() -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Linear:
        return Linear(128, 128, rngs=rngs)

    layers, x = stack(nnx.Rngs(0)), BATCHES[0]

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer: Linear, x: jax.Array) -> jax.Array:
        return nnx.remat(Linear.__call__)(layer, x)

    gradients = nnx.jit(nnx.grad(lambda layers: jnp.sum(through(layers, x).astype(F32) ** 2)))
    want = gradients(layers)
    with prepared_weights(layers):
        got = gradients(layers)
    assert got["weight"].shape == (2, 128, 128)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


@pytest.mark.parametrize(
    "module",
    [lambda: quantize_module(Linear(128, 128, rngs=nnx.Rngs(0))), lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))],
    ids=["quantised", "of others"],
)
def test_nothing_to_prepare(module: Any) -> None:
    with pytest.raises(ValueError, match="Leave the context out"), prepared_weights(module()):
        pass


def one_loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(x).astype(F32)))


def zeros(model: Any, dtype: Any = F32) -> Any:
    return jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), nnx.state(model, nnx.Param))


def near(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = (np.asarray(z, np.float64) for z in (one, other))
        assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(other)


def test_sums_of_microbatches() -> None:
    """In a scan: as the gradients of all batches, with products that add for the weights in FP8."""
    model = Model(nnx.Rngs(0))

    def step(model: Any, batches: Any) -> Any:
        with prepared_weights(model):
            body = lambda sums, x: accumulate_gradients(one_loss, model, sums, x)[::-1]  # noqa: E731
            return jax.lax.scan(body, zeros(model), batches)

    sums, values = nnx.jit(step)(model, BATCHES)
    near(sums, plain()[1])
    assert values.shape == (2,)
    graph, state = nnx.split(model)
    text = str(jax.make_jaxpr(lambda state: jax.tree.leaves(step(nnx.merge(graph, state), BATCHES)))(state))
    assert len(re.findall(r"= fp8_gemm_row_add\[", text)) == 3
    assert len(re.findall(r"= k_grouped_fp8_gemm_add\[", text)) == 2
    assert len(re.findall(r"= quantize_weight_\w+\[", text)) == 5
    assert not hasattr(model.dense, "hands_on")


def test_float32_sums_of_bfloat16_weights_without_copies() -> None:
    layer = Linear(128, 256, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    start = jax.tree.map(lambda w: w + 1, zeros(layer))
    _, sums, shape = accumulate_gradients(
        lambda layer, x: (one_loss(layer, x), x.shape), layer, start, BATCHES[0], has_aux=True
    )
    assert shape == BATCHES[0].shape
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(F32)}
    near(sums, jax.tree.map(lambda one: one.astype(F32) + 1, nnx.grad(one_loss)(layer, BATCHES[0])))


class Counting(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = Linear(128, 128, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.dense(x)


def test_other_state_is_kept() -> None:
    model = Counting(nnx.Rngs(0))
    before = model.dense.weight.get_value()
    step = nnx.jit(lambda model, sums, x: accumulate_gradients(one_loss, model, sums, x)[1])
    sums = zeros(model)
    for x in BATCHES:
        sums = step(model, sums, x)
    assert int(model.calls.get_value()) == len(BATCHES)
    np.testing.assert_array_equal(model.dense.weight.get_value(), before)


def test_sums_of_another_module_are_refused() -> None:
    model = Linear(128, 256, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"sums are those of \['weight'\] and the module has \['bias', 'weight'\]"
    ):
        accumulate_gradients(
            one_loss, model, zeros(Linear(128, 256, use_bias=False, rngs=nnx.Rngs(0))), BATCHES[0]
        )
    accumulate_gradients(
        one_loss, model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)), BATCHES[0]
    )


def test_sums_of_stacked_layers_that_rematerialise() -> None:
    """The weights of each layer go through nnx.scan and nnx.remat, and come back."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Linear:
        return Linear(128, 128, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer: Linear, x: jax.Array) -> jax.Array:
        return nnx.remat(Linear.__call__)(layer, x)

    def deep(layers: Any, x: jax.Array) -> jax.Array:
        return one_loss(lambda x: through(layers, x), x)

    layers = stack(nnx.Rngs(0))
    start = jax.tree.map(lambda w: w + 1, zeros(layers))
    with prepared_weights(layers):
        graph, state = nnx.split(layers)
        step = lambda state, x: accumulate_gradients(deep, nnx.merge(graph, state), start, x)[1]  # noqa: E731
        got = jax.jit(step)(state, BATCHES[0])
        text = str(jax.make_jaxpr(lambda state, x: jax.tree.leaves(step(state, x)))(state, BATCHES[0]))
    near(got, jax.tree.map(lambda dw: dw + 1, nnx.jit(nnx.grad(deep))(layers, BATCHES[0])))
    assert text.count("= fp8_gemm_row_add[") == 1
