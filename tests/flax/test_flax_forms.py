"""MoE layers built as other models have them: what is stored, and that the functions see it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.activation import GPT_OSS
from jax_deepgemm.moe import ExpertForm, moe_mlp

nnx = pytest.importorskip("flax.nnx")
from jax_deepgemm.flax import MoE, prepared_weights  # noqa: E402 - where there is Flax

X = jax.random.normal(jax.random.key(0), (12, 128), jnp.bfloat16)
FORMS = {
    "gpt-oss": (ExpertForm(GPT_OSS, "kn"), (4, 128, 256), (4, 128, 128)),
    "relu2": (ExpertForm("relu2"), (4, 128, 128), (4, 128, 128)),
    "gelu, powers of two": (ExpertForm("gelu", scale_format="ue8m0"), (4, 256, 128), (4, 128, 128)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    form, w13, w2 = FORMS[name]
    layer = MoE(128, 128, num_experts=4, top_k=2, form=form, rngs=nnx.Rngs(0))
    assert (layer.w13.shape, layer.w2.shape) == (w13, w2)
    ids, weights = layer._route(X)
    want = moe_mlp(X, ids, weights, layer.w13.get_value(), layer.w2.get_value(), form=form)
    np.testing.assert_array_equal(layer(X).astype(jnp.float32), want.astype(jnp.float32))
    with prepared_weights(layer):
        np.testing.assert_array_equal(layer(X).astype(jnp.float32), want.astype(jnp.float32))
    apart = np.abs(layer.decode(X).astype(np.float32) - np.asarray(want, np.float32)).max()
    assert apart < 0.02 * np.abs(np.asarray(want, np.float32)).max()


def test_gate_and_up_are_drawn_for_themselves_whatever_their_order():
    """The same numbers, in turns and turned."""
    plain = MoE(128, 128, num_experts=4, top_k=2, rngs=nnx.Rngs(0)).w13.get_value()
    other = MoE(128, 128, num_experts=4, top_k=2, form=FORMS["gpt-oss"][0], rngs=nnx.Rngs(0)).w13.get_value()
    np.testing.assert_array_equal(np.concatenate([other[..., 0::2], other[..., 1::2]], axis=2).mT, plain)


def test_a_shared_expert_is_a_swiglu():
    with pytest.raises(ValueError, match=r"MoE: shared_intermediate is 128.*leave shared_intermediate out"):
        MoE(128, 128, 4, 2, shared_intermediate=128, form=ExpertForm("relu2"), rngs=nnx.Rngs(0))
