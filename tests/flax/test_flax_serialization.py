"""QuantizedArray in flax.serialization, whatever was imported first."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
serialization = pytest.importorskip("flax.serialization")

from jax_deepgemm import QuantizedArray, quantize  # noqa: E402
from jax_deepgemm.flax import Linear, quantize_module  # noqa: E402


def quantized(block=(128, 128)) -> QuantizedArray:
    return quantize(jax.random.normal(jax.random.key(0), (200, 256)), block)


def assert_same(a: QuantizedArray, b: QuantizedArray) -> None:
    assert a.block == b.block
    for x, y in ((a.values, b.values), (a.scales, b.scales)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
def test_bytes_and_state_dicts_round_trip(block) -> None:
    tree = {"w": quantized(block), "step": jnp.int32(3)}
    back = serialization.from_bytes(tree, serialization.to_bytes(tree))
    assert_same(back["w"], tree["w"])
    assert_same(serialization.from_state_dict(tree, serialization.to_state_dict(tree))["w"], tree["w"])


def test_the_state_of_a_quantised_module_round_trips() -> None:
    state = nnx.to_pure_dict(nnx.state(quantize_module(Linear(256, 128, rngs=nnx.Rngs(0)))))
    assert_same(serialization.from_bytes(state, serialization.to_bytes(state))["weight"], state["weight"])


def test_what_does_not_fit_the_target_is_refused() -> None:
    saved = serialization.to_bytes({"w": quantized()})
    with pytest.raises(ValueError, match="scales"):
        serialization.from_bytes({"w": quantized((1, 128))}, saved)
    with pytest.raises(ValueError, match=r"from \['kernel'\], need values and scales"):
        serialization.from_state_dict(quantized(), {"kernel": np.ones(3)})


@pytest.mark.parametrize("first", ["flax.serialization", "jax_deepgemm.flax"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    second = "jax_deepgemm.flax, flax.serialization" if first != "flax.serialization" else "jax_deepgemm"
    script = (
        f"import {first}\nimport {second}\n"
        "from jax_deepgemm import QuantizedArray\n"
        "print(flax.serialization.is_serializable(QuantizedArray))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
