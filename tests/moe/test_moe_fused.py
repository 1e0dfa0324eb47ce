"""Which layers of experts run SwiGLU in the epilogue of their first GEMM, and that it changes no bit."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.moe import expert_mlp, moe_mlp, moe_mlp_decode
from jax_deepgemm.ops.grouped import gated
from tests.shared.arrays import normal

TOKENS, HIDDEN, EXPERTS, TOP_K = 11, 256, 4, 2
BLOCK = (128, 128)
FUSED = "fp8_gemm_swiglu"


@pytest.fixture(autouse=True)
def _traced_anew() -> Iterator[None]:
    yield
    jax.clear_caches()


@functools.cache
def operands(inner: int) -> tuple[Any, ...]:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (TOKENS, 1)), axis=1)[:, :TOP_K]
    w13, w2 = normal(2, EXPERTS, 2 * inner, HIDDEN), normal(3, EXPERTS, HIDDEN, inner)
    weights = jax.nn.softmax(normal(1, TOKENS, TOP_K, dtype=jnp.float32))
    frozen = jdg.quantize(w13, BLOCK), jdg.quantize(w2, BLOCK)
    return normal(0, TOKENS, HIDDEN), jnp.asarray(ids, jnp.int32), weights, *frozen


@pytest.mark.any_version
@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_features_in_whole_blocks_are_fused_and_keep_their_bits(layer, monkeypatch):
    given = operands(256)
    assert FUSED in str(jax.make_jaxpr(layer)(*given))
    got = layer(*given)
    monkeypatch.setattr(gated, "fits", lambda w13: False)
    jax.clear_caches()  # a layer's trace is kept
    assert FUSED not in str(jax.make_jaxpr(layer)(*given))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(layer(*given), np.float32))


@pytest.mark.any_version
@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_a_bias_of_the_first_product_is_fused_too(layer, monkeypatch):
    given, b13 = operands(256), normal(5, EXPERTS, 512)
    run = functools.partial(layer, b13=b13)
    assert f"{FUSED}_bias" in str(jax.make_jaxpr(run)(*given))
    got = run(*given)
    monkeypatch.setattr(gated, "fits", lambda w13: False)
    jax.clear_caches()
    assert FUSED not in str(jax.make_jaxpr(run)(*given))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(run(*given), np.float32))


@pytest.mark.any_version
@pytest.mark.parametrize("layer", [moe_mlp, moe_mlp_decode])
def test_other_features_are_not(layer):
    assert FUSED not in str(jax.make_jaxpr(layer)(*operands(192)))


def test_training_keeps_the_first_products_result():
    x, ids, weights, *frozen = operands(256)
    w13, w2 = (normal(4 + i, *w.shape) for i, w in enumerate(frozen))

    def loss(w13: jax.Array) -> jax.Array:
        return moe_mlp(x, ids, weights, w13, w2).astype(jnp.float32).sum()

    assert FUSED in str(jax.make_jaxpr(loss)(w13))  # alone it is inference
    assert FUSED not in str(jax.make_jaxpr(jax.grad(loss))(w13))


def test_expert_mlp_is_not_as_a_mesh_may_cut_its_experts():
    *_, w13, w2 = operands(256)
    rows, sizes = normal(0, 9, HIDDEN), jnp.array([3, 0, 4, 2], jnp.int32)
    assert FUSED not in str(jax.make_jaxpr(expert_mlp)(rows, w13, w2, sizes))
