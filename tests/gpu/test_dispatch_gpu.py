"""Plans of dispatches, and rows that are moved, on a GPU: bit for bit what a loop over copies gives.

Run: pytest -m gpu tests/gpu/test_dispatch_gpu.py        (about a minute)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core import launch
from jax_deepgemm.ops.dispatch.api import plan_copies
from jax_deepgemm.ops.dispatch.problem import DispatchProblem
from jax_deepgemm.ops.quantize import quantize
from jax_deepgemm.ops.rows import reference
from jax_deepgemm.ops.rows.api import move_rows, sum_rows, take_quantized
from jax_deepgemm.ops.rows.problem import SUMMED, RowsProblem
from tests.shared import dispatch_oracle
from tests.shared.arrays import normal

# One block, a cluster of each size, a grid; edges between them; experts beyond the threads of a block.
SIZES = [
    (1, 1),
    (1, 8192),
    (8, 256),
    (33, 2),
    (1000, 2048),
    (2048, 64),
    (2049, 64),
    (4097, 300),
    (32768, 32),
    (32768, 256),
    (32769, 256),
    (100_003, 2048),
    (1 << 20, 256),
    (1 << 20, 2048),
]
LARGE = [(1 << 24, 256), (1 << 24, 2048)]
SLOTS = (1, 2, 8, 10)
LOADS = ("balanced", "one expert", "few experts", "some dropped", "all dropped", "sorted")
ROW_SHAPES = [(4096, 7168), (64, 2048), (5, 1), (7, 33), (100, 260), (3, 40000), (1, 8)]


def kernels() -> Iterator[Any]:
    for copies, experts in (*SIZES, *LARGE):
        for capacity in (0, 2):
            yield DispatchProblem(copies, experts, capacity)
    for rows, width in ROW_SHAPES:
        for size in (2, 4):
            yield RowsProblem(8 * rows, rows, size * width)
        for slots, dtype in itertools.product(SLOTS, SUMMED):
            size = 4 if dtype == "float32" else 2
            yield RowsProblem(8 * rows // slots, rows, size * width, slots=slots, dtype=dtype)
        yield RowsProblem(8 * rows, rows, width, 4 * -(-width // 128))


def draw(load: str, copies: int, experts: int, seed: int = 0) -> np.ndarray:
    """ids [copies / s, s]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, copies)
    if load == "one expert":
        ids[:] = experts - 1
    elif load == "few experts":
        ids = rng.permutation(experts)[:3][ids % min(experts, 3)]
    elif load == "some dropped":
        ids = np.where(rng.random(copies) < 0.3, rng.choice([-1, experts, 2**31 - 1, -(2**31)], copies), ids)
    elif load == "all dropped":
        ids[:] = -1
    elif load == "sorted":
        ids = np.sort(ids)
    return ids.astype(np.int32).reshape(-1, 8 if copies % 8 == 0 else 1)


@functools.cache
def program(experts: int, capacity: int | None) -> Any:
    return jax.jit(functools.partial(plan_copies, num_experts=experts, capacity=capacity))


def check(ids: np.ndarray, experts: int, capacity: int | None) -> None:
    got = program(experts, capacity)(ids)
    for name, one, other in zip(
        ("sizes", "source", "position"), got, dispatch_oracle.plan(ids, experts, capacity), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=f"{name} of {ids.size} of {experts}, {capacity}")


@pytest.mark.parametrize(("copies", "experts"), SIZES, ids=str)
def test_any_load(copies, experts):
    for load in LOADS:
        ids = draw(load, copies, experts)
        for capacity in (None, max(copies // experts, 1)):
            check(ids, experts, capacity)


@pytest.mark.parametrize("load", ["balanced", "one expert", "some dropped"])
@pytest.mark.parametrize(("copies", "experts"), LARGE, ids=str)
def test_many_copies(copies, experts, load):
    check(draw(load, copies, experts), experts, None)


@pytest.mark.parametrize("copies", [64, 5000, 32768, 200_000, 1 << 22])
def test_runs_are_equal(copies):
    """Twenty times, while other plans change what scratch memory holds."""
    ids, other = draw("some dropped", copies, 256), draw("balanced", copies, 256, seed=1)
    run = program(256, None)
    first = jax.tree.map(np.asarray, run(ids))
    for _ in range(20):
        run(other)
        for one, again in zip(first, run(ids), strict=True):
            np.testing.assert_array_equal(one, again)


@pytest.mark.smoke
def test_plans_are_captured():
    """Cluster and grid in one command buffer: the handler does not run again for each call."""
    calls, runs = 40, 20

    @jax.jit
    def chain(ids: jax.Array) -> jax.Array:
        for _ in range(calls):
            ids = plan_copies(ids, 64)[2] % 64
        return ids

    for copies in (64, 8192, 65536):
        ids = jnp.asarray(draw("balanced", copies, 64))
        want = chain(ids).block_until_ready()
        chain(ids).block_until_ready()
        ffi = launch.native()
        ffi.reset_execute_counters()
        for _ in range(runs):
            got = chain(ids).block_until_ready()
        assert ffi.execute_count() <= calls * runs // 4, "the calls run outside command buffers"
        np.testing.assert_array_equal(got, want)
        expected = np.asarray(ids)
        for _ in range(calls):
            expected = dispatch_oracle.plan(expected, 64)[2] % 64
        np.testing.assert_array_equal(got, expected)


@pytest.mark.smoke
def test_batches():
    ids = np.stack([draw("some dropped", 5000, 40, seed) for seed in range(3)])
    got = jax.jit(jax.vmap(lambda ids: plan_copies(ids, 40)))(ids)
    for i, one in enumerate(ids):
        for have, want in zip(got, dispatch_oracle.plan(one, 40), strict=True):
            np.testing.assert_array_equal(have[i], want)


# Rows -------------------------------------------------------------------------------------------------------


def index(rows: int, seed: int = 0) -> np.ndarray:
    """Every row about eight times, some that do not exist."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, rows, 8 * rows)
    outside = rng.choice([-1, rows, 2**31 - 1, -(2**31)], 8 * rows)
    return np.where(rng.random(8 * rows) < 0.1, outside, drawn).astype(np.int32)


def taken(x: Any, at: np.ndarray) -> np.ndarray:
    bits = np.asarray(x)
    bits = bits.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[bits.dtype.itemsize])
    exists = (at >= 0) & (at < len(bits))
    return np.where(exists[:, None], bits[np.where(exists, at, 0)], 0)


def assert_bits(got: Any, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(got).view(want.dtype), want)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_rows(shape):
    at = index(shape[0])
    for dtype in (jnp.bfloat16, jnp.float32):
        x = normal(0, *shape, dtype=dtype)
        x = x.at[0, 0].set(jnp.nan)
        assert_bits(jax.jit(move_rows)(x, at), taken(x, at))
    q = quantize(normal(1, *shape), (1, 128))
    got = jax.jit(take_quantized)(q, at)
    assert_bits(got.values, taken(q.values, at))
    assert_bits(got.scales, taken(q.scales, at))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_sums_of_rows(shape, slots):
    """Bit for bit the reference's, on the CPU: in float32, slot by slot, rounded once."""
    at = index(shape[0])[: 8 * shape[0] // slots * slots].reshape(-1, slots)
    for dtype in SUMMED:
        x = normal(0, *shape, dtype=dtype)
        got = jax.jit(sum_rows)(x, at)
        with jax.default_device(jax.devices("cpu")[0]):
            (want,) = jax.jit(reference.sums)(np.asarray(x), at)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_rows_that_no_sum_wants_are_not_read():
    x = normal(0, 40, 264).at[20:].set(jnp.nan)
    at = np.where(index(40) < 20, index(40), -1).reshape(-1, 8)
    assert np.isfinite(np.asarray(jax.jit(sum_rows)(x, at), np.float32)).all()


def test_the_gradient_of_rows():
    x, at = normal(0, 100, 260, dtype=jnp.float32), index(100)
    dy = normal(1, 800, 260, dtype=jnp.float32)
    (got,) = jax.jit(lambda x, dy: jax.vjp(lambda x: move_rows(x, at), x)[1](dy))(x, dy)
    want = np.zeros((100, 260))
    for row, source in enumerate(at):
        if 0 <= source < 100:
            want[source] += np.asarray(dy[row], np.float64)
    np.testing.assert_allclose(got, want, atol=1e-5)
