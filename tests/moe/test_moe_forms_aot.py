"""Weights of another layout compiled for an H200 on a machine without any: nothing turns them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import grouped_linear
from jax_deepgemm.activation import GPT_OSS
from jax_deepgemm.moe import ExpertForm, moe_mlp
from tests.gemm.test_aot import devices, pytestmark  # noqa: F401 - skips where there is no GPU compiler

F32 = jnp.float32
T, E, K, H, I, N = 1024, 16, 2, 512, 384, 640
SHAPE = re.compile(r"= \(*\w+\[16,(\d+),(\d+)\]\S* (\w[\w-]*)\(")


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_no_weight_is_turned_or_copied(recipe, layout):
    """Of the arrays with a weight's shape only masters, casts, kernels and gradients are left."""

    def loss(
        x: jax.Array, ids: jax.Array, weights: jax.Array, w13: jax.Array, w2: jax.Array, w: jax.Array
    ) -> jax.Array:
        y = moe_mlp(x, ids, weights, w13, w2, recipe=recipe, form=ExpertForm(GPT_OSS, layout))
        z = grouped_linear(x, w, jnp.bincount(ids[:, 0], length=E), recipe=recipe, weight_layout=layout)
        return jnp.sum(jnp.sin(y.astype(F32))) + jnp.sum(jnp.sin(z.astype(F32)))

    sizes = ((2 * I, H), (H, I), (N, H))
    stored = [(E, *size) if layout == "nk" else (E, *reversed(size)) for size in sizes]
    types = [((T, H), jnp.bfloat16), ((T, K), jnp.int32), ((T, K), F32), *((shape, F32) for shape in stored)]
    where = NamedSharding(Mesh(devices()[:1], ("x",)), P())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in types]
    hlo = jax.jit(jax.grad(loss, (0, 2, 3, 4, 5))).lower(*args).compile().as_text()
    wide = {frozenset(size) for size in sizes}
    found = {what for a, b, what in SHAPE.findall(hlo) if {int(a), int(b)} in wide}
    assert "custom-call" in found or "fusion" in found
    assert not found & {"transpose", "copy", "copy-start", "concatenate", "dot", "pad"}, found
