"""Libraries that replace functions of JAX while a model runs, as qwix does, do not reach inside ops."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import dot_general

import jax_deepgemm


def _replacement(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a replaced function was called")


def replace_functions(patch: pytest.MonkeyPatch) -> None:
    """As qwix does: the code of plain functions, which names bound at import share, and attributes else."""
    for owner, name in (
        (jax.lax, "dot_general"),
        (jax.lax, "ragged_dot"),
        (jax.lax, "conv_general_dilated"),
        (jnp, "dot"),
        (jnp, "matmul"),
        (jnp, "einsum"),
    ):
        function = getattr(owner, name)
        if isinstance(function, types.FunctionType):
            patch.setattr(function, "__code__", _replacement.__code__)
        else:
            patch.setattr(owner, name, _replacement)


def _dot_general(x: jax.Array, y: jax.Array) -> jax.Array:
    return dot_general(x, y, (((1,), (0,)), ((), ())))


def test_the_patch_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """That test_every_call works under."""
    x = jnp.ones((2, 2))
    replace_functions(monkeypatch)
    for product in (_dot_general, jnp.dot, lambda x, y: jnp.einsum("ij,jk", x, y)):
        with pytest.raises(RuntimeError, match="a replaced function"):
            product(x, x)


def test_qwix_leaves_no_trace() -> None:
    """An eager call inside a quantised model, and the same call later: both as if there was no qwix."""
    qwix, nnx = pytest.importorskip("qwix"), pytest.importorskip("flax.nnx")
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((11, 40), (3, 24, 40)))
    sizes = jnp.array([4, 0, 6])
    products: dict[str, Callable[[], jax.Array]] = {
        "dense": lambda: jax_deepgemm.bf16_gemm_nt(x, w[0], out_dtype=jnp.float32),
        "grouped": lambda: jax_deepgemm.ragged_dot(x, w, sizes, rhs_layout="gnk"),
        "ragged": lambda: jax_deepgemm.ragged_dot(x.astype(jnp.float32), w.mT.astype(jnp.float32), sizes),
        "plain": lambda: jnp.dot(x.astype(jnp.float32), w[0].T.astype(jnp.float32)),
    }

    class Model(nnx.Module):
        def __call__(self, _: jax.Array) -> dict[str, jax.Array]:
            return {name: product() for name, product in products.items()}

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    inside = qwix.quantize_model(Model(), qwix.PtqProvider([rule]), x)(x)
    later = {name: product() for name, product in products.items()}
    assert not np.array_equal(inside.pop("plain"), later.pop("plain"))
    each = np.einsum("mk,gnk->gmn", np.asarray(x, np.float32), np.asarray(w, np.float32))
    rows = np.concatenate([each[0, :4], each[2, 4:10], np.zeros((1, 24), np.float32)])
    for got in (inside, later):
        np.testing.assert_allclose(got["dense"], each[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["ragged"], rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["grouped"].astype(jnp.float32), rows, rtol=1e-2, atol=1e-2)
