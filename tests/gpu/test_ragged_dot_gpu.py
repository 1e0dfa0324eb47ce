"""ragged_dot on a GPU: values and gradients against jax.lax's in float32, and what its program is made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm as jdg
from jax_deepgemm import ragged_dot, ragged_dot_general
from tests.shared.gpu_programs import program

BF16, F32 = jnp.bfloat16, jnp.float32
CALL = "jax_deepgemm_launch"

SHAPES = {
    "tail": (520, 256, 192, (100, 0, 257, 130)),
    "one group": (256, 128, 128, (0, 256, 0)),
    "few rows": (7, 512, 264, (1, 0, 3, 1, 2)),
    "odd": (129, 72, 40, (1, 127)),
}
CONTRACTION = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def operands(m: int, k: int, n: int, sizes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    """Rows of no group are NaN."""
    keys = jax.random.split(jax.random.key(seed))
    lhs = jax.random.normal(keys[0], (m, k), BF16)
    lhs = jnp.where(jnp.arange(m)[:, None] < sum(sizes), lhs, jnp.nan)
    return [lhs, jax.random.normal(keys[1], (len(sizes), k, n), BF16), jnp.array(sizes, jnp.int32)]


def plain(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """In float32."""
    return lax.ragged_dot(lhs.astype(F32), rhs.astype(F32), sizes, precision="highest")


exact = program(plain)


def close(got: jax.Array, expected: jax.Array, tolerance: float) -> None:
    assert got.shape == expected.shape
    x, y = (np.asarray(one).astype(np.float64) for one in (got, expected))
    assert np.isfinite(x).all()
    assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-30)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape: Any) -> None:
    lhs, rhs, sizes = operands(*shape)
    m, _, n, _ = shape
    dd = jax.random.normal(jax.random.key(9), (m, n), BF16)

    def all_of(function: Any, lhs: jax.Array, rhs: jax.Array) -> Any:
        d, back = jax.vjp(lambda *x: function(*x, sizes), lhs, rhs)
        return d, *back(dd.astype(d.dtype))

    d, dlhs, drhs = program(functools.partial(all_of, ragged_dot))(lhs, rhs)
    inside = jnp.where(jnp.arange(m)[:, None] < sizes.sum(), lhs, 0)  # XLA's expansion multiplies by 0
    expected = program(functools.partial(all_of, plain))(inside, rhs)
    for got, want in zip((d, dlhs, drhs), expected, strict=True):
        assert got.dtype == BF16
        close(got, want, 2**-7)
    close(ragged_dot(lhs, rhs, sizes, None, F32), expected[0], 1e-5)


def test_stored_k_last_contraction_and_batch() -> None:
    lhs, rhs, sizes = operands(*SHAPES["tail"])
    lhs = jnp.nan_to_num(lhs)
    close(ragged_dot(lhs, rhs.mT, sizes, None, F32, rhs_layout="gnk"), exact(lhs, rhs, sizes), 1e-5)
    dw = ragged_dot_general(lhs, lhs[:, :64], sizes, CONTRACTION, None, F32)
    left = lhs.astype(F32)
    of_k = program(lambda x, y: lax.ragged_dot_general(x, y, sizes, CONTRACTION, "highest"))
    close(dw, of_k(left, left[:, :64]), 1e-5)
    several = jnp.stack([sizes, sizes[::-1], jnp.zeros_like(sizes)])
    every = [jnp.stack([x, x, x]) for x in (lhs, rhs)]
    for axes, pair in (((None, None, 0), (lhs, rhs)), ((0, None, 0), (every[0], rhs)), ((0, 0, 0), every)):
        got = jax.jit(jax.vmap(lambda *x: ragged_dot(*x, None, F32), axes))(*pair, several)
        for i in range(3):
            close(got[i], exact(lhs, rhs, several[i]), 1e-5)


@pytest.mark.smoke
def test_group_offset() -> None:
    lhs, rhs, sizes = operands(*SHAPES["tail"])
    whole = ragged_dot(lhs, rhs, sizes)
    part = jax.jit(lambda w, o: ragged_dot(lhs, w, sizes, group_offset=o))
    total = part(rhs[:1], jnp.int32(0)) + part(rhs[1:], jnp.array([1]))
    np.testing.assert_array_equal(np.asarray(total), np.asarray(whole))


def test_quantised() -> None:
    lhs, rhs, sizes = operands(*SHAPES["tail"])
    left, right = jdg.quantize(jnp.nan_to_num(lhs), (1, 128)), jdg.quantize(rhs.mT, (128, 128))
    expected = exact(jdg.dequantize(left, F32), jdg.dequantize(right, F32).mT, sizes)
    close(ragged_dot(left, right, sizes, None, F32, rhs_layout="gnk"), expected, 1e-3)
    stored = jdg.QuantizedArray(right.values.mT, right.scales.mT, right.block)
    close(ragged_dot(left, stored, sizes, None, F32, allow_transpose=True), expected, 1e-3)


def test_other_dtypes_run_on_xla() -> None:
    lhs, rhs, sizes = (x.astype(F32) if x.ndim > 1 else x for x in operands(*SHAPES["one group"]))
    close(ragged_dot(lhs, rhs, sizes, "highest"), exact(lhs, rhs, sizes), 1e-5)
    got = jax.vmap(lambda *x: ragged_dot(*x, "highest"), (None, None, 0))(lhs, rhs, jnp.stack([sizes, sizes]))
    close(got[1], exact(lhs, rhs, sizes), 1e-5)


@pytest.mark.smoke
def test_program_is_custom_calls_without_an_expansion() -> None:
    m, k, n, _ = SHAPES["tail"]
    lhs, rhs, sizes = operands(*SHAPES["tail"])

    def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return ragged_dot(lhs, rhs, sizes).astype(F32).sum()

    hlo = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(lhs, rhs).compile().as_text()
    assert hlo.count(f'custom_call_target="{CALL}"') == 3
    assert " dot(" not in hlo
    assert "cublas" not in hlo
    for rows in ((4, m, k), (m, 4, k), (4, m, n)):  # what an expansion would hold
        assert f"[{','.join(map(str, rows))}]" not in hlo
