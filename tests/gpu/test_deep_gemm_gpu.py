"""DeepGEMM's names and knobs on a GPU: what they add to the products of this package.

Run: pytest -m gpu tests/gpu/test_deep_gemm_gpu.py        (a few seconds)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import config, deep_gemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.experts.api import experts_swiglu
from jax_deepgemm.ops.gemm.family import FAMILY
from jax_deepgemm.tools.explain import problems
from tests.shared import grouped_oracle as oracle
from tests.shared.arrays import normal
from tests.shared.moe_oracle import random_ids

M, N, K = 300, 1040, 520
MULTIPLES = (1, 24, 64, 128)
GROUPS, ROWS = 3, 200


def product(multiple: int) -> Any:
    options = {"block_size_multiple_of": multiple, "out_dtype": jnp.float32}
    return lambda a, b: deep_gemm.bf16_gemm_nt(a, b, **options)


def kernels() -> Iterator[Any]:
    a, b = (jax.ShapeDtypeStruct((rows, K), jnp.bfloat16) for rows in (M, N))
    for multiple in MULTIPLES:
        for problem, chip in problems(product(multiple), a, b, chip=H200):
            yield from FAMILY.sources(problem, chip)


@pytest.mark.smoke
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_tiles_of_every_multiple_give_the_product(multiple: int) -> None:
    a, b = normal(0, M, K), normal(1, N, K)
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    np.testing.assert_allclose(np.asarray(jax.jit(product(multiple))(a, b)), want, rtol=1e-4, atol=1e-3)


def test_launches_in_turn_give_the_same_bits() -> None:
    x, weights = normal(0, 5, 512), jax.nn.softmax(normal(1, 5, 3, dtype=jnp.float32))
    w13, w2 = (
        jdg.quantize(normal(i, *shape), (128, 128)) for i, shape in ((3, (4, 256, 512)), (4, (4, 512, 128)))
    )
    given = x, random_ids(2, 5, 3, 4, dropped=0.2), weights, w13, w2
    results = []
    for overlap in (True, False):
        with config.use(pdl=overlap):
            run = jax.jit(lambda *operands: experts_swiglu(*operands))
            results += [np.asarray(run(*given), np.float32) for _ in range(10)]
    for one in results[1:]:
        np.testing.assert_array_equal(one, results[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp4_casts_have_the_bits_of_the_cpu(ue8m0: bool, dtype: Any) -> None:
    x = np.asarray(normal(5, 64, 416, dtype=dtype)) * np.exp2(np.arange(64) - 32)[:, None]
    x = x.astype(dtype)
    cast = jax.jit(lambda x: deep_gemm.per_token_cast_to_fp4(x, ue8m0, 32))
    back = jax.jit(lambda v, s: deep_gemm.cast_back_from_fp4(v, s, 32))
    found = cast(jnp.asarray(x))
    with jax.default_device(jax.devices("cpu")[0]):
        want = [np.asarray(one) for one in cast(x)]
        meant = np.asarray(back(*want))
    for one, other in zip(found, want):
        np.testing.assert_array_equal(np.asarray(one), other)
    np.testing.assert_array_equal(np.asarray(back(*found)), meant)


def test_groups_by_ends_with_a_small_alignment() -> None:
    a, b = np.array(normal(6, ROWS, K)), normal(7, GROUPS, N, K)
    ends, index = [70, 80, 190], np.full(ROWS, -1)
    for group, (start, end) in enumerate(((0, 70), (80, 80), (80, 190))):
        index[start:end] = group
    a[index < 0] = np.nan
    grouped = jax.jit(
        lambda a, b, ends: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(
            a, b, grouped_layout=ends, use_psum_layout=True, mk_alignment=16, out_dtype=jnp.float32
        )
    )
    got = np.asarray(grouped(a, b, jnp.array(ends)))
    want = oracle.m_grouped(np.nan_to_num(np.asarray(a, np.float64)), oracle.wide(b), index)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_groups_of_k_by_ends_leave_out_gaps_of_nan() -> None:
    a, b = np.array(normal(8, 512, 128)), np.array(normal(9, 512, 136))
    index = np.repeat([0, -1, 1, -1, 2, -1], [100, 28, 140, 116, 100, 28])
    a[index < 0] = b[index < 0] = np.nan
    grouped = jax.jit(
        lambda a, b, ends: deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
            a, b, grouped_layout=ends, use_psum_layout=True
        )
    )
    want = oracle.k_grouped(
        np.nan_to_num(np.asarray(a, np.float64)), np.nan_to_num(np.asarray(b, np.float64)), index, 3
    )
    np.testing.assert_allclose(
        np.asarray(grouped(a, b, jnp.array([100, 268, 484]))), want, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("side", ["a", "b"])
def test_rows_by_an_index(side: str) -> None:
    whole, some = normal(10, 300, 128), normal(11, 40, 128)
    index = np.random.default_rng(0).integers(-1, 40, 300)
    start, end = np.array([130, 0, 300]), np.array([290, 130, 300])
    function = getattr(deep_gemm.legacy, f"{side}_fused_k_grouped_bf16_gemm_tn_contiguous_tl")
    pair = (some, whole) if side == "a" else (whole, some)
    got = jax.jit(function)(*pair, mappings=tuple(map(jnp.asarray, (index, start, end))))
    taken = np.where(index[:, None] < 0, 0, np.asarray(some, np.float64)[index])
    left, right = (taken, np.asarray(whole, np.float64))[:: 1 if side == "a" else -1]
    want = np.stack([left[i:j].T @ right[i:j] for i, j in zip(start, end)])
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-3)


def test_kernels_are_timed_by_their_names() -> None:
    a = normal(0, M, K)
    square = jax.jit(lambda a: jdg.bf16_gemm_nt(a, a))
    seconds = deep_gemm.testing.bench_kineto(
        lambda: square(a), ("jdg_sm90_bf16",), num_tests=3, flush_l2=False
    )
    assert 1e-7 < seconds[0] < 1e-3
    assert deep_gemm.testing.bench(lambda: square(a), 1, 3) > seconds[0] / 10
    assert deep_gemm.testing.get_arch_major() == 9
    assert deep_gemm.get_num_sms() == jax.devices()[0].core_count
