"""NVFP4 weights: quantising, every byte of slabs, the kernel's expansion number by number, products."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import Fp4Array, PreparedFp4, prepare_fp4, quantize
from jax_deepgemm.moe import prepare_weights
from jax_deepgemm.quantization import dequantize_fp4, expand_fp4
from jax_deepgemm.tools.explain import problems
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import BYTES, NUMBERS, random_nvfp4
from tests.shared.op_checks import OpCase, Shard

BF16, F32, E4M3, E2M1 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float4_e2m1fn
M, N, K, G = 20, 256, 512, 4


def meant(q: Any) -> np.ndarray:
    """float64 numbers, without the global scale."""
    values, scales = np.asarray(q.values), np.asarray(q.scales).astype(np.float64)
    numbers = NUMBERS[np.stack([values & 15, values >> 4], axis=-1)].reshape(*values.shape[:-1], -1)
    return numbers * np.repeat(scales, 16, axis=-1)


def every_scale(rows: int, depth: int) -> Fp4Array:
    """All codes of e4m3 in turn: zeros, subnormal numbers, NaN, and those below zero."""
    codes = np.arange(rows * depth // 16).astype(np.uint8).reshape(rows, depth // 16)
    values = np.tile(BYTES, (rows, depth // 32))
    return Fp4Array(jnp.asarray(values), jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.float32(0.3))


# The format -------------------------------------------------------------------------------------------------


@pytest.mark.any_version
def test_quantize() -> None:
    """ModelOpt's formula, in NumPy; rows of very small numbers, of zeros, and with what is no number."""
    x = np.array(normal(0, 2, 8, 64, dtype=F32))
    x[0, 1] *= 1e-6
    x[0, 2] = 0
    x[1, 3, 20], x[1, 4, 40] = np.inf, np.nan
    got: Any = quantize(jnp.asarray(x), (1, 16), E2M1)
    assert (got.scales.dtype, got.scales.shape, got.global_scale.shape) == (E4M3, (2, 8, 4), (2,))
    finite = np.where(np.isfinite(x), x, 0)
    whole = np.abs(finite).max(axis=(1, 2)) / np.float32(6 * 448)
    np.testing.assert_array_equal(got.global_scale, whole)
    amax = np.abs(finite).reshape(2, 8, 4, 16).max(axis=-1)
    scale = np.clip(amax / np.float32(6) / whole[:, None, None], 2.0**-9, 448)
    scale = np.where(amax > 0, scale, 1).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale[1, 3, 1] = scale[1, 4, 2] = np.nan
    np.testing.assert_array_equal(np.asarray(got.scales, np.float32), scale)
    step = np.repeat(scale * whole[:, None, None], 16, axis=-1)
    numbers = np.asarray(dequantize_fp4(got), np.float64)
    ok = np.isfinite(step)
    assert np.isnan(numbers[~ok]).all()
    apart = np.abs(NUMBERS[:8, None] * step[ok] - np.abs(x)[ok].astype(np.float64)).min(axis=0)
    assert np.all(np.abs(np.abs(numbers[ok]) - np.abs(x[ok])) <= apart + 1e-6 * np.abs(x[ok]))
    again: Any = jax.jit(lambda x: quantize(x, (1, 16), E2M1))(jnp.asarray(x))
    np.testing.assert_array_equal(again.values, got.values)
    np.testing.assert_array_equal(dequantize_fp4(again), dequantize_fp4(got))
    nothing: Any = quantize(jnp.zeros((2, 32)), (1, 16), E2M1)
    assert (float(nothing.global_scale), np.unique(np.asarray(nothing.scales, np.float32))) == (1, 1)


@pytest.mark.any_version
def test_numbers() -> None:
    """bfloat16 holds numbers times scales; the global scale rounds once."""
    q = every_scale(64, 128)
    alone = Fp4Array(q.values, q.scales)
    np.testing.assert_array_equal(np.asarray(dequantize_fp4(alone, BF16), np.float64), meant(q))
    np.testing.assert_array_equal(dequantize_fp4(q), (meant(q) * np.float32(0.3)).astype(np.float32))
    np.testing.assert_array_equal(dequantize_fp4(tuple(q)), dequantize_fp4(q))
    some = random_nvfp4(0, 3, 4, 32)
    np.testing.assert_array_equal(dequantize_fp4(some[1]), dequantize_fp4(some)[1])


def test_every_byte() -> None:
    """The slab as its text says, one number after the other."""
    q = random_nvfp4(0, 64, 96)
    [[slab]] = np.asarray(prepare_fp4(q).slabs)
    words, codes = slab[:4096].view(np.uint32), slab[4096:4608].reshape(2, 32, 2, 4)
    assert slab[4608:4612].view(np.float32) == q.global_scale
    assert not slab[4612:].any()
    values, scales = np.asarray(q.values), np.asarray(q.scales).astype(np.float64)
    for row in range(64):
        w, h, g = row // 16, row % 16 // 8, row % 8
        for k in range(96):
            j, upper, beyond, lane, i = k // 32, k % 32 // 16, k % 16 // 8, k % 8 // 2, k % 2
            i += 2 * beyond
            word = int(words[(h * 128 + (32 * w + 4 * g + lane ^ g // 2)) * 4 + j])
            number = word >> (16 * upper + 4 * i) & 7 | (word >> 8 * i + (3 if upper else 7) & 1) << 3
            assert number == values[row, k // 2] >> 4 * (k % 2) & (15 if scales[row, k // 16] else 8)
            c = int(codes[k // 64, w * 8 + g, h, k % 64 // 16])
            if scales[row, k // 16] > 0:
                assert (1 + c % 8 / 8) * 2.0 ** (c // 8 - 9) == scales[row, k // 16]


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _permute(low: Any, high: Any, which: Any) -> np.ndarray:
    """prmt, whose nibbles have no fourth bits here."""
    both = np.asarray(low, np.uint64) | np.asarray(high, np.uint64) << np.uint64(32)
    picked = [
        both >> np.uint64(8) * (which >> 4 * i & 7).astype(np.uint64) & np.uint64(255) for i in range(4)
    ]
    return sum(one.astype(np.uint32) << 8 * i for i, one in enumerate(picked))


def test_the_kernels_expansion() -> None:
    """nvfp4_loop.cuh in NumPy: the fragments of a warpgroup, of every scale there is."""
    q = every_scale(64, 128)
    [[slab]] = np.asarray(prepare_fp4(q).slabs)
    thread = np.arange(128)
    got = np.full((64, 128), np.inf, np.float32)
    for half in range(2):
        scales = slab[4096 + half * 256 :][:256].view(np.uint32).reshape(32, 2)[thread // 4]
        for h in range(2):
            words = slab[h * 2048 :][:2048].view(np.uint32).reshape(128, 4)
            words = words[thread ^ thread // 8 % 4, 2 * half : 2 * half + 2]
            row = thread // 32 * 16 + 8 * h + thread % 32 // 4
            for j in range(2):
                for odd in range(2):
                    word = words[:, j]
                    which = (word & 0x77777777) >> 16 * odd
                    signs = word << 4 * odd & 0x80808080
                    code = scales[:, h] >> 8 * (2 * j + odd) & 255
                    factor = code * np.uint32(0x00100010) + np.uint32(0x76007600)
                    low = _permute(0xC0800000, 0xC0804000, which)
                    high = _permute(0x04040400, 0x05050505, which) | signs
                    k = half * 64 + 32 * j + 16 * odd + thread % 4 * 2
                    for i in range(4):
                        bits = (low >> 8 * i & 255) | (high >> 8 * i & 255) << 8
                        product = _bf16(bits) * _bf16(factor & 0xFFFF)
                        got[row, k + i % 2 + 8 * (i // 2)] = product.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, meant(q))


@pytest.mark.any_version
def test_the_way_back() -> None:
    q = random_nvfp4(0, 3, 128, 176)
    prepared = prepare_fp4(q)
    assert (prepared.shape, prepared.slabs.shape) == ((3, 128, 256), (3, 2, 2, 4624))
    assert (repr(prepared), prepared.is_nvfp4) == ("PreparedFp4(float4_e2m1fn[3,128,256] for bfloat16)", True)
    back = prepared.fp4(176)
    np.testing.assert_array_equal(meant(back), meant(q))
    np.testing.assert_array_equal(np.signbit(meant(back)), np.signbit(meant(q)))
    np.testing.assert_array_equal(back.global_scale, q.global_scale)
    some = np.asarray(q.scales, np.float32) > 0
    np.testing.assert_array_equal(
        np.asarray(back.scales, np.float32)[some], np.asarray(q.scales, np.float32)[some]
    )
    odd = every_scale(64, 128)
    np.testing.assert_array_equal(meant(prepare_fp4(odd).fp4()), meant(odd))
    np.testing.assert_array_equal(prepared[1].slabs, prepare_fp4(q[1]).slabs)
    np.testing.assert_array_equal(jax.jit(jax.vmap(prepare_fp4))(q).slabs, prepared.slabs)


@pytest.mark.any_version
def test_as_checkpoints_have_it() -> None:
    q = random_nvfp4(3, 2, 64, 96)
    want = np.asarray(prepare_fp4(q).slabs)
    values = np.asarray(q.values)
    numbers = jax.lax.bitcast_convert_type(q.values, E2M1).reshape(2, 64, 96)
    for given in (
        tuple(q),
        (values.view(np.int8), q.scales, q.global_scale[:, None]),
        Fp4Array(numbers, q.scales, q.global_scale),
    ):
        np.testing.assert_array_equal(prepare_fp4(given).slabs, want)
    one = prepare_fp4((values, q.scales))
    np.testing.assert_array_equal(one.fp4(96).global_scale, 1)


def test_sharded() -> None:
    """Experts and rows, by shard_map and by the shardings of arguments."""
    q = random_nvfp4(0, 4, 128, 160)
    mesh, spec = op_checks.make_mesh("auto"), P("y", "x")
    want = prepare_fp4(q)
    specs = Fp4Array(spec, spec, P("y"))  # type: ignore[arg-type]
    inside = jax.shard_map(prepare_fp4, mesh=mesh, in_specs=(specs,), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(inside)(q).slabs, want.slabs)
    placed = jax.device_put(q, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    program = (
        jax.jit(prepare_fp4, out_shardings=want.shardings(NamedSharding(mesh, spec))).lower(placed).compile()
    )
    np.testing.assert_array_equal(program(placed).slabs, want.slabs)
    assert "all-gather" not in program.as_text()


# Products ---------------------------------------------------------------------------------------------------


@pytest.mark.any_version
def test_products_are_those_of_the_expanded_weight() -> None:
    """Times the global scale in float32, bit for bit."""
    deep, w, counts = normal(0, G, M, 176), random_nvfp4(1, G, 128, 176), jnp.array([3, 0, 25, 4], jnp.int32)
    expanded, sizes = dequantize_fp4(Fp4Array(w.values, w.scales), BF16), jnp.array([3, 0, 9, 4], jnp.int32)
    of_rows = jnp.repeat(w.global_scale, sizes, total_repeat_length=M)[:, None]

    def check(product: Any, a: Any, w: Any, expanded: Any, factor: Any, *rest: Any, **options: Any) -> None:
        got = product(a, prepare_fp4(w), *rest, out_dtype=F32, **options)
        want = product(a, expanded, *rest, out_dtype=F32, **options) * factor
        np.testing.assert_array_equal(got, want)

    check(jdg.bf16_gemm_nt, deep[0], w[0], expanded[0], w.global_scale[0])
    grouped = jdg.m_grouped_bf16_gemm_nt_contiguous
    check(grouped, deep[0].at[16:].set(jnp.nan), w, expanded, of_rows, sizes)
    every = w.global_scale[:, None, None]
    check(jdg.m_grouped_bf16_gemm_nt_masked, deep, w, expanded, every, counts, zero_rows=True)
    got = jdg.ragged_dot(deep[0], prepare_fp4(w), sizes, rhs_layout="gnk")
    np.testing.assert_array_equal(got, grouped(deep[0], prepare_fp4(w), sizes, out_dtype=F32).astype(BF16))
    np.testing.assert_array_equal(jdg.grouped_linear(deep[0], prepare_fp4(w), sizes, recipe="bf16"), got)


@pytest.mark.any_version
def test_nan_scales() -> None:
    """Rows of the weight are columns of the result."""
    w = every_scale(128, 256)
    y = jdg.bf16_gemm_nt(normal(0, M, 256), prepare_fp4(w))
    np.testing.assert_array_equal(np.isnan(y[0]), np.isnan(np.asarray(w.scales, np.float32)).any(axis=-1))


@pytest.mark.any_version
def test_gradients() -> None:
    """Of rows, forwards and backwards: those of the weight in bfloat16."""
    a, w, sizes = normal(0, M, 96), random_nvfp4(1, G, 64, 96), jnp.array([3, 0, 9, 4])
    counts = jnp.array([3, 0, 5, 4])

    @jax.jit
    def derivatives(w: Any, one: Any) -> Any:
        def loss(a: jax.Array) -> jax.Array:
            masked = jdg.m_grouped_bf16_gemm_nt_masked(a.reshape(G, -1, 96), w, counts, zero_rows=True)
            ys = (jdg.bf16_gemm_nt(a, one), jdg.m_grouped_bf16_gemm_nt_contiguous(a, w, sizes), masked)
            return sum(jnp.sum(jnp.square(y.astype(F32))) for y in ys)

        return jax.grad(loss)(a).astype(F32), jax.jvp(loss, (a,), (a,))[1]

    plain = dequantize_fp4(w, BF16)
    got, want = derivatives(prepare_fp4(w), prepare_fp4(w[0])), derivatives(plain, plain[0])
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * float(jnp.abs(other).max()))


@pytest.mark.any_version
def test_refused() -> None:
    q, a = random_nvfp4(0, 64, 96), quantize(normal(0, 4, 96))
    w, many, sizes = prepare_fp4(q), prepare_fp4(random_nvfp4(0, 2, 64, 96)), jnp.array([1, 2])
    bits = "five bits behind its first one and float8_e4m3fn"
    mx: Any = quantize(jnp.ones((64, 96)), (1, 32), E2M1)
    scaled = replace(mx, global_scale=jnp.float32(3))
    unprepared = random_nvfp4(0, 2, 64, 96)
    for error, text, call in [
        (TypeError, bits, lambda: jdg.fp8_gemm_nt(a, w)),
        (TypeError, "Use bf16_gemm_nt with rows in bfloat16", lambda: jdg.fp8_gemm_nt(a, w)),
        (
            TypeError,
            "Use m_grouped_bf16_gemm_nt_contiguous",
            lambda: jdg.m_grouped_fp8_gemm_nt_contiguous(a, many, sizes),
        ),
        (TypeError, "Prepare it, and use bf16_gemm_nt", lambda: jdg.fp8_gemm_nt(a, q)),
        (TypeError, "jax_deepgemm.prepare_fp4(b)", lambda: jdg.bf16_gemm_nt(normal(0, 4, 96), q)),
        (ValueError, "Use recipe='bf16'", lambda: jdg.grouped_linear(normal(0, 4, 96), many, sizes)),
        (TypeError, bits, lambda: jdg.ragged_dot(a, many, sizes, rhs_layout="gnk")),
        (
            TypeError,
            "Prepare it once: prepare_fp4(rhs)",
            lambda: jdg.ragged_dot(normal(0, 4, 96), unprepared, sizes, rhs_layout="gnk"),
        ),
        (
            TypeError,
            "lhs is float32 [4, 96] and rhs is NVFP4",
            lambda: jdg.ragged_dot(jnp.ones((4, 96)), many, sizes, rhs_layout="gnk"),
        ),
        (TypeError, "a global_scale, which only NVFP4 has", lambda: prepare_fp4(scaled)),
        (TypeError, "a global_scale, which only NVFP4 has", lambda: dequantize_fp4(scaled)),
        (TypeError, "need one format", lambda: prepare_weights((unprepared, mx), unprepared)),
        (TypeError, "Of a PreparedFp4 w that is w.fp4(k)", lambda: dequantize_fp4(w)),
        (TypeError, "w is NVFP4, need MXFP4", lambda: expand_fp4(q)),
        (TypeError, "w is NVFP4, need MXFP4", lambda: expand_fp4(w)),
        (TypeError, "activations is float8_e4m3fn and w is NVFP4", lambda: prepare_fp4(q, activations=E4M3)),
        (ValueError, "n is 60, need a multiple of 64", lambda: prepare_fp4(random_nvfp4(0, 60, 64))),
        (
            ValueError,
            "and scales float8_e4m3fn [64, 5], need",
            lambda: prepare_fp4((q.values, q.scales[:, :5])),
        ),
        (ValueError, "global_scale of w is float32 [2]", lambda: prepare_fp4((*tuple(q)[:2], jnp.ones(2)))),
        (TypeError, "global_scale of w is int32 []", lambda: prepare_fp4((*tuple(q)[:2], jnp.int32(1)))),
        (IndexError, "only the 0 leading dimensions", lambda: q[0]),
        (ValueError, "k is 100 of a weight [64, 128], need a multiple of 16", lambda: w.fp4(100)),
        (ValueError, "or (1, 16), as NVFP4", lambda: quantize(jnp.ones((2, 64)), (1, 8), E2M1)),
        (
            ValueError,
            "scales of NVFP4 are float8",
            lambda: quantize(jnp.ones((2, 64)), (1, 16), E2M1, "ue8m0"),
        ),
        (ValueError, "need [.., rows, d], d a multiple of 16", lambda: quantize(jnp.ones(64), (1, 16), E2M1)),
    ]:
        with pytest.raises(error, match=re.escape(text)):
            call()
    anew: Any = quantize(dequantize_fp4(w.fp4(96)), (128, 128))  # the way out
    assert jdg.fp8_gemm_nt(a, anew).shape == (4, 64)


def dense_args(seed: int, m: int = 16, n: int = N, k: int = K) -> list[jax.Array]:
    return [normal(seed, m, k), prepare_fp4(random_nvfp4(seed, n, k)).slabs]


def dense(a: Any, slabs: Any, **options: Any) -> jax.Array:
    return jdg.bf16_gemm_nt(a, PreparedFp4(slabs), **options)


CASE = OpCase(
    "nvfp4",
    dense,
    dense_args,
    nests=(((0, None),), ((None, 0),)),
    shards=(
        Shard((P("x"), P("y")), P("x", "y"), modes=("auto", "explicit")),
        Shard((P(None, "y"), P(None, "y")), P(), ("all-reduce",)),
    ),
    tolerance=2**-7,
)


@pytest.mark.parametrize("check", op_checks.checks([CASE]))
def test_op(check: Any) -> None:
    check()


@pytest.mark.any_version
def test_kernels_and_export() -> None:
    a, slabs = dense_args(0)
    [(problem, _)] = problems(dense, a[:, :500], slabs)
    assert (problem.weights_in, problem.m, problem.n, problem.k) == ("nvfp4", 16, N, 504)
    program = export.export(jax.jit(dense), platforms=["cpu", "cuda"], disabled_checks=jdg.export_checks)
    again = export.deserialize(program(a, slabs).serialize())
    np.testing.assert_array_equal(again.call(a, slabs), dense(a, slabs))
