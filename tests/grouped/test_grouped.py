"""Grouped GEMMs against NumPy in float64: every op and layout, and groups of any size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_deepgemm as jdg
from jax_deepgemm.ops.grouped import op as ops
from tests.shared import grouped_oracle as oracle
from tests.shared.gemm_oracle import assert_rounded

BF16, F32 = jnp.bfloat16, jnp.float32
BLOCK, ROW = (128, 128), (1, 128)
M, N, K, G = 90, 136, 200, 5
SIZES = {
    "uneven": (17, 1, 40, 3, 29),
    "tail": (5, 0, 30, 0, 1),
    "one group": (0, 0, 90, 0, 0),
    "last group": (0, 0, 0, 0, 90),
    "empty": (0, 0, 0, 0, 0),
    "negative": (10, -7, 20, -1, 4),
    "too many": (40, 30, 100, 7, 2**31 - 1),
}


def sizes_of(name: str) -> tuple[jax.Array, np.ndarray]:
    return jnp.array(SIZES[name], jnp.int32), oracle.rows_of(SIZES[name], M)


def swapped(*arrays: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.swapaxes(jnp.asarray(x), -1, -2) for x in arrays)


def poisoned(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[rows] = np.nan
    return x


# m-grouped


@pytest.mark.parametrize("form", ["nt", "nn"])
@pytest.mark.parametrize("name", SIZES)
def test_m_grouped_bf16(name: str, form: str) -> None:
    sizes, index = sizes_of(name)
    a, b = oracle.random(0, M, K), oracle.random(1, G, N, K)
    run = getattr(jdg, f"m_grouped_bf16_gemm_{form}_contiguous")
    stored = jnp.asarray(b) if form == "nt" else swapped(b)[0]
    got = run(poisoned(a, index < 0), stored, sizes, out_dtype=F32)
    assert_rounded(got, oracle.m_grouped(a, b, index), K)
    assert not np.any(np.asarray(got)[index < 0])


@pytest.mark.parametrize("block", [BLOCK, ROW])
@pytest.mark.parametrize("name", SIZES)
def test_m_grouped_fp8(name: str, block: tuple[int, int]) -> None:
    sizes, index = sizes_of(name)
    a, b = oracle.fp8(0, M, K), oracle.fp8(1, G, N, K, block=block)
    want = oracle.m_grouped(oracle.dequantized(a), oracle.dequantized(b, block), index)
    bad = tuple(poisoned(x, index < 0) for x in a)
    got = jdg.m_grouped_fp8_gemm_nt_contiguous(bad, b, sizes, out_dtype=F32)
    assert_rounded(got, want, K)
    nn = jdg.m_grouped_fp8_gemm_nn_contiguous(bad, swapped(*b), sizes, out_dtype=F32)
    np.testing.assert_array_equal(nn, got)


def test_fp8_types_may_differ() -> None:
    sizes, index = sizes_of("uneven")
    a, b = oracle.fp8(0, M, K, dtype=jnp.float8_e5m2), oracle.fp8(1, G, N, K, block=BLOCK)
    want = oracle.m_grouped(oracle.dequantized(a), oracle.dequantized(b, BLOCK), index)
    assert_rounded(jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes), want, K)


def test_index_per_row() -> None:
    """Groups in any order, with gaps in front, between and behind, and numbers that are no group."""
    rows = {-1: 3, 3: 20, 7: 2, 0: 11, -9: 5, 4: 1, 2: 30}
    index = np.array([group for group, count in rows.items() for _ in range(count)] + [-1] * 18, np.int32)
    real = np.where((index >= 0) & (index < G), index, -1)
    a, b = oracle.random(0, M, K), oracle.random(1, G, N, K)
    got = jax.jit(functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32))(
        poisoned(a, real < 0), b, m_indices=jnp.asarray(index)
    )
    assert_rounded(got, oracle.m_grouped(a, b, real), K)
    assert not np.any(np.asarray(got)[real < 0])


def test_a_group_in_pieces_counts_up_to_the_next_group() -> None:
    a, b = oracle.random(0, 6, 16), oracle.random(1, 2, 8, 16)
    index = np.array([1, 1, 0, 0, 1, -1], np.int32)
    got = jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, m_indices=jnp.asarray(index), out_dtype=F32)
    assert_rounded(got, oracle.m_grouped(a, b, np.array([1, 1, 0, 0, -1, -1])), 16)


@pytest.mark.parametrize(
    ("ends", "alignment", "index"),
    [
        ((3, 8, 20, 20, 33), 8, [(0, 3, 0), (8, 8, 1), (8, 20, 2), (24, 24, 3), (24, 33, 4)]),
        ((3, 3, 5, 5, 6), 1, [(0, 3, 0), (3, 5, 2), (5, 6, 4)]),
        ((0, 0, 70, 100, 200), 16, [(0, 70, 2), (80, 90, 3)]),
        ((50, 20, 60, -5, 61), 1, [(0, 50, 0), (50, 60, 2), (60, 61, 4)]),
    ],
    ids=["aligned", "dense", "beyond the rows", "descending"],
)
def test_ends(ends: tuple[int, ...], alignment: int, index: list[tuple[int, int, int]]) -> None:
    real = np.full(M, -1)
    for start, end, group in index:
        real[start:end] = group
    a, b = oracle.random(0, M, K), oracle.random(1, G, N, K)
    got = jdg.m_grouped_bf16_gemm_nt_contiguous(
        poisoned(a, real < 0), b, ends=jnp.array(ends, jnp.int32), alignment=alignment, out_dtype=F32
    )
    assert_rounded(got, oracle.m_grouped(a, b, real), K)


@pytest.mark.parametrize("described", ["group_sizes", "m_indices", "ends"])
def test_group_offset(described: str) -> None:
    """b holds groups 2, 3 and 4 of five; rows of the others are zero."""
    sizes, index = sizes_of("uneven")
    a, b = oracle.random(0, M, K), oracle.random(1, 3, N, K)
    where = {"group_sizes": sizes, "m_indices": jnp.asarray(index), "ends": jnp.cumsum(sizes)}[described]
    for offset in (2, jnp.int32(2), np.array([2])):
        got = jdg.m_grouped_bf16_gemm_nt_contiguous(
            a, b, **{described: where}, alignment=1, group_offset=offset, out_dtype=F32
        )
        assert_rounded(got, oracle.m_grouped(a, b, np.where(index >= 2, index - 2, -1)), K)


@pytest.mark.parametrize("offset", [-2, 4, 2**31 - 1])
def test_an_offset_beyond_the_groups_gives_zeros_there(offset: int) -> None:
    sizes, index = sizes_of("uneven")
    a, b = oracle.random(0, M, K), oracle.random(1, 3, N, K)
    local = np.where((index >= offset) & (index < offset + 3), index - offset, -1)
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32)
    assert_rounded(run(a, b, sizes, group_offset=offset), oracle.m_grouped(a, b, local), K)
    k_run = functools.partial(jdg.k_grouped_bf16_gemm_tn_contiguous, num_groups=3)
    assert_rounded(k_run(a, a, sizes, group_offset=offset), oracle.k_grouped(a, a, local, 3), M)


# masked


@pytest.mark.parametrize("counts", [(3, 0, 7, 1, 5), (0,) * 5, (7,) * 5, (-3, 100, 2, 2**31 - 1, 0)], ids=str)
def test_masked(counts: tuple[int, ...]) -> None:
    """Poison in rows that do not count reaches no row that does."""
    rows, real = 7, np.clip(counts, 0, 7)
    beyond = np.arange(rows) >= real[:, None]
    masked_m = jnp.array(counts, jnp.int32)
    for zero_rows in (False, True):
        options = {"expected_m": 4, "zero_rows": zero_rows, "out_dtype": F32}
        a, b = oracle.random(0, G, rows, K), oracle.random(1, G, N, K)
        got = np.array(jdg.m_grouped_bf16_gemm_nt_masked(poisoned(a, beyond), b, masked_m, **options))
        check_masked(got, oracle.masked(a, b, real), beyond, zero_rows)
        (nn,) = ops.M_MASKED_BF16["nn"](a, *swapped(b), masked_m, zero_rows=True, out_dtype=F32)
        assert_rounded(nn, oracle.masked(a, b, real), K)
        for block in (BLOCK, ROW):
            qa, qb = oracle.fp8(0, G, rows, K), oracle.fp8(1, G, N, K, block=block)
            want = oracle.masked(oracle.dequantized(qa), oracle.dequantized(qb, block), real)
            bad = tuple(poisoned(x, beyond) for x in qa)
            got = np.array(jdg.m_grouped_fp8_gemm_nt_masked(bad, qb, masked_m, **options))
            check_masked(got, want, beyond, zero_rows)


def check_masked(got: np.ndarray, want: np.ndarray, beyond: np.ndarray, zero_rows: bool) -> None:
    if not zero_rows:
        got[beyond] = 0  # undefined
    assert_rounded(got, want, K)


def test_masked_weight_gradient() -> None:
    counts = np.array([3, 0, 7, 1, 5])
    a, b = oracle.random(0, G, 7, 24), oracle.random(1, G, 7, 16)
    beyond = np.arange(7) >= counts[:, None]
    (got,) = ops.K_MASKED_BF16(poisoned(a, beyond), poisoned(b, beyond), jnp.asarray(counts), out_dtype=F32)
    want = [oracle.wide(a)[g, :c].T @ oracle.wide(b)[g, :c] for g, c in enumerate(counts)]
    assert_rounded(got, np.stack(want), 7)


# k-grouped


@pytest.mark.parametrize("add", [False, True], ids=["", "c"])
@pytest.mark.parametrize("name", SIZES)
def test_k_grouped_bf16(name: str, add: bool) -> None:
    sizes, index = sizes_of(name)
    a, b, c = oracle.random(0, M, 24), oracle.random(1, M, 40), oracle.random(2, G, 24, 40, dtype=np.float32)
    addend = (jnp.asarray(c),) if add else ()
    got = jdg.k_grouped_bf16_gemm_tn_contiguous(
        poisoned(a, index < 0), poisoned(b, index < 0), sizes, *addend
    )
    assert_rounded(got, oracle.k_grouped(a, b, index, G) + (c if add else 0), M)


@pytest.mark.parametrize("add", [False, True], ids=["", "c"])
@pytest.mark.parametrize("name", SIZES)
def test_k_grouped_fp8(name: str, add: bool) -> None:
    """k = 3 * 90: groups end inside blocks of scales, and blocks have columns of several groups."""
    sizes = [3 * size if size < 2**30 else size for size in SIZES[name]]
    index = oracle.rows_of(sizes, 3 * M)
    a, b = oracle.fp8(0, 24, 3 * M), oracle.fp8(1, 40, 3 * M)
    c = oracle.random(2, G, 24, 40, dtype=np.float32)
    addend = (jnp.asarray(c),) if add else ()
    want = oracle.k_grouped(oracle.dequantized(a).T, oracle.dequantized(b).T, index, G) + (c if add else 0)
    (va, sa), (vb, sb) = a, b
    bad = (poisoned(va.T, index < 0).T, sa), (poisoned(vb.T, index < 0).T, sb)
    got = jdg.k_grouped_fp8_gemm_nt_contiguous(*bad, jnp.array(sizes, jnp.int32), *addend)
    assert_rounded(got, want, 3 * M)
    tn = jdg.k_grouped_fp8_gemm_tn_contiguous(
        *(swapped(*x) for x in bad), jnp.array(sizes, jnp.int32), *addend
    )
    np.testing.assert_array_equal(tn, got)


def test_poisoned_scales_behind_the_groups_do_not_count() -> None:
    a, b = oracle.fp8(0, 24, 384), oracle.fp8(1, 40, 384)
    bad = [
        (values, np.where(np.arange(3) < 2, scales, np.nan).astype(np.float32)) for values, scales in (a, b)
    ]
    sizes = jnp.array([100, 60], jnp.int32)
    got = jdg.k_grouped_fp8_gemm_nt_contiguous(*bad, sizes)
    index = oracle.rows_of((100, 60), 384)
    want = oracle.k_grouped(oracle.dequantized(a).T, oracle.dequantized(b).T, index, 2)
    assert_rounded(got, want, 384)


def test_some_of_the_k_groups() -> None:
    sizes, index = sizes_of("uneven")
    a, b = oracle.random(0, M, 24), oracle.random(1, M, 40)
    got = jdg.k_grouped_bf16_gemm_tn_contiguous(a, b, sizes, num_groups=2, group_offset=3)
    assert_rounded(got, oracle.k_grouped(a, b, index, G)[3:], M)


def test_bfloat16_results() -> None:
    sizes, index = sizes_of("uneven")
    a, b = oracle.random(0, M, 24), oracle.random(1, M, 40)
    got = jdg.k_grouped_bf16_gemm_tn_contiguous(a, b, sizes, out_dtype=BF16)
    assert got.dtype == BF16
    assert_rounded(got, oracle.k_grouped(a, b, index, G), M)


# Sizes


@given(
    sizes=st.lists(st.integers(-5, 60), min_size=6, max_size=6),
    m=st.sampled_from([1, 37, 128]),
    k=st.sampled_from([1, 130]),
)
@settings(max_examples=15)
def test_any_group_sizes(sizes: list[int], m: int, k: int) -> None:
    """Rows are those of NumPy's, and of the same groups as an index per row."""
    index, groups = oracle.rows_of(sizes, m), len(sizes)
    a, b = oracle.random(0, m, k), oracle.random(1, groups, 8, k)
    s = jnp.array(sizes, jnp.int32)
    got = jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, s, out_dtype=F32)
    assert_rounded(got, oracle.m_grouped(a, b, index), k)
    same = jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, m_indices=jnp.asarray(index), out_dtype=F32)
    np.testing.assert_array_equal(same, got)
    d = jdg.k_grouped_bf16_gemm_tn_contiguous(a, a, s)
    assert_rounded(d, oracle.k_grouped(a, a, index, groups), m)


def test_many_groups_of_few_rows() -> None:
    sizes = np.random.default_rng(0).integers(0, 3, 160)
    a, b = oracle.random(0, 200, 16), oracle.random(1, 160, 8, 16)
    got = jax.jit(functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32))(
        a, b, jnp.asarray(sizes)
    )
    assert_rounded(got, oracle.m_grouped(a, b, oracle.rows_of(tuple(sizes), 200)), 16)


ZERO = [(0, 8, 16), (4, 0, 16), (4, 8, 0), (0, 0, 0)]


@pytest.mark.parametrize("shape", ZERO, ids=str)
def test_empty_dimensions(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    sizes = jnp.array([m, 0], jnp.int32)
    bf16 = lambda *s: jnp.ones(s, BF16)  # noqa: E731
    fp8 = lambda *s: oracle.fp8(0, *s)  # noqa: E731
    results = [
        (jdg.m_grouped_bf16_gemm_nt_contiguous(bf16(m, k), bf16(2, n, k), sizes), (m, n)),
        (jdg.m_grouped_bf16_gemm_nn_contiguous(bf16(m, k), bf16(2, k, n), sizes), (m, n)),
        (jdg.m_grouped_fp8_gemm_nt_contiguous(fp8(m, k), fp8(2, n, k), sizes), (m, n)),
        (jdg.m_grouped_bf16_gemm_nt_masked(bf16(2, m, k), bf16(2, n, k), sizes), (2, m, n)),
        (jdg.m_grouped_fp8_gemm_nt_masked(fp8(2, m, k), fp8(2, n, k), sizes), (2, m, n)),
    ]
    for got, want in results:
        assert (got.shape, got.dtype) == (want, BF16)
        assert not np.any(got)
    c = jnp.full((2, m, n), 3, F32)
    pair, fp8_pair = (bf16(k, m), bf16(k, n)), (fp8(m, k), fp8(n, k))
    for run, operands in (
        (jdg.k_grouped_bf16_gemm_tn_contiguous, pair),
        (jdg.k_grouped_fp8_gemm_nt_contiguous, fp8_pair),
    ):
        assert not np.any(run(*operands, sizes))
        np.testing.assert_array_equal(run(*operands, sizes, c), c)
    gradient = jax.grad(lambda a: jdg.m_grouped_bf16_gemm_nt_contiguous(a, bf16(2, n, k), sizes).sum())
    assert gradient(bf16(m, k)).shape == (m, k)


def test_sizes_of_other_integers_are_converted() -> None:
    _, index = sizes_of("too many")
    a, b = oracle.random(0, M, 16), oracle.random(1, G, 8, 16)
    want = oracle.m_grouped(a, b, index)
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, a, b, out_dtype=F32)
    assert_rounded(run(np.array(SIZES["too many"], np.int64)), want, 16)
    assert_rounded(run(np.array([40, 30, 2**33, 0, 0])), want, 16)  # cut, not wrapped to 0
    assert_rounded(run(np.array([40, 30, 20, 0, 0], np.uint8)), want, 16)
    with jax.enable_x64(True):
        assert_rounded(run(jnp.array([40, 30, 2**33, 0, 0], jnp.int64)), want, 16)
