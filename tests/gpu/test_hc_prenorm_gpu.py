"""Projections of rows with the sums of their squares on a GPU: bit for bit where sums are exact, and against
float64 elsewhere.

Run: pytest -m gpu tests/gpu/test_hc_prenorm_gpu.py        (seconds)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import hc_prenorm_gemm
from jax_deepgemm.ops.hc_prenorm import sm90
from jax_deepgemm.ops.hc_prenorm.family import HcPrenormConfig, HcPrenormProblem
from jax_deepgemm.ops.hc_prenorm.reference import split_bounds

STREAMS = 28672
SHAPES = [
    (1, 1, 1),
    (13, 24, STREAMS),
    (63, 8, 64),
    (65, 7, 72),
    (130, 31, 1000),
    (137, 24, STREAMS),
    (300, 128, 333),
    (70, 251, 200),
    (513, 24, 4096),
    (1025, 32, 2056),
]
"""m, n, k."""
CONFIGS = [
    HcPrenormConfig(rows, groups, stages, splits)
    for rows, groups, stages in ((64, 1, 16), (64, 2, 2), (64, 4, 4), (128, 1, 1), (128, 2, 10), (256, 1, 5))
    for splits in (1, 5)
]
CONFIGURED = (300, 24, 1100)
SPLIT = [(65, 24, 700, 4), (5, 24, 100, 7), (137, 24, STREAMS, 16)]
"""m, n, k, num_splits."""


def kernels() -> Iterator[Any]:
    for shape in SHAPES:
        yield HcPrenormProblem(*shape)
    for *shape, num_splits in SPLIT:
        yield HcPrenormProblem(*shape, num_splits)
    for config in CONFIGS:
        yield sm90.kernel_source(HcPrenormProblem(*CONFIGURED), config)
    yield HcPrenormProblem(4096, 24, STREAMS)


def integers(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whose sums are exact in float32, in any order."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-3, 4, (m, k)).astype(jnp.bfloat16)
    return a, rng.integers(-8, 9, (n, k)).astype(np.float32)


def expected(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = a.astype(np.float64)
    return wide @ b.astype(np.float64).T, (wide * wide).sum(axis=-1)


def check_exact(got: Any, a: np.ndarray, b: np.ndarray) -> None:
    for found, want in zip(got, expected(a, b), strict=True):
        np.testing.assert_array_equal(found, want.astype(np.float32))


@functools.cache
def program(num_splits: int | None = None, config: HcPrenormConfig | None = None) -> Any:
    return jax.jit(functools.partial(hc_prenorm_gemm, num_splits=num_splits, config=config))


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums(shape: tuple[int, int, int]) -> None:
    a, b = integers(*shape)
    check_exact(program()(a, b), a, b)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_kind_of_configuration(config: HcPrenormConfig) -> None:
    a, b = integers(*CONFIGURED)
    check_exact(program(config=config)(a, b), a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_splits_that_are_returned(case: tuple[int, int, int, int]) -> None:
    *shape, num_splits = case
    a, b = integers(*shape)
    d, squares = program(num_splits)(a, b)
    for i, (start, end) in enumerate(split_bounds(shape[2], num_splits)):
        check_exact((d[i], squares[i]), a[:, start:end], b[:, start:end])


@pytest.mark.smoke
@pytest.mark.parametrize("m", [13, 137, 4096])
def test_errors_are_those_of_rounding_to_tf32(m: int) -> None:
    """A truncation would be wrong by a mean of half of 2**-10 of every product, and all in one direction."""
    rng = np.random.default_rng(m)
    a = np.abs(rng.standard_normal((m, STREAMS), np.float32)).astype(jnp.bfloat16)
    b = np.abs(rng.standard_normal((24, STREAMS), np.float32))
    d, squares = program()(a, b)
    want, want_squares = expected(a, b)
    error = np.asarray(d, np.float64) / want - 1
    assert np.abs(error).max() < 2.0**-11
    assert np.abs(error.mean()) < 2.0**-14, "b is truncated, not rounded"
    np.testing.assert_allclose(squares, want_squares, rtol=1e-5)


@pytest.mark.smoke
def test_a_row_s_nan_stays_in_its_row() -> None:
    for m in (5, 70, 4096):
        a, b = integers(m, 24, 640)
        poisoned = np.array(a)
        poisoned[m // 2, 77] = np.nan
        poisoned[0, 639] = np.inf
        for found, want in zip(program()(poisoned, b), expected(a, b), strict=True):
            assert np.isnan(found[m // 2]).all()
            assert not np.isfinite(found[0]).any()
            others = np.delete(np.arange(m), [0, m // 2])
            np.testing.assert_array_equal(found[others], want[others].astype(np.float32))


@pytest.mark.parametrize("m", [13, 137, 1000])
def test_runs_are_equal(m: int) -> None:
    """Twenty times, while other calls change what shared memory and scratch hold."""
    rng = np.random.default_rng(0)
    a, other = (jnp.asarray(rng.standard_normal((m, STREAMS), np.float32), jnp.bfloat16) for _ in range(2))
    b = jnp.asarray(rng.standard_normal((24, STREAMS), np.float32))
    first = jax.device_get(program()(a, b))
    for _ in range(20):
        program()(other * jnp.nan, b)
        for got, want in zip(program()(a, b), first, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.smoke
def test_under_transformations() -> None:
    a, b = integers(6 * 40, 24, 520)
    stacked = a.reshape(6, 40, 520)
    d, squares = jax.jit(jax.vmap(hc_prenorm_gemm, (0, None)))(stacked, b)
    check_exact((d.reshape(-1, 24), squares.reshape(-1)), a, b)
    both = jax.jit(jax.vmap(hc_prenorm_gemm))(stacked, np.stack([b + i for i in range(6)]))
    for i in range(6):
        check_exact([x[i] for x in both], stacked[i], b + i)
    by_a, by_b = jax.jit(jax.grad(lambda a, b: sum(map(jnp.sum, hc_prenorm_gemm(a, b))), (0, 1)))(a, b)
    wide = a.astype(np.float64)
    np.testing.assert_allclose(np.asarray(by_a, np.float64), b.sum(0) + 2 * wide, rtol=2.0**-8)
    np.testing.assert_allclose(by_b, np.broadcast_to(wide.sum(0), b.shape), rtol=1e-6)


def test_many_rows() -> None:
    """More tiles than SMs, so whole sums; the last rows are a tail."""
    a, b = integers(132 * 128 + 5, 24, 136)
    check_exact(program()(a, b), a, b)
