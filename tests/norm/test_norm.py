"""Norms of rows as ops: against float64, in FP8 against `quantize`, under every transformation; layers that
use them; errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import fp8_linear, inference, quantize
from jax_deepgemm.ops.norm import norm_rows
from jax_deepgemm.ops.norm.op import norm_op
from jax_deepgemm.ops.norm.problem import MOST_FEATURES, NormForm
from tests.shared import inference_oracle as oracle
from tests.shared import op_checks
from tests.shared.arrays import normal, normals
from tests.shared.op_checks import OpCase, Shard

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def bits(x: Any) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_norms_of_sums(kind: str, dtype: Any) -> None:
    """Of any number of leading dimensions, vectors in types of their own, a mean that is large; h drawn."""
    h = int(np.random.default_rng(len(kind)).integers(100, 300))
    x, residual = (oracle.drawn(i, 2, 3, h, dtype=dtype) + np.asarray(8 - i, dtype) for i in range(2))
    bias, gamma, beta = (oracle.drawn(3 + i, h, dtype=(dtype, F32, F16)[i]) for i in range(3))
    form = {"kind": kind, "residual": residual, "bias": bias, "eps": 1e-3}
    y, s = jax.jit(lambda x: inference.norm(x, gamma, beta, return_sum=True, **form))(x)
    want = (x.astype(F32) + residual.astype(F32) + bias.astype(F32)).astype(dtype)
    np.testing.assert_array_equal(bits(s), bits(want))
    given = oracle.wide(want), oracle.wide(gamma)
    if kind == "rms":
        oracle.close(y, oracle.rms_norm(*given, 1e-3) + oracle.wide(beta))
    else:
        oracle.close(y, oracle.layer_norm(*given, oracle.wide(beta), 1e-3))
    assert y.dtype == s.dtype == dtype


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_fp8_has_the_bits_of_quantize(scale_format: str) -> None:
    x = normal(0, 2, 5, 333).at[0, 0, 7].set(jnp.inf).at[1, 1, 3].set(jnp.nan).at[1, 2].multiply(1e-3)
    gamma = normal(1, 333, dtype=F32)
    form = {"residual": x, "return_sum": True}
    q, s = jax.jit(lambda x: inference.norm_fp8(x, gamma, scale_format=scale_format, **form))(x)
    y, total = jax.jit(lambda x: inference.norm(x, gamma, **form))(x)
    want = quantize(y, scale_format=scale_format)
    assert (q.block, q.scales.shape) == ((1, 128), (2, 5, 3))
    np.testing.assert_array_equal(bits(q.values), bits(want.values))
    np.testing.assert_array_equal(q.scales, want.scales)
    np.testing.assert_array_equal(bits(s), bits(total))


def test_rows_that_no_kernel_holds() -> None:
    x = normal(0, 2, MOST_FEATURES + 1, dtype=F32)
    q, s = inference.norm_fp8(x, kind="rms", residual=x, return_sum=True)
    y, _ = inference.norm(x, kind="rms", residual=x, return_sum=True)
    oracle.close(y, oracle.rms_norm(oracle.wide(x + x)), 8)
    np.testing.assert_array_equal(bits(q.values), bits(quantize(y).values))
    np.testing.assert_array_equal(s, x + x)
    lone = norm_rows(x[0], None, (None, None, None), kind="rms", eps=1e-5, scales="f32", normed=False)
    np.testing.assert_array_equal(lone[1], quantize(inference.norm(x, kind="rms")).scales[0])


def test_layers_with_fp8_weights_are_their_calls_in_a_row() -> None:
    """Products, norms, and gradients of all operands of the norm; sums of those have orders of their own."""
    x, residual = normal(0, 2, 3, 256), normal(1, 2, 3, 256)
    gamma, beta, bias = normals(2, (256,), (256,), (256,))
    w = quantize(normal(3, 128, 256), (128, 128))
    w2 = normal(4, 64, 128)

    def apart(x: Any, residual: Any, gamma: Any, beta: Any, bias: Any) -> Any:
        z = inference.norm(x, gamma, beta, residual=residual, bias=bias)
        of_mlp, s = inference.norm(x, gamma, beta, residual=residual, bias=bias, return_sum=True)
        inner = jax.nn.relu(fp8_linear(of_mlp, w, out_dtype=F32)).astype(z.dtype)
        return fp8_linear(z, w), z, inference.linear(inner, w2, w_layout="nk"), s

    def joined(x: Any, residual: Any, gamma: Any, beta: Any, bias: Any) -> Any:
        form = {"gamma": gamma, "beta": beta, "residual": residual, "residual_bias": bias, "w_layout": "nk"}
        y, z = inference.norm_linear(x, w, **form)
        return y, z, *inference.mlp(x, w, w2, act="relu", norm="layer", returns="sum", **form)

    given = x, residual, gamma, beta, bias

    @functools.partial(jax.jit, static_argnums=0)
    def both(function: Any, *given: Any) -> Any:
        results, pull = jax.vjp(function, *given)
        return results, pull(results)

    pairs = zip(*(jax.tree.leaves(both(one, *given)) for one in (joined, apart)), strict=True)
    for got, want in pairs:
        oracle.close(got, oracle.wide(want), 1 if got.dtype == BF16 else 512)


@pytest.mark.any_version
def test_launches() -> None:
    """A sum and its norm are one kernel, an FP8 product two; a norm alone is XLA's."""
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    x, w = jax.ShapeDtypeStruct((4, 64, 256), BF16), jax.eval_shape(quantize, jnp.zeros((128, 256)))

    def launches(function: Any, *given: Any) -> int:
        lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@jax_deepgemm_launch(")

    assert launches(inference.norm, x) == 0
    assert launches(lambda x: inference.norm(x, residual=x), x) == 0
    assert launches(lambda x: inference.norm(x, residual=x, return_sum=True), x) == 1
    assert launches(lambda x: inference.norm_fp8(x, bias=x[0, 0], return_sum=True)[0].values, x) == 1
    assert launches(lambda x, w: inference.norm_linear(x, w, w_layout="nk"), x, w) == 2


# Transformations --------------------------------------------------------------------------------------------

FORM = NormForm("layer", residual=True, gamma=True, beta=True, summed=True)
FP8 = NormForm("rms", gamma=True, normed=False, scales="f32")


def run(form: NormForm, *arrays: jax.Array, out_sharding: Any = None) -> tuple[jax.Array, ...]:
    return tuple(norm_op(form)(*arrays, eps=1e-5, dtype=arrays[0].dtype, out_sharding=out_sharding))


def plain(x: jax.Array, residual: jax.Array, gamma: jax.Array, beta: jax.Array) -> tuple[jax.Array, ...]:
    s = x + residual
    apart = s - s.mean(-1, keepdims=True)
    return apart / jnp.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta, s


CASES = [
    OpCase(
        "sum",
        functools.partial(run, FORM),
        lambda seed: normals(seed, (8, 24), (8, 24), (24,), (24,)),
        nests=(((0, 0, None, None),), ((1, 0, 0, None),)),
        shards=(
            Shard((P("x"), P("x"), P(), P()), (P("x"), P("x")), modes=("auto", "explicit", "shard_map")),
            Shard((P(None, "y"), P(), P(), P()), (P(), P()), ("all-gather",)),
        ),
        plain=plain,
        wrt=(0, 1, 2, 3),
        grad_tolerance=1e-4,
    ),
    OpCase(
        "norm",
        lambda x, gamma: run(NormForm("rms", gamma=True), x, gamma)[0],
        lambda seed: normals(seed, (4, 24), (24,)),
        plain=lambda x, gamma: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma,
        wrt=(0, 1),
        second=True,
        grad_tolerance=1e-4,
    ),
    OpCase(
        "fp8",
        functools.partial(run, FP8),
        lambda seed: normals(seed, (8, 256), (256,)),
        shards=(Shard((P(("x", "y")), P()), (P(("x", "y")), P(("x", "y")))),),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Any) -> None:
    check()


# Errors -----------------------------------------------------------------------------------------------------

X = jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: inference.norm_fp8(X, scale_format="f8"), ValueError, "scale_format is 'f8', need 'f32'"),
        (
            lambda: inference.norm_fp8(X[0]),
            ValueError,
            r"x is \[4\], need \[.., rows, h\].*norm_fp8\(x\[None\]",
        ),
        (lambda: inference.norm_fp8(X, X[0, :3]), ValueError, r"gamma is \[3\], need \[4\]"),
        (lambda: inference.norm_fp8(X, kind="l2"), ValueError, "kind is 'l2', need one of 'layer', 'rms'"),
        (lambda: inference.norm_fp8(X, residual=X.astype(BF16)), TypeError, "residual is .*need float32"),
        (
            lambda: jax.grad(lambda x: inference.norm_fp8(x).scales.sum())(X),
            NotImplementedError,
            "norm, with",
        ),
    ],
)
def test_errors(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.any_version
def test_forms_have_names() -> None:
    assert str(dataclasses.replace(FORM, scales="ue8m0")) == "layer_residual_gamma_beta_normed_summed_ue8m0"
