"""Weights quantised once, and sums of gradients written in place, on a GPU.

Run: pytest -m gpu tests/gpu/test_prepared_gpu.py        (about 30 s)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import accumulate_gradients, fp8_linear, grouped_linear, prepare_weight
from jax_deepgemm.moe import expert_mlp, moe_mlp
from tests.shared.gpu_programs import program
from tests.shared.moe_oracle import normal, random_ids

BF16, F32 = jnp.bfloat16, jnp.float32
STEPS, M, H, I, G = 3, 300, 512, 384, 4
SIZES = (37, 0, 200, 21)  # 42 rows behind the last group
IDS = functools.partial(random_ids, 5, M, 2, G, dropped=0.1)
Layer = Callable[..., tuple[jax.Array, tuple[Any, Any]]]


def linear(x: jax.Array, w13: Any, w2: Any) -> Any:
    y, w13 = fp8_linear(x, w13, with_weight=True)
    y, w2 = fp8_linear(y[:, :I], w2, with_weight=True)
    return y, (w13, w2)


def grouped(x: jax.Array, w13: Any, w2: Any) -> Any:
    sizes = jnp.array(SIZES, jnp.int32)
    y, w13 = grouped_linear(x, w13, sizes, with_weight=True)
    y, w2 = grouped_linear(y[:, :I], w2, sizes, with_weight=True)
    return y, (w13, w2)


def experts(x: jax.Array, w13: Any, w2: Any) -> Any:
    return expert_mlp(x, w13, w2, jnp.array(SIZES, jnp.int32), with_weights=True)


def mixture(x: jax.Array, w13: Any, w2: Any) -> Any:
    return moe_mlp(x, IDS(), jnp.full((M, 2), 0.5, F32), w13, w2, with_weights=True)


LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "fp8_linear": (linear, ()),
    "grouped_linear": (grouped, (G,)),
    "expert_mlp": (experts, (G,)),
    "moe_mlp": (mixture, (G,)),
}
each_layer = pytest.mark.parametrize("name", list(LAYERS))


def masters(*lead: int, dtype: Any = F32) -> tuple[jax.Array, jax.Array]:
    w13 = normal(1, *lead, 2 * I, H, dtype=dtype, scale=H**-0.5)
    return w13, normal(2, *lead, H, I, dtype=dtype, scale=I**-0.5)


def batches(name: str) -> jax.Array:
    """NaN in the rows behind the last group."""
    x = normal(0, STEPS, M, H)
    return x.at[:, sum(SIZES) :].set(jnp.nan) if name in ("grouped_linear", "expert_mlp") else x


def loss(layer: Layer, weights: Any, x: jax.Array) -> Any:
    y, weights = layer(x, *weights)
    return jnp.mean(jnp.sin(y.astype(F32))), weights


def prepared(weights: Any) -> Any:
    return jax.tree.map(prepare_weight, weights)


def over_microbatches(layer: Layer, prepare: Callable[[Any], Any], weights: Any, xs: jax.Array) -> jax.Array:
    ready = prepare(weights)
    body = lambda total, x: (total + loss(layer, ready, x)[0], None)  # noqa: E731
    return jax.lax.scan(body, jnp.zeros((), F32), xs)[0]


def same_bits(got: Any, want: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert np.isfinite(np.asarray(one, np.float32)).all()
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.smoke
@each_layer
def test_bits_of_masters(name: str) -> None:
    """Value and gradients, in a scan over microbatches, with and without jax.checkpoint."""
    layer, lead = LAYERS[name]
    xs, weights = batches(name), masters(*lead)

    def run(layer: Layer, prepare: Any) -> Any:
        gradients = jax.value_and_grad(lambda w: over_microbatches(layer, prepare, w, xs))
        return program(gradients)(weights)

    want = run(layer, lambda w: w)
    same_bits(run(layer, prepared), want)
    same_bits(run(jax.checkpoint(layer), prepared), want)
    assert all(np.any(np.asarray(dw)) for dw in want[1])


def summed(layer: Layer, weights: Any, sums: Any, xs: jax.Array) -> Any:
    def body(sums: Any, x: jax.Array) -> Any:
        value, sums = accumulate_gradients(functools.partial(loss, layer), prepared(weights), sums, x)
        return sums, value

    return jax.lax.scan(body, sums, xs)


@pytest.mark.smoke
@each_layer
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, F32), (BF16, BF16)], ids=str)
def test_sums(name: str, dtypes: Any) -> None:
    """Sums that are not zero at first, in float32 and bfloat16, donated; 20 equal runs."""
    layer, lead = LAYERS[name]
    xs, weights = batches(name), masters(*lead, dtype=dtypes[0])
    start = jax.tree.map(lambda w: normal(9, *w.shape, dtype=dtypes[1], scale=1e-3), weights)
    gradient = program(jax.grad(lambda w, x: loss(layer, w, x)[0]))
    want = [np.asarray(one, np.float64) for one in start]
    for x in xs:
        wide = gradient(tuple(w.astype(F32) for w in weights), x)
        want = [one + np.asarray(dw, np.float64) for one, dw in zip(want, wide, strict=True)]
    run = program(functools.partial(summed, layer), donate_argnums=1)
    first = None
    for _ in range(20):
        sums, values = run(weights, jax.tree.map(jnp.array, start), xs)
        assert {one.dtype for one in sums} == {jnp.dtype(dtypes[1])}
        first = (sums, values) if first is None else first
        same_bits((sums, values), first)
    bound = 1e-5 if dtypes[1] == F32 else 2e-2
    for got, other in zip(first[0], want, strict=True):
        got = np.asarray(got, np.float64)
        assert np.linalg.norm(got - other) < bound * np.linalg.norm(other)
