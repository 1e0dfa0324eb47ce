"""Layers with FP4 weights: the bits of layers with the same weights in FP8, gradients too."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import Fp4Array, fp8_linear, grouped_linear, prepare_fp4, quantize
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.moe import (
    ExpertForm,
    SharedExperts,
    expert_mlp,
    moe_layer,
    moe_mlp,
    moe_mlp_decode,
    prepare_weights,
    route,
)
from jax_deepgemm.moe.checks import one_weight
from jax_deepgemm.quantization import dequantize_fp4, expand_fp4
from tests.shared.arrays import normal
from tests.shared.op_checks import make_mesh

pytestmark = pytest.mark.any_version

F32, E = jnp.float32, 4
H, I = 192, 320  # neither is whole blocks of 128
SIZES = jnp.array([3, 0, 4, 2], jnp.int32)


def small(seed: int, *shape: int) -> Fp4Array:
    q: Any = quantize(normal(seed, *shape, dtype=F32) / 12, (1, 32), jnp.float4_e2m1fn)
    return q


W13, W2 = small(0, E, 2 * I, H), small(1, E, H, I)
FP4, FP8 = prepare_weights(W13, W2), (expand_fp4(W13), expand_fp4(W2))
X, IDS = normal(2, 10, H), route(normal(3, 10, E, dtype=F32), 2)
BIASES = {"b13": normal(4, E, 2 * I, dtype=F32), "b2": normal(5, E, H, dtype=F32)}


def equal(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_decoding() -> None:
    """DeepSeek-V4's activation, with biases and scales of powers of two."""
    form = ExpertForm(Activation(limit=6.0), scale_format="ue8m0")

    @jax.jit
    def run(w13: Any, w2: Any) -> jax.Array:
        return moe_mlp_decode(X, *IDS, w13, w2, form=form, **BIASES)

    equal(run(*FP4), run(*FP8))


def test_gate_and_up_apart() -> None:
    """Two arrays, and one with a dimension more, are the same bytes."""
    gate, up = prepare_fp4(W13[:, :I]), prepare_fp4(W13[:, I:])
    equal(one_weight("test", (gate, up), ExpertForm()), FP4[0])
    stacked = prepare_fp4(jax.tree.map(lambda x: x.reshape(E, 2, I, -1), W13))
    equal(one_weight("test", stacked, ExpertForm()), FP4[0])
    assert SharedExperts(FP4[0][0], FP4[1][0]).stacked().w13.shape == (1, 2 * I, 256)
    equal(prepare_weights((W13[:, :I], W13[:, I:]), W2), FP4)


def test_gradients() -> None:
    """Of rows, routing weights and biases: through the expanded weights."""

    @jax.jit
    def gradients(w: Any) -> Any:
        def loss(x: jax.Array, weights: jax.Array, b13: jax.Array) -> jax.Array:
            y = expert_mlp(x, *w, SIZES, weights, b13=b13, form=ExpertForm(GPT_OSS))
            return jnp.sum(y.astype(F32)) + jnp.sum(grouped_linear(x, w[0], SIZES).astype(F32))

        return jax.value_and_grad(loss, (0, 1, 2))(X, IDS[1][:, 0], BIASES["b13"])

    equal(gradients(FP4), gradients(FP8))


def nvfp4(seed: int, *shape: int) -> Fp4Array:
    q: Any = quantize(normal(seed, *shape, dtype=F32) / 12, (1, 16), jnp.float4_e2m1fn)
    return q


def test_products_in_bfloat16() -> None:
    """The bits of layers with the weights in bfloat16, gradients too."""

    @jax.jit
    def run(w13: Any, w2: Any) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(moe_mlp(x, *IDS, w13, w2, recipe="bf16", **BIASES).astype(F32))

        few = moe_mlp_decode(X, *IDS, w13, w2, recipe="bf16", form=ExpertForm("gelu", weights_first=True))
        return *jax.value_and_grad(loss)(X), few

    equal(run(*FP4), run(*(dequantize_fp4(w, jnp.bfloat16) for w in (W13, W2))))


def test_gate_and_up_with_global_scales_of_their_own() -> None:
    gate, up, w2 = nvfp4(0, E, I, H), nvfp4(6, E, I, H), nvfp4(1, E, H, I)
    w13, _ = prepare_weights((gate, up), w2)
    y = grouped_linear(X, w13, SIZES, recipe="bf16")
    for part, columns in ((gate, y[:, :I]), (up, y[:, I:])):
        equal(columns, grouped_linear(X, prepare_fp4(part), SIZES, recipe="bf16"))
    with pytest.raises(ValueError, match="joined of parts with global scales of their own"):
        w13.fp4(H)


def test_linear() -> None:
    """fp8_linear, of a k that is no multiple of 128; its gradient expands the weight."""

    @jax.jit
    def run(w: Any) -> Any:
        return jax.value_and_grad(lambda x: jnp.sum(jnp.square(fp8_linear(x, w).astype(F32))))(X[None])

    equal(run(prepare_fp4(W13[0])), run(expand_fp4(W13[0])))


def test_experts_on_a_mesh() -> None:
    """Experts cut over one axis, their inner size over another: partial sums are added."""
    mesh = make_mesh("auto", (2, 2), ("expert", "tensor"))
    spec = jax.NamedSharding(mesh, P("expert", None, "tensor"))
    w13 = prepare_fp4(jax.tree.map(lambda x: x.reshape(E, 2, 256, -1), small(6, E, 512, H)))
    w2 = prepare_fp4(small(7, E, H, 256))
    cut13, cut2 = (jax.device_put(w, w.shardings(spec)) for w in (w13, w2))
    layer = functools.partial(moe_layer, mesh=mesh, expert_axis="expert", tensor_axis="tensor")
    x, ids, weights = X[:8], *(one[:8] for one in IDS)
    y, _ = jax.jit(layer)(x, ids, weights, cut13, cut2)
    want = jax.jit(moe_mlp)(x, ids, weights, w13, w2).astype(F32)
    np.testing.assert_allclose(y.astype(F32), want, atol=0.02 * float(jnp.abs(want).max()))


NVFP4 = nvfp4(0, E, 640, H)
PREPARE = "need it prepared for the kernels, once: jax_deepgemm.prepare_fp4"


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, f"{PREPARE}(w13)", lambda: moe_mlp(X, *IDS, W13, FP4[1])),
        (TypeError, f"{PREPARE}(w2)", lambda: moe_mlp_decode(X, *IDS, FP4[0], W2)),
        (TypeError, f"{PREPARE}(w)", lambda: grouped_linear(X, W13, SIZES)),
        (TypeError, "jax_deepgemm.prepare_fp4(w)", lambda: grouped_linear(X, tuple(W13), SIZES)),
        (
            ValueError,
            "need weight_layout='nk'",
            lambda: moe_mlp(X, *IDS, *FP4, form=ExpertForm(GPT_OSS, "kn")),
        ),
        (
            ValueError,
            "Use recipe='bf16'",
            lambda: moe_mlp(X, *IDS, *prepare_weights(nvfp4(0, E, 640, H), W2)),
        ),
        (TypeError, f"{PREPARE}(w13)", lambda: moe_mlp_decode(X, *IDS, NVFP4, FP4[1])),
        (TypeError, f"{PREPARE}(w)", lambda: fp8_linear(X, W13[0])),
        (TypeError, "Use bf16_gemm_nt", lambda: fp8_linear(X, prepare_fp4(nvfp4(0, 64, H)))),
        (ValueError, "with the same k", lambda: fp8_linear(X[:, :100], prepare_fp4(W13[0]))),
        (ValueError, "a frozen weight has no gradient", lambda: moe_mlp(X, *IDS, *FP4, with_weights=True)),
        (ValueError, "need x [m, k] and w", lambda: grouped_linear(X[:, :100], FP4[0], SIZES)),
        (
            ValueError,
            "w13 is [4, 640, 256] and w2 is [4, 192, 256]",
            lambda: moe_mlp(X, *IDS, FP4[0], prepare_fp4(small(0, E, H, 256))),
        ),
        (ValueError, "w is [640, 256], need [groups, n, k]", lambda: grouped_linear(X, FP4[0][0], SIZES)),
    ],
)
def test_refused(error: Any, text: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()
