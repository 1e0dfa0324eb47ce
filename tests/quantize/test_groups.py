"""Rows of groups, taken by an index and transposed by row blocks: against NumPy, one group at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.ops.quantize.blocks import count_row_blocks, row_blocks
from jax_deepgemm.ops.quantize.groups import quantize_groups, quantize_rows
from tests.shared import op_checks, quant_oracle

SIZES = st.lists(st.integers(-3, 400), min_size=1, max_size=9)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1, shape)).astype(jnp.bfloat16)


def starts_of(sizes: Any, rows: int) -> list[tuple[int, int]]:
    """(start, end) of each group, cut at the rows."""
    ends = np.minimum(np.cumsum(np.maximum(np.asarray(sizes, np.int64), 0)), rows)
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.any_version
@given(SIZES, st.integers(0, 900))
def test_row_blocks_cover_the_rows_once(sizes, rows):
    table = np.asarray(row_blocks(jnp.array(sizes, jnp.int32), rows))
    assert table.shape == (count_row_blocks(rows, len(sizes)), 4)
    want = []
    for group, (start, end) in enumerate([*starts_of(sizes, rows), (starts_of(sizes, rows)[-1][1], rows)]):
        for first in range(start, end, 128):
            count = min(end - first, 128)
            want.append([first, count, count if group < len(sizes) else 0, group])
    used = table[: len(want)]
    np.testing.assert_array_equal(used, np.array(want, np.int32).reshape(-1, 4))
    assert not table[len(want) :, 1:3].any()


def oracle(x: np.ndarray, sizes: Any, block_t: tuple[int, int] = (128, 1)) -> tuple[np.ndarray, ...]:
    """values, scales, and the transposed copy of the groups' own blocks."""
    counted, copies, grids = x.astype(np.float32), [], []
    groups = starts_of(sizes, len(x))
    counted[groups[-1][1] :] = 0
    for start, end in groups:
        values, scales = quant_oracle.quantize(counted[start:end], block_t)
        copies.append(np.pad(values.astype(np.float32), ((0, -len(values) % 128), (0, 0))))
        grids.append(scales)
    values, scales = quant_oracle.quantize(counted, (1, 128))
    return values, scales, np.concatenate(copies).T, np.concatenate(grids)


def assert_quantized(got: Any, want: tuple[np.ndarray, ...]) -> None:
    """Bits of what is defined: of the transposed copy, the groups' blocks."""
    values, scales, values_t, scales_t = (np.asarray(one).astype(np.float32) for one in got)
    np.testing.assert_array_equal(values, want[0].astype(np.float32))
    np.testing.assert_array_equal(scales, want[1])
    np.testing.assert_array_equal(values_t[:, : want[2].shape[1]], want[2])
    np.testing.assert_array_equal(scales_t[: len(want[3])], want[3])


CASES = [([130, 0, 7, 128], 300), ([0, 0], 5), ([3], 3), ([200, 300], 400), ([-4, 129], 260)]


@pytest.mark.any_version
@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
def test_groups_against_numpy(sizes, rows):
    x = draw(rows, 136)
    blocks = row_blocks(jnp.array(sizes), rows)
    end = starts_of(sizes, rows)[-1][1]
    x[end:] = np.nan
    assert_quantized(jax.jit(quantize_groups)(x, blocks), oracle(x, sizes))
    square = jax.jit(functools.partial(quantize_groups, block_t=(128, 128)))
    assert_quantized(square(x, blocks), oracle(x, sizes, (128, 128)))
    index = (
        np.random.default_rng(0).permutation(rows + 9)[:rows].astype(np.int32) - 4
    )  # some are out of range
    source = draw(rows, 136, seed=1)
    taken = np.where(((index >= 0) & (index < rows))[:, None], source[np.clip(index, 0, rows - 1)], 0)
    assert_quantized(jax.jit(quantize_groups)(source, blocks, index), oracle(taken, sizes))
    assert_quantized(square(source, blocks, index), oracle(taken, sizes, (128, 128)))
    q = jax.jit(quantize_rows)(source, index)
    for got, want in zip((q.values, q.scales), quant_oracle.quantize(taken, (1, 128)), strict=True):
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), want.astype(np.float32))


@pytest.mark.any_version
def test_swiglu_with_blocks_is_swiglu_of_each_group():
    sizes, rows, width = [130, 0, 7], 200, 136
    h, dact, weight = draw(rows, 2 * width), draw(rows, width, seed=1), np.float32(draw(rows, seed=2))
    h[137:], dact[137:], weight[137:] = np.nan, np.nan, np.nan
    blocks = row_blocks(jnp.array(sizes), rows)
    forward = jax.jit(functools.partial(swiglu_quantize, blocks=blocks))(h, weight)
    backward = jax.jit(functools.partial(swiglu_grad_quantize, blocks=blocks))(h, weight, dact)
    limited = jax.jit(swiglu_quantize)(h, weight, jnp.int32(137))
    limited_backward = jax.jit(swiglu_grad_quantize)(h, weight, dact, jnp.int32(137))
    np.testing.assert_array_equal(backward[4], limited_backward[4])
    for column, (start, end) in zip((0, 256), ((0, 130), (130, 137)), strict=True):
        mine = [part[start:end] for part in (h, weight, dact)]
        for got, one, whole in (
            (forward, jax.jit(swiglu_quantize)(*mine[:2]), limited),
            (backward, jax.jit(swiglu_grad_quantize)(*mine), limited_backward),
        ):
            np.testing.assert_array_equal(np.asarray(got[0], np.float32), np.asarray(whole[0], np.float32))
            np.testing.assert_array_equal(got[1], whole[1])
            np.testing.assert_array_equal(
                np.asarray(got[2], np.float32)[:, column : column + end - start],
                np.asarray(one[2], np.float32),
            )
            block = column // 128
            np.testing.assert_array_equal(got[3][block : block + len(one[3])], one[3])


@pytest.mark.any_version
def test_swiglu_with_square_blocks_shares_the_largest_scale_of_their_columns():
    sizes, rows, width = [130, 0, 7], 200, 136
    h, dact, weight = draw(rows, 2 * width), draw(rows, width, seed=1), np.float32(draw(rows, seed=2))
    for function, read in ((swiglu_quantize, (h, weight)), (swiglu_grad_quantize, (h, weight, dact))):
        by_group = functools.partial(function, blocks=row_blocks(jnp.array(sizes), rows))
        plain = jax.jit(by_group)(*read)
        square = jax.jit(functools.partial(by_group, block_t=(128, 128)))(*read)
        cols, scales = plain[2].shape[0], np.asarray(plain[3])[:3]
        want = np.stack([scales[:, c : c + 128].max(1) for c in range(0, cols, 128)], axis=1)
        np.testing.assert_array_equal(np.asarray(square[3])[:3], want)
        for i in (0, 1, *range(4, len(plain))):
            np.testing.assert_array_equal(np.asarray(square[i], np.float32), np.asarray(plain[i], np.float32))
        numbers = [
            np.asarray(values, np.float32)[:, :384] * np.repeat(scales, 128, 0).T
            for values, scales in ((plain[2], scales), (square[2], np.repeat(want, 128, 1)[:, :cols]))
        ]
        assert np.linalg.norm(numbers[0] - numbers[1]) < 0.06 * np.linalg.norm(numbers[0])


def test_vmap_and_results_cut_over_devices():
    sizes, rows = jnp.array([[130, 0, 7], [3, 200, 1]]), 256
    x = jnp.stack([jnp.asarray(draw(rows, 256, seed=seed)) for seed in range(2)])
    tables = jax.vmap(functools.partial(row_blocks, rows=rows))(sizes)
    alone = [jax.jit(quantize_groups)(*one) for one in zip(x, tables, strict=True)]
    for got, *want in zip(jax.jit(jax.vmap(quantize_groups))(x, tables), *alone, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.stack(want).astype(np.float32))
    mesh = op_checks.make_mesh("auto")
    cut = (NamedSharding(mesh, P("x")), NamedSharding(mesh, P("x")), NamedSharding(mesh, P("y")), None)
    placed = jax.device_put(x[0], NamedSharding(mesh, P("x", "y")))
    for got, want in zip(
        jax.jit(quantize_groups, out_shardings=cut)(placed, tables[0]), alone[0], strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_errors_say_what_to_do():
    x, blocks = jnp.ones((4, 128)), row_blocks(jnp.array([4]), 4)
    for call, message in (
        (lambda: quantize_groups(x, blocks[:, :3]), r"blocks are int32\[2, 3\], need int32 \[b, 4\]"),
        (lambda: quantize_rows(x, jnp.ones(3)), r"index is float32\[3\], need int32 \[m\]"),
        (lambda: row_blocks(jnp.ones((2, 2)), 4), r"need integers \[g\]"),
        (lambda: swiglu_quantize(x, None, 3, blocks=blocks), "blocks are given with rows"),
        (lambda: swiglu_quantize(x, blocks=blocks, transposed=False), "given with transposed=False"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
