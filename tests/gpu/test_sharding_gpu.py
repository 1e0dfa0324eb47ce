"""Sharded GEMMs on several GPUs of one process against the same product on one of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg

M, N, K = 512, 768, 1024
CUTS = {  # dimension cut -> specs of A, B and D
    "m": (P("x", None), P(None, None), P("x", None)),
    "n": (P(None, None), P("x", None), P(None, "x")),
    "k": (P(None, "x"), P(None, "x"), P(None, None)),
}


@pytest.fixture(scope="module")
def devices():
    found = jax.devices("cuda")
    if len(found) < 2:
        pytest.skip("one GPU")
    return found[:2]


def operands():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (M, K), jnp.bfloat16), jax.random.normal(keys[1], (N, K), jnp.bfloat16)


def fp8(a, b, **options):
    return jdg.fp8_gemm_nt(jdg.quantize(a), jdg.quantize(b, (128, 128)), out_dtype=jnp.float32, **options)


def bf16(a, b, **options):
    return jdg.bf16_gemm_nt(a, b, out_dtype=jnp.float32, **options)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("gemm", [fp8, bf16])
def test_sharded_is_unsharded(devices, gemm, cut, kind):
    a, b = operands()
    want = np.asarray(jax.jit(gemm)(a, b))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=devices)
    spec_a, spec_b, spec_d = CUTS[cut]
    shards = jax.device_put(a, NamedSharding(mesh, spec_a)), jax.device_put(b, NamedSharding(mesh, spec_b))
    options = {"out_sharding": spec_d} if kind == AxisType.Explicit and cut == "k" else {}
    result_sharding = NamedSharding(mesh, spec_d)
    with jax.set_mesh(mesh):
        function = jax.jit(lambda *x: gemm(*x, **options), out_shardings=result_sharding)
        program = function.lower(*shards).compile()
        got = np.asarray(program(*shards))
    assert "jax_deepgemm_launch" in program.as_text()
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-6  # not 0: a shard may be split along k where the whole is not


@pytest.mark.parametrize("layer_input", ["cut", "replicated"])
def test_fp8_linear_gradients(devices, layer_input):
    x, w = operands()

    def loss(x, w):
        return (jdg.fp8_linear(x, w).astype(jnp.float32) ** 2).mean()

    want = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    spec = P("x", None) if layer_input == "cut" else P(None, None)
    weights = jax.device_put(w, NamedSharding(mesh, P("x", None)))
    sharded = jax.device_put(x, NamedSharding(mesh, spec)), weights
    got = jax.jit(jax.grad(loss, (0, 1)))(*sharded)
    for g, reference in zip(got, want, strict=True):
        g, reference = np.asarray(g, np.float32), np.asarray(reference, np.float32)
        assert np.linalg.norm(g - reference) <= 1e-2 * np.linalg.norm(reference)
