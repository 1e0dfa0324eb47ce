"""MoE layers built as other models have them: what is stored, and that the functions see it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.activation import GPT_OSS
from jax_deepgemm.moe import ExpertForm, SharedExperts, moe_mlp

nnx = pytest.importorskip("flax.nnx")
from jax_deepgemm.flax import MoE, prepared_weights  # noqa: E402 - where there is Flax

pytestmark = pytest.mark.any_version

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


@pytest.mark.parametrize("form", [ExpertForm("relu2"), ExpertForm(GPT_OSS, "kn")], ids=["relu2", "gpt-oss"])
def test_a_shared_expert_with_a_gate_has_the_activation_of_the_others(form):
    options = {"shared_intermediate": 256, "shared_gate": True, "form": form, "recipe": "bf16"}
    layer = MoE(128, 128, num_experts=4, top_k=2, **options, rngs=nnx.Rngs(0))
    weights = [linear.weight.get_value() for linear in (layer.shared.w13, layer.shared.w2)]
    if form.weight_layout == "kn":
        weights = [w.T for w in weights]
    shared = SharedExperts(*weights, gate=layer.shared_gate.get_value())
    routed = *layer._route(X), layer.w13.get_value(), layer.w2.get_value()
    want = np.asarray(moe_mlp(X, *routed, shared=shared, form=form, recipe="bf16"), np.float32)
    np.testing.assert_allclose(np.asarray(layer(X), np.float32), want, atol=0.02 * np.abs(want).max())
    gradients = nnx.grad(lambda layer: jnp.sum(layer(X).astype(jnp.float32) ** 2))(layer)
    assert gradients["shared_gate"].shape == (128,)
    assert float(jnp.abs(gradients["shared_gate"][...]).sum()) > 0


def test_shared_experts_behind_the_others():
    layer = MoE(128, 128, num_experts=3, top_k=2, shared_experts=1, recipe="bf16", rngs=nnx.Rngs(0))
    assert (layer.gate.shape, layer.w13.shape, layer.w2.shape) == ((3, 128), (4, 256, 128), (4, 128, 128))
    routed = *layer._route(X), layer.w13.get_value(), layer.w2.get_value()
    want = np.asarray(moe_mlp(X, *routed, shared=1, recipe="bf16"), np.float32)
    y, load = layer(X, with_load=True)
    np.testing.assert_array_equal(np.asarray(y, np.float32), want)
    assert load.tokens.shape == (3,)
    np.testing.assert_allclose(np.asarray(layer.decode(X), np.float32), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_gate": True}, r"shared_intermediate is 0, need the width.*shared_intermediate="),
        (
            {"shared_experts": 1, "expert_axis": "expert"},
            r"shared_experts is 1 and expert_axis is 'expert'.*shared_intermediate=",
        ),
        ({"tensor_axis": "tensor"}, r"expert_axis is None, need an axis of the experts too"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(128, 128, 4, 2, **options, rngs=nnx.Rngs(0))
