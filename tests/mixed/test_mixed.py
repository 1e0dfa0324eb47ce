"""Products of FP8 rows and FP4 weights: the bits of the FP8 products with expanded weights, in every form."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import PreparedFp4, prepare_fp4, quantize
from jax_deepgemm.quantization import QuantizedArray, dequantize_fp4, expand_fp4
from jax_deepgemm.tools.explain import problems
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import random
from tests.shared.op_checks import OpCase, Shard

M, N, K, G = 20, 256, 512, 4
BF16, F32 = jnp.bfloat16, jnp.float32
ANY_MODE = ("auto", "explicit", "shard_map")


def weight(seed: int, *shape: int) -> Any:
    """Of scales as far apart as may be."""
    return random(seed, *shape, lowest=121, highest=132)


def rows(seed: int, *shape: int) -> QuantizedArray:
    return quantize(normal(seed, *shape))


def same(product: Any, a: Any, w: Any, *rest: Any, **options: Any) -> jax.Array:
    """The product, whose bits are those with the expanded weight."""
    got = product(a, prepare_fp4(w), *rest, **options)
    np.testing.assert_array_equal(got, product(a, expand_fp4(w), *rest, **options))
    return got


# Bits -------------------------------------------------------------------------------------------------------


@pytest.mark.any_version
@pytest.mark.parametrize(("m", "n", "k", "out"), [(1, 64, 32, jnp.bfloat16), (20, 192, 320, F32)])
def test_dense(m: int, n: int, k: int, out: Any) -> None:
    got = same(jdg.fp8_gemm_nt, rows(0, m, k), weight(1, n, k), out_dtype=out)
    assert (got.shape, got.dtype) == ((m, n), out)


@pytest.mark.any_version
def test_contiguous() -> None:
    a, w = rows(0, M, 160), weight(1, G, 128, 160)
    product, sizes = jdg.m_grouped_fp8_gemm_nt_contiguous, jnp.array([3, 0, 9, 4], jnp.int32)
    poisoned = QuantizedArray(a.values.at[16:].set(jnp.nan), a.scales.at[16:].set(jnp.nan), a.block)
    got = same(product, poisoned, w, sizes, out_dtype=F32)
    assert not np.any(np.asarray(got)[16:])
    index = jnp.array([1] * 5 + [-1] * 3 + [3] * 12, jnp.int32)
    same(product, a, w, m_indices=index, expected_m=4, out_dtype=F32)
    same(product, a, w, jnp.array([2, 3, 0, 4, 5, 1]), group_offset=1, out_dtype=F32)


@pytest.mark.any_version
def test_masked() -> None:
    a, w, counts = rows(0, G, M, 160), weight(1, G, 128, 160), jnp.array([3, 0, 25, 4], jnp.int32)
    got = same(jdg.m_grouped_fp8_gemm_nt_masked, a, w, counts, zero_rows=True, expected_m=3)
    assert not np.any(np.asarray(got.astype(F32))[0, 3:])


@pytest.mark.any_version
def test_rows_in_bfloat16() -> None:
    """From the same slabs: the bits of BF16 products with the weight's numbers, which bfloat16 holds."""

    def check(product: Any, a: Any, w: Any, *rest: Any, **options: Any) -> None:
        got = product(a, prepare_fp4(w), *rest, out_dtype=F32, **options)
        np.testing.assert_array_equal(
            got, product(a, dequantize_fp4(w, BF16), *rest, out_dtype=F32, **options)
        )

    deep, w = normal(0, G, M, 160), weight(1, G, 128, 160)
    check(jdg.bf16_gemm_nt, deep[0], w[0])
    check(jdg.m_grouped_bf16_gemm_nt_contiguous, deep[0], w, jnp.array([3, 0, 9, 4], jnp.int32))
    counts = jnp.array([3, 0, 25, 4], jnp.int32)
    check(jdg.m_grouped_bf16_gemm_nt_masked, deep, w, counts, zero_rows=True)
    mapped = jax.vmap(jdg.bf16_gemm_nt, (0, None))(deep, prepare_fp4(w[0]))
    np.testing.assert_array_equal(mapped[1], jdg.bf16_gemm_nt(deep[1], prepare_fp4(w[0])))


@pytest.mark.any_version
def test_nothing_to_multiply() -> None:
    nothing = prepare_fp4(weight(0, 0, 64))
    assert jdg.fp8_gemm_nt(rows(0, 3, 64), nothing).shape == (3, 0)
    assert jdg.fp8_gemm_nt(rows(0, 0, 64), prepare_fp4(weight(0, 64, 64)), out_dtype=F32).shape == (0, 64)
    deep, w = rows(0, 2, 0, 64), prepare_fp4(weight(0, 2, 64, 64))
    assert jdg.m_grouped_fp8_gemm_nt_masked(deep, w, jnp.zeros(2, jnp.int32)).shape == (2, 0, 64)
    assert jdg.m_grouped_fp8_gemm_nt_contiguous(deep[0], w, jnp.zeros(2, jnp.int32)).shape == (0, 64)


@pytest.mark.any_version
def test_a_slab_that_cannot_be_held_is_nan() -> None:
    q = random(0, 128, 256, lowest=127, highest=130)
    wide = type(q)(q.values, q.scales.at[70, 5].set(2.0**40))
    y = jdg.fp8_gemm_nt(rows(0, M, 256), jax.jit(prepare_fp4)(wide))
    np.testing.assert_array_equal(np.isnan(y), np.arange(128)[None] >= 64 + 0 * np.arange(M)[:, None])


# Errors -----------------------------------------------------------------------------------------------------


W, WS, A = weight(0, 128, 160), weight(0, 2, 128, 160), rows(0, 4, 160)
READY, SEVERAL = prepare_fp4(W), prepare_fp4(WS)
TWO = jnp.array([1, 2], jnp.int32)
PREPARE = "Prepare it once for the kernels: jax_deepgemm.prepare_fp4(b)"


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, PREPARE, lambda: jdg.fp8_gemm_nt(A, W)),
        (TypeError, PREPARE, lambda: jdg.fp8_gemm_nt(A, tuple(W))),
        (TypeError, PREPARE, lambda: jdg.m_grouped_fp8_gemm_nt_contiguous(A, WS, TWO)),
        (TypeError, PREPARE, lambda: jdg.m_grouped_fp8_gemm_nt_masked(rows(0, 2, 4, 160), WS, TWO)),
        (TypeError, "Quantise a to FP8", lambda: jdg.fp8_gemm_nt(W, READY)),
        (TypeError, "Elsewhere use FP8", lambda: jdg.fp8_gemm_nn(A, READY)),
        (TypeError, "Elsewhere use FP8", lambda: jdg.k_grouped_fp8_gemm_nt_contiguous(A, READY, TWO)),
        (ValueError, "need c=None", lambda: jdg.fp8_gemm_nt(A, READY, jnp.ones((4, 128), jnp.bfloat16))),
        (ValueError, "need 2 dimensions [n, k]. Use jax.vmap", lambda: jdg.fp8_gemm_nt(A, SEVERAL)),
        (ValueError, "need 3 dimensions", lambda: jdg.m_grouped_fp8_gemm_nt_contiguous(A, READY, TWO)),
        (ValueError, "b has 129 to 256", lambda: jdg.fp8_gemm_nt(rows(0, 4, 128), READY)),
        (
            ValueError,
            "float8_e5m2 and b is prepared for float8_e4m3fn",
            lambda: jdg.fp8_gemm_nt(quantize(normal(0, 4, 160), dtype=jnp.float8_e5m2), READY),
        ),
        (
            ValueError,
            "the number of groups differs (3 and 2)",
            lambda: jdg.m_grouped_fp8_gemm_nt_masked(rows(0, 3, 4, 160), SEVERAL, TWO),
        ),
        (
            ValueError,
            "there are no groups",
            lambda: jdg.m_grouped_fp8_gemm_nt_contiguous(A, SEVERAL[:0], TWO),
        ),
        (
            TypeError,
            "need a MixedConfig",
            lambda: jdg.fp8_gemm_nt(A, READY, config=jdg.GemmConfig(64, 64, 4)),
        ),
        (
            NotImplementedError,
            "have gradients of the rows",
            lambda: jax.grad(lambda s: jdg.fp8_gemm_nt((A.values, s), READY).astype(F32).sum())(A.scales),
        ),
        (TypeError, "a is a QuantizedArray", lambda: jdg.bf16_gemm_nt(A, READY)),
        (ValueError, "say rhs_layout='gnk'", lambda: jdg.ragged_dot(A, SEVERAL, TWO)),
    ],
)
def test_refused(error: Any, text: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.any_version
def test_ragged_dot_quantises_rows() -> None:
    x = normal(0, 4, 160)
    got = jdg.ragged_dot(x, SEVERAL, TWO, rhs_layout="gnk")
    np.testing.assert_array_equal(got, jdg.ragged_dot(quantize(x), expand_fp4(WS), TWO, rhs_layout="gnk"))


# Transformations --------------------------------------------------------------------------------------------


def dense_args(seed: int, m: int = 16, n: int = N, k: int = K) -> list[jax.Array]:
    a = rows(seed, m, k)
    return [a.values, a.scales, prepare_fp4(weight(seed, n, k)).slabs]


def dense(a: Any, scales: Any, slabs: Any, **options: Any) -> jax.Array:
    return jdg.fp8_gemm_nt((a, scales), PreparedFp4(slabs), **options)


def grouped_args(seed: int) -> list[jax.Array]:
    a = rows(seed, 16, K)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 15, G))
    return [
        a.values,
        a.scales,
        prepare_fp4(weight(seed, G, N, K)).slabs,
        jnp.asarray(np.diff(cuts, prepend=0), jnp.int32),
    ]


def grouped(a: Any, scales: Any, slabs: Any, sizes: Any, **options: Any) -> jax.Array:
    return jdg.m_grouped_fp8_gemm_nt_contiguous((a, scales), PreparedFp4(slabs), sizes, **options)


def masked_args(seed: int) -> list[jax.Array]:
    a, counts = rows(seed, G, 8, K), np.random.default_rng(seed).integers(0, 9, G)
    return [a.values, a.scales, prepare_fp4(weight(seed, G, N, K)).slabs, jnp.asarray(counts, jnp.int32)]


def masked(a: Any, scales: Any, slabs: Any, counts: Any, **options: Any) -> jax.Array:
    product = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, zero_rows=True)
    return product((a, scales), PreparedFp4(slabs), counts, **options)


CASES = [
    OpCase(
        "dense",
        dense,
        dense_args,
        nests=(((0, 0, None),), ((None, None, 0), (0, 0, 0))),
        shards=(
            Shard((P("x"), P("x"), P("y")), P("x", "y"), modes=ANY_MODE),
            Shard((P(None, "y"), P(None, "y"), P(None, "y")), P(), ("all-reduce",)),
            Shard((P("x", "y"), P("x", "y"), P(None, "y")), P("x", "y"), ("reduce-scatter",)),
        ),
        tolerance=2**-7,
    ),
    OpCase(
        "grouped",
        grouped,
        grouped_args,
        nests=(((0, 0, None, 0),), ((None, None, 0, None),)),
        shards=(
            Shard((P("x"), P("x"), P(None, "y"), P()), P("x", "y")),
            Shard((P("x"), P("x"), P("y"), P()), P("x"), ("all-reduce",)),
            Shard((P(None, "y"), P(None, "y"), P("x", None, "y"), P()), P(), ("all-reduce",)),
        ),
        tolerance=2**-7,
    ),
    OpCase(
        "masked",
        masked,
        masked_args,
        nests=(((0, 0, None, 0),), ((0, 0, 0, None),)),
        shards=(
            Shard((P("x"), P("x"), P("x", "y"), P("x")), P("x", None, "y"), modes=ANY_MODE),
            Shard((P(None, "x"), P(None, "x"), P(None, "y"), P()), P(None, "x", "y")),
        ),
        tolerance=2**-7,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Any) -> None:
    check()


def test_cut_rows_of_slabs_decide_for_the_result() -> None:
    """XLA keeps the weight where it is, and cuts the result as it is cut."""
    mesh = op_checks.make_mesh("auto")
    a, scales, slabs = dense_args(0)
    placed = jax.device_put(np.asarray(slabs), NamedSharding(mesh, P("y")))
    program = jax.jit(dense).lower(a, scales, placed).compile()
    assert not op_checks.collectives(program.as_text())
    y = program(a, scales, placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)
    np.testing.assert_array_equal(y, dense(a, scales, slabs))


@pytest.mark.parametrize(("n", "k", "specs"), [(320, K, (P(), P(), P())), (N, 384, (P(None, "y"), P(), P()))])
def test_cuts_inside_slabs_are_dropped(n: int, k: int, specs: Any) -> None:
    """n of 160 or k of 96 on a device: all of it is there instead."""
    case = OpCase("dense", dense, functools.partial(dense_args, n=n, k=k), tolerance=2**-7)
    compiled, placed = op_checks.compile_sharded(case, Shard(specs, P(None, "x")), "auto")
    op_checks.assert_same(compiled(*placed), dense(*case.operands()), 2**-7)


# Kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.any_version
def test_problems() -> None:
    """What the kernels are asked for, also of operands that vmap folds."""

    def only(function: Any, *arrays: Any) -> Any:
        [(problem, _)] = problems(function, *arrays)
        return problem

    a, scales, slabs = dense_args(0)
    of_dense = only(dense, a[:, :500], scales, slabs)
    assert (of_dense.grouping, of_dense.m, of_dense.n, of_dense.k) == ("dense", 16, N, 512)
    folded = only(jax.vmap(dense, (0, 0, None)), *(jnp.stack([x] * 3) for x in (a, scales)), slabs)
    assert (folded.grouping, folded.m, folded.n) == ("dense", 48, N)
    x = normal(0, 16, 500)
    of_bf16 = only(lambda x, slabs: jdg.bf16_gemm_nt(x, PreparedFp4(slabs)), x, slabs)
    assert (of_bf16.weights_in, of_bf16.m, of_bf16.n, of_bf16.k) == ("fp4_bf16", 16, N, 504)
    of_groups = only(grouped, *grouped_args(0))
    assert (of_groups.groups, of_groups.m, of_groups.segments) == (G, 16, G)
    several = [jnp.stack([x] * 3) for x in grouped_args(0)]
    both = only(jax.vmap(grouped), *several)
    assert (both.groups, both.m, both.segments, both.segmented) == (3 * G, 48, 3 * G, True)
    several = [jnp.stack([x] * 3) for x in masked_args(0)]
    shared = only(jax.vmap(masked, (0, 0, None, 0)), several[0], several[1], several[2][0], several[3])
    assert (shared.groups, shared.m, shared.weights, shared.zero_rows) == (3 * G, 8, G, True)


@pytest.mark.any_version
def test_exported() -> None:
    program = export.export(jax.jit(dense), platforms=["cpu", "cuda"], disabled_checks=jdg.export_checks)
    again = export.deserialize(program(*dense_args(0)).serialize())
    np.testing.assert_array_equal(again.call(*dense_args(0)), dense(*dense_args(0)))
