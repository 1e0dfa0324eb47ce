"""Where users of DeepGEMM trip: ends with another alignment, rows of a group that do not stand together."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jax_deepgemm import config, deep_gemm, grouped
from jax_deepgemm.quantization import quantize
from tests.shared import grouped_oracle as oracle
from tests.shared.arrays import normal

M, N, K, GROUPS = 12, 8, 16, 3
A, B = normal(0, M, K), normal(1, GROUPS, N, K)
product = functools.partial(deep_gemm.m_grouped_bf16_gemm_nt_contiguous, A, B, None)


def rows(index: list[int]) -> np.ndarray:
    """The rows of A times the matrices of these groups."""
    return oracle.m_grouped(oracle.wide(A), oracle.wide(B), np.array(index))


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.01, atol=0.05)


# Ends (use_psum_layout)


@pytest.mark.parametrize("known", [np.array, jnp.array], ids=("numpy", "device"))
def test_groups_by_ends_start_at_multiples_of_the_alignment(known: Any) -> None:
    got = product(known([3, 4, 10]), use_psum_layout=True, mk_alignment=4)
    close(got, rows([0] * 3 + [-1] + [2] * 6 + [-1] * 2))


def test_alignment_is_a_setting_of_the_call_of_a_block_and_of_the_process() -> None:
    ends = jnp.array([3, 7, 10])
    want = product(ends, use_psum_layout=True, mk_alignment=4)
    close(want, rows([0] * 3 + [-1] + [1] * 3 + [-1] + [2] * 2 + [-1] * 2))
    with config.use(mk_alignment=4):
        np.testing.assert_array_equal(product(ends, use_psum_layout=True), want)
    deep_gemm.set_mk_alignment_for_contiguous_layout(4)
    try:
        np.testing.assert_array_equal(product(ends, use_psum_layout=True), want)
        assert deep_gemm.get_mk_alignment_for_contiguous_layout() == config.get().mk_alignment == 4
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)


def test_ends_without_gaps_are_refused_where_they_are_known() -> None:
    ends = np.array([3, 5, 10])
    message = (
        r"grouped_layout\[1\] is 5, and group 1 starts at 128: where the one before ended, 3, rounded up to "
        r"the alignment 128\. If groups follow each other without gaps, say mk_alignment=1\."
    )
    with pytest.raises(ValueError, match=message):
        product(ends, use_psum_layout=True)
    close(product(ends, use_psum_layout=True, mk_alignment=1), rows([0] * 3 + [1] * 2 + [2] * 5 + [-1] * 2))


def test_ends_on_the_device_count_from_the_alignment() -> None:
    """What cannot be seen is defined: a group that ends before it can start is empty."""
    got = product(jnp.array([3, 5, 10]), use_psum_layout=True)
    close(got, rows([0] * 3 + [-1] * 9))


# An index per row


def test_groups_in_pieces_are_refused_where_they_are_known() -> None:
    index = np.array([1, 1, 0, 0, 1, 1, 2, 2, 2, -1, -1, 2])
    message = (
        r"grouped_layout\[4\] is 1, and rows of that group begin at 0, with others between\. Need rows of a "
        r"group together: order = np\.argsort\(grouped_layout, kind='stable'\), and a\[order\]\."
    )
    with pytest.raises(ValueError, match=message):
        product(index)
    order = np.argsort(index, kind="stable")
    turned = deep_gemm.m_grouped_bf16_gemm_nt_contiguous(A[order], B, None, index[order])
    close(turned[np.argsort(order)], rows(index.tolist()))


def test_a_gap_inside_a_group_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"grouped_layout\[3\] is 1, and rows of that group begin at 0"):
        product(np.array([1, 1, -1, 1, 0, 0, -1, -1, 2, 2, 2, 2]))


def test_groups_in_pieces_on_the_device_lose_rows_and_checkify_says_so() -> None:
    index = jnp.array([1, 1, 0, 0, 1, 1, 2, 2, 2, 2, -1, -1])
    close(product(index), rows([1, 1, 0, 0, -1, -1, 2, 2, 2, 2, -1, -1]))
    error, _ = checkify.checkify(lambda x: grouped.check_m_indices(x, GROUPS))(index)
    assert "rows of group 1 do not stand together" in error.get()


def test_expected_rows_are_for_ends() -> None:
    with pytest.raises(ValueError, match="expected_m_for_psum_layout is 4 with an index layout, need None"):
        product(jnp.zeros(M, jnp.int32), expected_m_for_psum_layout=4)
    with pytest.raises(TypeError, match=r"grouped_layout is missing\. Give it by its name: grouped_layout="):
        product()


# Groups of k


def test_groups_of_k_by_ends_leave_out_the_gaps() -> None:
    left, right = oracle.random(2, 300, 4), oracle.random(3, 300, 8)
    ends, index = np.array([100, 128, 290]), np.repeat([0, -1, 2, -1], [100, 28, 162, 10])
    want = oracle.k_grouped(oracle.wide(left), oracle.wide(right), index, 3)
    for gap in (slice(100, 128), slice(290, 300)):
        left[gap] = right[gap] = np.nan
    for known in (np.asarray, jnp.asarray):
        got = deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
            left, right, grouped_layout=known(ends), use_psum_layout=True
        )
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"grouped_layout\[1\] is 120, and group 1 starts at 128"):
        deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
            left, right, grouped_layout=np.array([100, 120, 290]), use_psum_layout=True
        )


def test_values_of_one_dimension_are_matrices_of_groups() -> None:
    ks = [128, 0, 256]
    a, b = quantize(normal(4, 8, 384)), quantize(normal(5, 16, 384))
    want = deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, ks_cpu=ks)

    def flat(q: Any) -> Any:
        parts = [np.asarray(q.values)[:, :128].reshape(-1), np.asarray(q.values)[:, 128:].reshape(-1)]
        return jnp.asarray(np.concatenate(parts)), q.scales

    got = deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat(a), flat(b), None, ks, jnp.array(ks))
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"values of a are float8_e4m3fn \[3072\] and ks_cpu \[128\]"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat(a), flat(b), None, [128])


# Rows by an index


@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_rows_of_a_by_an_index(layout: str) -> None:
    a, index = normal(6, 5, K), np.array([4, 0, -1, 4, 2, 2])
    groups = np.array([1, 1, 1, 0, 2, -1])
    function = getattr(deep_gemm.legacy, f"a_fused_m_grouped_bf16_gemm_{layout}_contiguous_tl")
    got = function(a, B if layout == "nt" else B.mT, mappings=(jnp.asarray(groups), jnp.asarray(index)))
    taken = np.where(index[:, None] < 0, 0, oracle.wide(a)[index])
    close(got, oracle.m_grouped(taken, oracle.wide(B), groups))


@pytest.mark.parametrize("side", ["a", "b"])
def test_rows_of_k_by_an_index(side: str) -> None:
    whole, some = oracle.random(7, 9, 8), oracle.random(8, 4, 8)
    index = np.array([3, 0, -1, 1, 1, 2, 3, 3, 0])
    start, end = np.array([4, 0, 9]), np.array([7, 4, 9])
    c = np.asarray(normal(9, 3, 8, 8, dtype=jnp.float32))
    function = getattr(deep_gemm.legacy, f"{side}_fused_k_grouped_bf16_gemm_tn_contiguous_tl")
    pair = (some, whole) if side == "a" else (whole, some)
    got = function(*pair, mappings=(jnp.asarray(index), start, end), acc=True, c=c)
    taken = np.where(index[:, None] < 0, 0, oracle.wide(some)[index])
    left, right = (taken, oracle.wide(whole)) if side == "a" else (oracle.wide(whole), taken)
    want = c + np.stack([left[i:j].T @ right[i:j] for i, j in zip(start, end)])
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"acc is True and c is a NoneType, need acc=True with c, or neither"
    ):
        function(*pair, mappings=(index, start, end), acc=True)
