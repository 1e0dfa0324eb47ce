"""The largest numbers of rows on a GPU: bit for bit what a sort of each row gives.

Run: pytest -m gpu tests/gpu/test_topk_gpu.py        (about half a minute)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import topk
from jax_deepgemm.core import launch
from jax_deepgemm.ops.topk.problem import DTYPES, TopkProblem
from tests.shared import topk_oracle

SHAPES = [
    (1, 1),
    (31, 7),
    (100, 100),
    (1024, 1000),
    (1025, 2048),
    (4096, 512),
    (8192, 2048),
    (8193, 2048),
    (20_001, 64),
    (65_536, 2048),
    (65_537, 1),
    (262_145, 2048),
]
"""Columns, k; as many rows as there are hard kinds."""
LONG = (1 << 20, 2048)
FEW = (1, 8)
"""Long rows, cut into 16 and into 8 pieces."""
ROWS = len(topk_oracle.HARD)
MANY = (600, 10_000, 300)


def kernels() -> Iterator[Any]:
    for columns, k in (*SHAPES, LONG):
        for dtype in DTYPES:
            yield TopkProblem(ROWS, columns, k, dtype, values=True)
            yield TopkProblem(ROWS, columns, k, dtype, windows=True, values=True, by_index=True)
    for rows in FEW:
        yield TopkProblem(rows, *LONG, values=True)
    for windows in (False, True):
        yield TopkProblem(*MANY, windows=windows)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(jnp.dtype(dtype))


@functools.cache
def program(k: int, windows: bool, values: bool = True) -> Any:
    order = "index" if windows and values else "value"
    if windows:
        return jax.jit(lambda x, s, e: topk(x, k, start=s, end=e, values=values, order=order))
    return jax.jit(lambda x: topk(x, k, values=values))


def check(x: np.ndarray, k: int, *windows: np.ndarray) -> None:
    found, indices = program(k, bool(windows))(x, *windows)
    want = topk_oracle.topk(x, k, *windows, by_index=bool(windows))
    np.testing.assert_array_equal(indices, want)
    bits = f"uint{8 * x.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(found).view(bits), topk_oracle.values(x, want).view(bits))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "k"), SHAPES, ids=str)
def test_hard_rows(columns, k, dtype):
    x = cast(topk_oracle.rows(columns), dtype)
    check(x, k)
    check(x, k, *topk_oracle.windows(ROWS, columns))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_rows(dtype):
    x = cast(topk_oracle.rows(LONG[0]), dtype)
    check(x, LONG[1])
    for rows in FEW:
        check(x[-rows:], LONG[1])
    check(x[:1], LONG[1], np.array([5], np.int32), np.array([LONG[0] - 3], np.int32))


@pytest.mark.parametrize("windows", [False, True])
def test_many_rows(windows):
    rows, columns, k = MANY
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    bounds = topk_oracle.windows(rows, columns) if windows else ()
    got = program(k, windows, values=False)(x, *bounds)
    np.testing.assert_array_equal(got, topk_oracle.topk(x, k, *bounds))


@pytest.mark.smoke
def test_nothing_outside_of_a_window_matters():
    x = np.random.default_rng(0).standard_normal((40, 30_000)).astype(np.float32)
    start, end = topk_oracle.windows(40, 30_000, 1)
    want = topk_oracle.topk(x, 512, start, end, by_index=True)
    column = np.arange(30_000)
    outside = (column < start[:, None]) | (column >= end[:, None])
    for poison in (np.nan, np.inf, -np.inf):
        found, indices = program(512, True)(np.where(outside, np.float32(poison), x), start, end)
        np.testing.assert_array_equal(indices, want)
        np.testing.assert_array_equal(found, topk_oracle.values(x, want))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1 << 20), (64, 65_536), (600, 8000), (600, 20_000)])
def test_runs_are_equal(rows, columns):
    """Twenty times, while other calls change what shared memory holds."""
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(np.round(rng.standard_normal((rows, columns)), 2), jnp.float32) for _ in range(2))
    run = program(1000, False)
    first = jax.tree.map(np.asarray, run(x))
    for _ in range(20):
        run(other)
        for one, again in zip(first, run(x), strict=True):
            np.testing.assert_array_equal(one, again)


@pytest.mark.smoke
def test_calls_are_captured():
    """One block and clusters in one command buffer: the handler does not run again for each call."""
    calls, runs = 20, 20

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(calls):
            x = x.at[:, 0].add(topk(x, 64)[:, 1].astype(jnp.float32))
        return x

    for shape in ((600, 3000), (2, 40_000)):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        want = chain(x).block_until_ready()
        chain(x).block_until_ready()
        ffi = launch.native()
        ffi.reset_execute_counters()
        for _ in range(runs):
            got = chain(x).block_until_ready()
        assert ffi.execute_count() <= calls * runs // 4, "the calls run outside command buffers"
        np.testing.assert_array_equal(got, want)


@pytest.mark.smoke
def test_batches_and_gradients():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 9000)), jnp.float32)
    found, indices = jax.jit(jax.vmap(lambda x: topk(x, 100, values=True)))(x)
    for i, one in enumerate(np.asarray(x)):
        np.testing.assert_array_equal(indices[i], topk_oracle.topk(one, 100))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(topk(x, 100, values=True)[0] ** 2)))(x[0])
    want = np.zeros(x.shape[1:], np.float32)
    np.put_along_axis(want, np.asarray(indices[0]), 2 * np.asarray(found[0]), axis=1)
    np.testing.assert_array_equal(gradient, want)
