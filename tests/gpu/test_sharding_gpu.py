"""Sharded GEMMs on several GPUs of one process against the same product on one of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import moe
from tests.shared.moe_oracle import random_ids

M, N, K = 512, 768, 1024
CUTS = {  # dimension cut -> specs of A, B and D
    "m": (P("x", None), P(None, None), P("x", None)),
    "n": (P(None, None), P("x", None), P(None, "x")),
    "k": (P(None, "x"), P(None, "x"), P(None, None)),
}


def gpus(count):
    found = jax.devices("cuda")
    if len(found) < count:
        pytest.skip(f"{len(found)} GPUs, need {count}")
    return found[:count]


@pytest.fixture(scope="module")
def devices():
    return gpus(2)


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


# Grouped -------------------------------------------------------------------------------------------------

ROWS, GROUPS = 600, 4  # of 4 devices each has 150 rows, so that cuts fall inside groups
SIZES = np.array([100, 0, 331, 99], np.int32)
F32 = jnp.float32


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def m_operands():
    return normal(0, ROWS, K), normal(1, GROUPS, N, K), jnp.asarray(SIZES)


def masked_operands():
    return normal(0, GROUPS, 152, K), normal(1, GROUPS, N, K), jnp.asarray(SIZES // 3)


def k_operands():
    return normal(0, ROWS, N), normal(1, ROWS, K), jnp.asarray(SIZES)


def m_fp8(a, b, sizes, **options):
    a, b = jdg.quantize(a), jdg.quantize(b, (128, 128))
    return jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes, out_dtype=F32, **options)


def m_bf16(a, b, sizes, **options):
    return jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, sizes, out_dtype=F32, **options)


def masked_fp8(a, b, sizes, **options):
    a, b = jdg.quantize(a), jdg.quantize(b, (128, 128))
    return jdg.m_grouped_fp8_gemm_nt_masked(a, b, sizes, zero_rows=True, out_dtype=F32, **options)


def k_fp8(a, b, sizes, **options):
    a, b = jdg.quantize(a, (128, 1)), jdg.quantize(b, (128, 1))
    return jdg.k_grouped_fp8_gemm_tn_contiguous(a, b, sizes, **options)


def k_bf16(a, b, sizes, **options):
    return jdg.k_grouped_bf16_gemm_tn_contiguous(a, b, sizes, **options)


M_CUTS = {  # dimension cut -> specs of A, B, sizes and D
    "m": (P("x", None), P(), P(), P("x", None)),
    "n": (P(), P(None, "x", None), P(), P(None, "x")),
    "k": (P(None, "x"), P(None, None, "x"), P(), P()),
    "g": (P(), P("x", None, None), P(), P()),
}
MASKED_CUTS = {
    "g": (P("x", None, None), P("x", None, None), P("x"), P("x", None, None)),
    "m": (P(None, "x", None), P(), P(), P(None, "x", None)),
    "n": (P(), P(None, "x", None), P(), P(None, None, "x")),
}
K_CUTS = {
    "k": (P("x", None), P("x", None), P(), P()),
    "m": (P(None, "x"), P(), P(), P(None, "x", None)),
    "n": (P(), P(None, "x"), P(), P(None, None, "x")),
}
GROUPED = [
    (function, operands, cut, specs)
    for functions, operands, cuts in (
        ((m_fp8, m_bf16), m_operands, M_CUTS),
        ((masked_fp8,), masked_operands, MASKED_CUTS),
        ((k_fp8, k_bf16), k_operands, K_CUTS),
    )
    for function in functions
    for cut, specs in cuts.items()
]


@pytest.mark.parametrize(("count", "kind"), [(2, AxisType.Auto), (2, AxisType.Explicit), (4, AxisType.Auto)])
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_grouped_sharded_is_unsharded(case, count, kind):
    function, operands, cut, (*specs, spec_d) = case
    mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=gpus(count))
    arrays = operands()
    want = np.asarray(jax.jit(function)(*arrays))
    shards = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    summed = cut == "k" or (cut == "g" and function in (m_fp8, m_bf16))
    options = {"out_sharding": spec_d} if kind == AxisType.Explicit and summed else {}
    with jax.set_mesh(mesh):
        program = (
            jax.jit(lambda *x: function(*x, **options), out_shardings=NamedSharding(mesh, spec_d))
            .lower(*shards)
            .compile()
        )
        got = np.asarray(program(*shards))
    assert "jax_deepgemm_launch" in program.as_text()
    # Cut inside a block of 128 of k, FP8 products are summed in other pieces, each with some 14 bits.
    limit = 2e-4 if function is k_fp8 and cut == "k" else 1e-6
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


# Experts on several GPUs ----------------------------------------------------------------------------------

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 256, 3, 8, 512, 256


def moe_operands():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), (TOKENS, TOP_K)))
    w13 = HIDDEN**-0.5 * jax.random.normal(jax.random.key(2), (EXPERTS, 2 * INNER, HIDDEN))
    w2 = INNER**-0.5 * jax.random.normal(jax.random.key(3), (EXPERTS, HIDDEN, INNER))
    return normal(4, TOKENS, HIDDEN), random_ids(0, TOKENS, TOP_K, EXPERTS, dropped=0.1), weights, w13, w2


def run_moe(layer, x, ids, weights, w13, w2):
    """The result, and the gradients of x, weights, w13 and w2."""

    def run(x, ids, *rest):
        y, vjp = jax.vjp(lambda x, *rest: layer(x, ids, *rest), x, *rest)
        return y, *vjp(jnp.cos(y.astype(F32)).astype(y.dtype))

    return jax.jit(run)(x, ids, weights, w13, w2)


@pytest.mark.parametrize(
    ("count", "method", "recipe"),
    [
        (2, "all_to_all", "fp8"),
        (2, "all_to_all", "bf16"),
        (2, "ragged", "fp8"),
        (4, "all_to_all", "fp8"),
        (4, "ragged", "bf16"),
    ],
)
def test_experts_on_several_gpus(count, method, recipe):
    """Against all experts on one. In FP8 the weights' gradients see tokens quantised for the journey."""
    mesh = jax.make_mesh((count,), ("expert",), axis_types=(AxisType.Auto,), devices=gpus(count))
    arrays = moe_operands()
    want = run_moe(functools.partial(moe.moe_mlp, recipe=recipe), *arrays)
    layer = functools.partial(moe.moe_layer, mesh=mesh, method=method, recipe=recipe)
    cut = [jax.device_put(x, NamedSharding(mesh, P("expert"))) for x in arrays]
    got = run_moe(lambda *x: layer(*x)[0], *cut)
    _, dropped = jax.jit(layer)(*cut)
    assert int(dropped) == 0
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) <= (0.05 if recipe == "fp8" else 0.01) * np.linalg.norm(other)


@pytest.mark.parametrize("method", ["all_to_all", "ragged"])
def test_copies_without_room_are_counted(devices, method):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
    x, _, *rest = moe_operands()
    ids = jnp.tile(jnp.arange(TOP_K, dtype=jnp.int32), (TOKENS, 1))  # all on the first device
    layer = functools.partial(moe.moe_layer, mesh=mesh, method=method, capacity_factor=1.0)
    y, dropped = jax.jit(layer)(
        *(jax.device_put(z, NamedSharding(mesh, P("expert"))) for z in (x, ids, *rest))
    )
    assert int(dropped) == TOKENS * TOP_K // 2
    assert bool(jnp.isfinite(y).all())
