"""Experts over the GPUs of one host: the bits of one GPU, with both collectives.

Run: pytest -m gpu tests/gpu/test_moe_parallel_gpu.py        (2 GPUs or more; about 30 s)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.moe import moe_layer, moe_mlp, route
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
