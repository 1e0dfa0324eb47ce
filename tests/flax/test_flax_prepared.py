"""prepared_weights: what a module's layers use inside, what is left of it outside."""

from __future__ import annotations

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
    prepared_weights,
    quantize_module,
)
from tests.shared.arrays import normal  # noqa: E402

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


def test_same_numbers_and_quantised_once() -> None:
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
    value, gradients = nnx.jit(step)(model, BATCHES)
    plain, expected = nnx.jit(nnx.value_and_grad(loss))(model, BATCHES)
    assert float(value) == pytest.approx(float(plain), rel=1e-4)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


def test_training_step() -> None:
    """The copies end with the context: an update is seen by the next step."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        with prepared_weights(model):
            value, gradients = nnx.value_and_grad(loss)(model, BATCHES)
        optimizer.update(model, gradients)
        return value

    before = names(model)
    values = [float(step(model, optimizer)) for _ in range(4)]
    assert values[-1] < values[0]
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
