"""Flax layers with FP4 weights: the numbers of layers with the same weights in bfloat16, or in FP8."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")
serialization = pytest.importorskip("flax.serialization")

from jax_deepgemm import PreparedFp4  # noqa: E402
from jax_deepgemm.activation import GPT_OSS  # noqa: E402
from jax_deepgemm.flax import Linear, MoE, QuantizedParam, named_shardings, quantize_module  # noqa: E402
from jax_deepgemm.moe import ExpertForm  # noqa: E402
from jax_deepgemm.quantization import dequantize_fp4, expand_fp4  # noqa: E402
from tests.shared.arrays import normal  # noqa: E402

pytestmark = pytest.mark.any_version

E2M1, F32 = jnp.float4_e2m1fn, jnp.float32
MXFP4, NVFP4 = (1, 32), (1, 16)


class Both(nnx.Module):
    def __init__(self, recipe: str) -> None:
        rngs = nnx.Rngs(0)
        self.first = Linear(96, 128, recipe=recipe, rngs=rngs)
        self.experts = MoE(128, 64, num_experts=4, top_k=2, recipe=recipe, rngs=rngs)

    def __call__(self, x: jax.Array, few: bool) -> jax.Array:
        h = self.first(x)
        return self.experts.decode(h) if few else self.experts(h)


def replaced(frozen: Both, change) -> Both:
    """The layers with other weights of the same numbers."""
    copy = nnx.merge(*nnx.split(frozen))
    for layer, names, k in ((copy.first, ("weight",), 96), (copy.experts, ("w13", "w2"), 128)):
        for name in names:
            w = getattr(layer, name).get_value()
            value = change(w, 64 if name == "w2" else k)
            param = nnx.Param if isinstance(value, jax.Array) else QuantizedParam
            setattr(layer, name, param(value))
    return copy


@functools.partial(nnx.jit, static_argnums=2)
def run(layer: Both, x: jax.Array, few: bool) -> jax.Array:
    return layer(x, few)


@pytest.mark.parametrize(("recipe", "block"), [("fp8", MXFP4), ("fp8", NVFP4)])
def test_layers(recipe: str, block: tuple[int, int]) -> None:
    """NVFP4 multiplies in bfloat16 whatever the recipe is."""
    frozen = quantize_module(Both(recipe), E2M1, block)
    assert isinstance(frozen.first.weight.get_value(), PreparedFp4)
    x = normal(0, 6, 96)
    if recipe == "fp8" and block == MXFP4:
        same = replaced(frozen, lambda w, k: expand_fp4(w, k=k))
    else:
        same = replaced(frozen, lambda w, k: dequantize_fp4(w.fp4(k), jnp.bfloat16))
        same.first.recipe = same.experts.recipe = "bf16"
    few = block == NVFP4
    got, want = (run(layer, x, few).astype(F32) for layer in (frozen, same))
    tolerance = 0.03 if few else 0  # the global scale is rounded with the weight there
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(jnp.abs(want).max()))


def test_state() -> None:
    """flax.serialization, shardings, and back to a master weight."""
    frozen = quantize_module(Linear(256, 128, sharding=P("x"), rngs=nnx.Rngs(0)), E2M1, NVFP4)
    w = frozen.weight.get_value()
    again = serialization.from_bytes(w, serialization.to_bytes(w))
    np.testing.assert_array_equal(again.slabs, w.slabs)
    assert again.activations == w.activations
    with pytest.raises(ValueError, match=r"a PreparedFp4 .* is to be restored from"):
        serialization.from_state_dict(w, {"slabs": w.slabs[:1]})
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = named_shardings(nnx.state(frozen), mesh)
    assert shardings["weight"].get_value().slabs.spec == P("x", None, None)
    with pytest.raises(ValueError, match=r"dequantize_fp4\(layer.weight.get_value\(\).fp4\(256\)"):
        frozen.to_nnx()
    frozen.weight = nnx.Param(dequantize_fp4(frozen.weight.get_value().fp4(256), F32))  # its way out
    assert frozen.to_nnx().kernel.shape == (256, 128)


def test_refused() -> None:
    form = ExpertForm(GPT_OSS, "kn")
    with pytest.raises(ValueError, match="need float8_e4m3fn and"):
        quantize_module(Linear(64, 64, rngs=nnx.Rngs(0)), E2M1)
    with pytest.raises(ValueError, match="n is 48, need a multiple of 64"):
        quantize_module(Linear(64, 48, rngs=nnx.Rngs(0)), E2M1, MXFP4)
    with pytest.raises(ValueError, match="whose scales lie along k"):
        quantize_module(MoE(64, 64, num_experts=2, top_k=1, form=form, rngs=nnx.Rngs(0)), E2M1, MXFP4)
