"""Experts over the GPUs of one host: the bits of one GPU, with both collectives.

Run: pytest -m gpu tests/gpu/test_moe_parallel_gpu.py        (2 GPUs or more; about 30 s)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_deepgemm import quantize
from jax_deepgemm.moe import SharedExperts, moe_layer, moe_mlp, route
from tests.shared.moe_oracle import normal, pull, random_ids, relative

BF16, F32 = jnp.bfloat16, jnp.float32
T, H, I, E, K = 512, 512, 256, 8, 3


def operands() -> list[jax.Array]:
    """x, weights, w13, w2."""
    return [
        normal(0, T, H),
        jax.nn.softmax(normal(1, T, K, dtype=F32)),
        normal(2, E, 2 * I, H, dtype=F32, scale=H**-0.5),
        normal(3, E, H, I, dtype=F32, scale=I**-0.5),
    ]


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_same_as_one_gpu(recipe, method):
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.sharding.Mesh(np.array(devices[:2]).reshape(1, 2), ("data", "expert"))
    ids = random_ids(0, T, K, E, dropped=0.1)

    def spread(x: jax.Array, *rest: Any) -> jax.Array:
        return moe_layer(x, ids, *rest, mesh=mesh, method=method, recipe=recipe)[0]

    got = pull(spread, *operands(), by=normal(4, T, H))
    want = pull(lambda x, *rest: moe_mlp(x, ids, *rest, recipe=recipe), *operands(), by=normal(4, T, H))
    np.testing.assert_array_equal(got[0], want[0])
    for one, other in zip(got[1:], want[1:], strict=True):
        assert relative(one, other) < (0.06 if recipe == "fp8" else 0.01)


@pytest.mark.parametrize("tokens", [("expert",), ("expert", "tensor")], ids=["whole", "cut"])
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_inner_size_over_two_gpus(recipe, tokens):
    """As on one GPU but for the rounding of its two parts, with a shared expert that is cut too."""
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    ids = random_ids(0, T, K, E, dropped=0.1)
    x, weights, w13, w2 = operands()
    shared = jax.tree.map(lambda w: w[0] / 2, (w13, w2))

    def layer(count: int) -> Any:
        mesh = jax.sharding.Mesh(np.array(devices[:count]).reshape(1, count), ("expert", "tensor"))
        options: dict[str, Any] = {
            "mesh": mesh,
            "tensor_axis": "tensor",
            "token_axes": tokens,
            "recipe": recipe,
        }

        def run(x: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array, shared: Any) -> jax.Array:
            apart = w13.reshape(E, 2, I, H)
            return moe_layer(x, ids, weights, apart, w2, shared=SharedExperts(*shared), **options)[0]

        return run

    one, other = (pull(layer(n), x, weights, w13, w2, shared, by=normal(4, T, H)) for n in (2, 1))
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert relative(got, want) < 0.01
    again = pull(layer(2), x, weights, w13, w2, shared, by=normal(4, T, H))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_frozen_weights_cut_over_two_gpus(method):
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    ids, (x, weights, w13, w2) = random_ids(0, T, K, E, dropped=0.1), operands()
    mesh = jax.sharding.Mesh(np.array(devices[:2]).reshape(1, 2), ("expert", "tensor"))
    frozen = [quantize(w, (128, 128)) for w in (w13.reshape(E, 2, I, H), w2)]
    cut = NamedSharding(mesh, PartitionSpec("expert", None, "tensor"))
    placed = [jax.device_put(q, q.shardings(cut)) for q in frozen]
    layer = jax.jit(functools.partial(moe_layer, mesh=mesh, tensor_axis="tensor", method=method))
    got, dropped = layer(x, ids, weights, *placed)
    assert int(dropped) == 0
    assert relative(got, jax.jit(moe_mlp)(x, ids, weights, *frozen)) < 0.01


@pytest.mark.smoke
def test_ties_go_to_the_lowest_id():
    """XLA's top_k kernels for GPUs keep the order of equal scores."""
    for experts, top_k in ((256, 8), (64, 6), (512, 32)):
        ids = jax.jit(lambda x, k=top_k: route(x, k)[0])(jnp.zeros((100, experts)))
        np.testing.assert_array_equal(ids, np.tile(np.arange(top_k), (100, 1)))
    coarse = jnp.round(normal(0, 300, 256, dtype=F32) * 2) / 2  # many ties
    options: dict[str, Any] = {"score": None, "num_groups": 8, "top_groups": 4}  # sums of pairs are exact
    ids = jax.jit(lambda x: route(x, 8, **options)[0])(coarse)
    want = route(jax.device_put(coarse, jax.devices("cpu")[0]), 8, **options)[0]
    np.testing.assert_array_equal(ids, want)
