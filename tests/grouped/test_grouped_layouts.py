"""Descriptions of groups of rows: conversions, the ops' operand, checks of run-time numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from jax_deepgemm.ops import grouped
from jax_deepgemm.ops.grouped import layouts, segments
from tests.shared import grouped_oracle as oracle

GROUPS, ROWS = 4, 70  # fixed, so that nothing is compiled twice
SIZES = st.lists(st.integers(0, 16), min_size=GROUPS, max_size=GROUPS)


def array(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def same(got: Any, want: Any) -> None:
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


@given(sizes=SIZES, alignment=st.sampled_from([1, 3, 8]))
@settings(max_examples=10)
def test_conversions_agree(sizes: list[int], alignment: int) -> None:
    """group sizes -> ends -> index per row -> group sizes and ends, with gaps of the alignment."""
    ends = grouped.group_sizes_to_ends(array(sizes), alignment)
    starts = np.concatenate([[0], -(-np.asarray(ends)[:-1] // alignment) * alignment])
    index = np.full(ROWS, -1)
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        index[start : start + size] = group
    same(grouped.ends_to_group_sizes(ends, alignment), sizes)
    same(grouped.ends_to_indices(ends, ROWS, alignment), index)
    same(grouped.indices_to_group_sizes(array(index), GROUPS), sizes)
    again = grouped.indices_to_ends(array(index), GROUPS)
    same(grouped.ends_to_group_sizes(again, alignment), sizes)
    same(grouped.group_sizes_to_indices(array(sizes), ROWS), oracle.rows_of(sizes, ROWS))
    for s in (
        layouts.segments_of_ends(ends, ROWS, alignment),
        layouts.segments_of_indices(array(index), GROUPS, array([0])),
    ):
        check_segments(s, index, GROUPS)


def check_segments(s: jax.Array, index: np.ndarray, groups: int) -> None:
    """Ascending, disjoint, inside the rows, and those of the index."""
    starts, ends, group = (np.asarray(x) for x in segments.read(s, "segments", len(index)))
    assert sorted(group) == list(range(groups))
    assert np.all(starts <= ends)
    assert np.all(ends[:-1] <= starts[1:])
    rows = np.full(len(index), -1)
    for start, end, g in zip(starts, ends, group, strict=True):
        rows[start:end] = g
    np.testing.assert_array_equal(rows, index)


@given(numbers=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 12), min_size=9, max_size=9))
def test_any_numbers_stay_inside_the_rows(numbers: list[int]) -> None:
    """Whatever the device holds: segments ascend, share no row, and end before the last row."""
    x = array(numbers)
    for s, layout in (
        (x, "sizes"),
        (layouts.segments_of_ends(x, 9, 4), "segments"),
        (layouts.segments_of_indices(x, 3, array([1])), "segments"),
    ):
        starts, ends, _ = (np.asarray(y).astype(int) for y in segments.read(s, layout, 9))
        assert np.all(starts >= 0)
        assert np.all(starts <= ends)
        assert np.all(ends <= 9)
        assert np.all(ends[:-1] <= starts[1:])


def test_sums_beyond_int32() -> None:
    ends = segments.prefix_ends(array([2**30] * 3), 2**30)
    same(ends, [2**30] * 3)
    same(segments.prefix_ends(array([5, 2**31 - 1, 7]), 2**30), [5, 2**30, 2**30])


def test_groups_and_rows() -> None:
    """The operand of an m-grouped op as that of a k-grouped one, and back."""
    index = np.array([2, 2, -1, 0, 5, 5, 5], np.int32)
    s = layouts.segments_of_indices(array(index), 6, array([0]))
    k = segments.by_group(s, "segments", 7, array([1]), 5)
    starts, ends, _ = segments.read(k, "segments", 7)
    rows = [(int(a), int(b)) if b > a else None for a, b in zip(starts, ends, strict=True)]
    assert rows == [None, (0, 2), None, None, (4, 7)]  # groups 1 to 5
    local = np.where(index > 0, index - 1, -1)
    check_segments(segments.by_row(k, 7), local, 5)


def test_segments_by_row_ascend_though_groups_between_are_empty_or_missing() -> None:
    """A kernel takes the rows up to the next start as a segment's own."""
    s = layouts.segments_of_ends(array([4, 4, 8]), 8, 1)
    k = segments.by_group(s, "segments", 8, array([0]), 5)
    starts, ends, groups = (np.asarray(x) for x in segments.read(segments.by_row(k, 8), "segments", 8))
    assert (np.diff(starts) >= 0).all()
    assert [(a, b, g) for a, b, g in zip(starts, ends, groups, strict=True) if b > a] == [
        (0, 4, 0),
        (4, 8, 2),
    ]
    assert starts[2:].min() == 8


@given(sizes=SIZES)
@settings(max_examples=10)
def test_windows_are_the_rows_of_a_device(sizes: list[int]) -> None:
    whole = oracle.rows_of(sizes, 40)
    s = array(sizes)
    for first in (0, 20):
        part = segments.window(s, "sizes", 40, jnp.int32(first), 20)
        same(part, [np.sum(whole[first : first + 20] == group) for group in range(GROUPS)])
    shifted = segments.shifted(s, "sizes", 40, jnp.int32(3))
    check_segments(shifted, np.concatenate([np.full(3, -1), whole]), GROUPS)


def test_alignment_is_a_setting() -> None:
    assert grouped.get_mk_alignment_for_contiguous_layout() == 128
    assert grouped.get_m_alignment_for_contiguous_layout() == 128
    assert grouped.get_k_alignment_for_contiguous_layout() == 128
    assert grouped.get_theoretical_mk_alignment_for_contiguous_layout() == 128
    a, b = oracle.random(0, 8, 16), oracle.random(1, 2, 8, 16)
    index = np.array([0, 0, 0, -1, 1, 1, -1, -1])
    grouped.set_mk_alignment_for_contiguous_layout(4)
    try:
        got = grouped.m_grouped_bf16_gemm_nt_contiguous(a, b, ends=array([3, 6]))
    finally:
        grouped.set_mk_alignment_for_contiguous_layout(128)
    want = grouped.m_grouped_bf16_gemm_nt_contiguous(a, b, m_indices=array(index))
    np.testing.assert_array_equal(oracle.wide(got), oracle.wide(want))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: grouped.set_mk_alignment_for_contiguous_layout(x),
        lambda x: grouped.get_theoretical_mk_alignment_for_contiguous_layout(x),
        lambda x: grouped.group_sizes_to_ends(array([1]), x),
        lambda x: grouped.ends_to_group_sizes(array([1]), x),
        lambda x: grouped.ends_to_indices(array([1]), 4, x),
        lambda x: grouped.indices_to_ends(array([1]), x),
        lambda x: grouped.indices_to_group_sizes(array([1]), x),
        lambda x: grouped.check_m_indices(array([1]), x),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "8"])
def test_static_numbers_are_positive_ints(call: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="need a positive int"):
        call(value)


# checkify


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 0, 5], None),
        ([3, -2, 5], r"group_sizes\[1\] is -2, need sizes of 0 or more"),
        ([3, 4, 5], r"group_sizes \[3 4 5\] sum to more than the 8 rows"),
        ([2**31 - 1, 2**31 - 1, 2], "sum to more than the 8 rows"),
    ],
)
def test_check_group_sizes(sizes: list[int], message: str | None) -> None:
    def run(sizes: jax.Array) -> jax.Array:
        return grouped.group_sizes_to_indices(grouped.check_group_sizes(sizes, 8), 8)

    error, _ = checkify.checkify(jax.jit(run))(array(sizes))
    if message is None:
        assert error.get() is None
    else:
        with pytest.raises(checkify.JaxRuntimeError, match=message):
            error.throw()
    same(jax.jit(run)(array(sizes)), oracle.rows_of(sizes, 8))  # no check, no error
    same(run(array(sizes)), oracle.rows_of(sizes, 8))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 0, -1, 1], None),
        ([1, 1, 0, -1], None),
        ([0, 2, -1, 1], r"m_indices\[1\] is 2, need -1 or a group below 2"),
        ([0, -2, -1, 1], r"m_indices\[1\] is -2"),
        ([1, 0, 1, -1], "rows of group 1 do not stand together"),
    ],
)
def test_check_m_indices(index: list[int], message: str | None) -> None:
    check = lambda x: grouped.check_m_indices(x, 2)  # noqa: E731
    error, same_index = checkify.checkify(jax.jit(check))(array(index))
    np.testing.assert_array_equal(same_index, index)
    if message is None:
        assert error.get() is None
    else:
        with pytest.raises(checkify.JaxRuntimeError, match=message):
            error.throw()
    same(jax.jit(check)(array(index)), index)
