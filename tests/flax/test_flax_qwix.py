"""Models that qwix quantises: its providers leave this package's layers as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
qwix = pytest.importorskip("qwix")

from jax_deepgemm.flax import Linear, MoE, quantize_module  # noqa: E402

RULE = {"module_path": ".*", "weight_qtype": "int8", "act_qtype": "int8"}
PROVIDERS = {
    "ptq": lambda: qwix.PtqProvider([qwix.QuantizationRule(**RULE)]),
    "ptq, no jit": lambda: qwix.PtqProvider([qwix.QuantizationRule(**RULE)], disable_jit=True),
    "qt": lambda: qwix.QtProvider([qwix.QtRule(**RULE)]),
    "lora": lambda: qwix.LoraProvider(module_path=".*", rank=4, alpha=1.0),
}


class Model(nnx.Module):
    """A layer of Flax, which qwix changes, beside layers of ours."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(128, 128, rngs=rngs)
        self.first = Linear(128, 128, recipe="fp8", rngs=rngs)
        self.moe = MoE(128, 128, num_experts=2, top_k=1, recipe="bf16", rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.moe(self.first(x)), self.dense(x)


@pytest.mark.parametrize("name", PROVIDERS)
def test_layers_are_left_alone_whatever_runs_first(name: str) -> None:
    rows = 9 + list(PROVIDERS).index(name)  # a shape of its own: everything is traced under qwix first
    x, model = jax.random.normal(jax.random.key(1), (rows, 128)), Model()
    quantized = qwix.quantize_model(model, PROVIDERS[name](), x, rngs=nnx.Rngs(1))
    for part in ("first", "moe"):
        state, want = nnx.state(getattr(quantized, part)), nnx.state(getattr(model, part))
        jax.tree.map(np.testing.assert_array_equal, state, want)
    y, dense = quantized(x)
    y_jit, _ = nnx.jit(lambda model, x: model(x))(quantized, x)
    want, want_dense = model(x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_allclose(y_jit, want, rtol=0.02, atol=0.02)
    if name == "lora":
        assert hasattr(quantized.dense, "kernel_lora_a")
    else:
        assert 1e-3 < float(jnp.abs(dense - want_dense).max()) < 0.2  # int8: qwix did run
    frozen = quantize_module(quantized)  # both kinds of frozen weights in one model
    assert frozen(x)[0].shape == (rows, 128)
