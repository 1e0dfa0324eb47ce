"""Operands that are no arrays yet: wrappers that know how to become one, (values, scales), qwix arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.quantization import from_qwix
from tests.shared.arrays import normal

BF16, F32 = jnp.bfloat16, jnp.float32


class Wrapper:
    """As flax.nnx.Param: knows the array's shape and dtype, and is none."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "value"), name)

    def __jax_array__(self) -> Any:
        return self.value


def param(value: Any) -> Any:
    """A flax.nnx.Param where flax is installed."""
    try:
        from flax import nnx
    except ImportError:
        return Wrapper(value)
    return nnx.Param(value)


X, W, G = normal(0, 8, 256), normal(1, 24, 256), normal(2, 3, 24, 256)
Y = normal(3, 8, 24)
SIZES = jnp.array([3, 0, 5], jnp.int32)
QX, QW, QG = jdg.quantize(X), jdg.quantize(W, (128, 128)), jdg.quantize(G, (128, 128))

PRODUCTS: dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]] = {
    "bf16_gemm_nt": (jdg.bf16_gemm_nt, (X, W, Y)),
    "bf16_gemm_nn": (jdg.bf16_gemm_nn, (X, W.T)),
    "bf16_gemm_tn": (jdg.bf16_gemm_tn, (X.T, W.T)),
    "bf16_gemm_tt": (jdg.bf16_gemm_tt, (X.T, W)),
    "fp8_gemm_nt": (lambda *p: jdg.fp8_gemm_nt(p[:2], p[2:]), (QX.values, QX.scales, QW.values, QW.scales)),
    "fp8_linear": (jdg.fp8_linear, (X, W)),
    "grouped_linear": (jdg.grouped_linear, (X, G, SIZES)),
    "grouped_linear bf16": (lambda *p: jdg.grouped_linear(*p, recipe="bf16"), (X, G, SIZES)),
    "ragged_dot": (jdg.ragged_dot, (X, G.mT, SIZES)),
    "ragged_dot float32": (jdg.ragged_dot, (X.astype(F32), G.mT.astype(F32), SIZES)),
    "m_grouped": (jdg.m_grouped_bf16_gemm_nt_contiguous, (X, G, SIZES)),
    "masked": (
        lambda *p: jdg.m_grouped_bf16_gemm_nt_masked(*p, zero_rows=True),
        (jnp.stack([X] * 3), G, SIZES),
    ),
    "k_grouped": (jdg.k_grouped_bf16_gemm_tn_contiguous, (X, Y, SIZES)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_wrapped_arrays_are_operands(name: str) -> None:
    function, arrays = PRODUCTS[name]
    got, want = function(*map(param, arrays)), function(*arrays)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_a_wrapped_weight_is_traced_as_the_array() -> None:
    """Inside jit, where the wrapper holds a tracer."""
    got = jax.jit(lambda x, w: jdg.bf16_gemm_nt(x, Wrapper(w)))(X, W)
    np.testing.assert_array_equal(got, jdg.bf16_gemm_nt(X, W))


def test_quantized_arrays_in_wrappers() -> None:
    quantized = jdg.QuantizedArray(Wrapper(QW.values), Wrapper(QW.scales), QW.block)
    want = jdg.fp8_gemm_nt(QX, QW)
    for b in (quantized, Wrapper(QW)):
        np.testing.assert_array_equal(jdg.fp8_gemm_nt(QX, b), want)


def test_what_refuses_to_be_an_array_stays_as_it_is() -> None:
    assert unwrapped(QX) is QX
    with pytest.raises(TypeError, match="a is a QuantizedArray"):
        jdg.bf16_gemm_nt(QX, W)


# (values, scales)


def test_layers_take_values_and_scales() -> None:
    for quantized, layer in (
        (QW, lambda w: jdg.fp8_linear(X, w)),
        (QG, lambda w: jdg.grouped_linear(X, w, SIZES)),
    ):
        pair = (quantized.values, quantized.scales)
        np.testing.assert_array_equal(layer(pair), layer(quantized))
        np.testing.assert_array_equal(layer(tuple(map(param, pair))), layer(quantized))


def test_a_frozen_tuple_has_the_gradient_of_x() -> None:
    grad = jax.grad(lambda x, w: jdg.fp8_linear(x, w).astype(F32).sum())
    np.testing.assert_array_equal(grad(X, (QW.values, QW.scales)), grad(X, QW))


# qwix


@pytest.fixture
def qarray() -> Callable[[jdg.QuantizedArray], Any]:
    qwix = pytest.importorskip("qwix")
    return lambda q: qwix.QArray(qvalue=q.values, scale=q.scales)


def square(seed: int) -> jax.Array:
    """Whole blocks, which is what qwix has."""
    return normal(seed, 128, 256)


def test_a_qwix_array_is_told_how_to_come_in(qarray: Any) -> None:
    w = qarray(jdg.quantize(square(4), (128, 128)))
    experts = qarray(jdg.quantize(jnp.stack([square(4)] * 3), (128, 128)))
    calls = {
        "fp8_gemm_nt: b": lambda: jdg.fp8_gemm_nt(QX, w),
        "bf16_gemm_nt: b": lambda: jdg.bf16_gemm_nt(X, w),
        "fp8_linear: w": lambda: jdg.fp8_linear(X, w),
        "grouped_linear: w": lambda: jdg.grouped_linear(X, experts, SIZES),
        "ragged_dot: rhs": lambda: jdg.ragged_dot(X, experts, SIZES),
    }
    for where, call in calls.items():
        with pytest.raises(TypeError, match=rf"{where} is a .*QArray.*") as caught:
            call()
        assert "bfloat16 [128" not in str(caught.value)
        assert ("fp8_gemm_nt" if where.startswith("bf16") else "from_qwix(") in str(caught.value)
    np.testing.assert_array_equal(
        jdg.fp8_gemm_nt(QX, from_qwix(w)), jdg.fp8_gemm_nt(QX, jdg.quantize(square(4), (128, 128)))
    )
