"""Rows copied to where they are wanted: as rows taken by the index, under every transformation, and the
kernel's own source on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.family import Given
from jax_deepgemm.moe.dispatch import plan_capacity, plan_dispatch
from jax_deepgemm.ops.rows import sm90
from jax_deepgemm.ops.rows.api import move_rows
from jax_deepgemm.ops.rows.family import FAMILY
from jax_deepgemm.ops.rows.op import COPIES
from jax_deepgemm.ops.rows.problem import RowsProblem
from tests.rows.test_rows import plain, taken
from tests.shared import native_kernels, op_checks
from tests.shared.arrays import normal
from tests.shared.native_kernels import NativeCall
from tests.shared.op_checks import OpCase, Shard

T, H, SLOTS = 8, 16, 3
M = T * SLOTS


def tables(seed: int, tokens: int = T, slots: int = SLOTS, experts: int = 5, capacity: int = 0) -> Any:
    """(token of each row, rows of each token), some copies dropped."""
    ids = np.random.default_rng(seed).integers(-1, experts, (tokens, slots)).astype(np.int32)
    plan = plan_capacity(ids, experts, capacity) if capacity else plan_dispatch(ids, experts)
    return np.asarray(plan.token), np.asarray(plan.position)


@pytest.mark.any_version
@pytest.mark.parametrize("capacity", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_as_rows_taken_by_the_index(dtype, capacity):
    x, (index, position) = normal(0, T, 7, dtype=jnp.float32).astype(dtype), tables(0, capacity=capacity)
    got = jax.jit(move_rows)(x, index, position)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got), taken(x, index))


def copies(x: jax.Array, index: jax.Array, position: jax.Array, out_sharding: Any = None) -> jax.Array:
    return COPIES(x, index, position, dtype=np.dtype(x.dtype), out_sharding=out_sharding)[0]


CASE = OpCase(
    "copies",
    copies,
    lambda seed: [normal(seed, T, H, dtype=jnp.float32), *map(jnp.asarray, tables(seed))],
    nests=(((0, 0, 0),), ((0, None, None),)),
    shards=(
        Shard((P(None, "y"), P(), P()), P(None, "y"), modes=("auto", "explicit", "shard_map")),
        Shard((P(), P(), P()), P("x"), modes=("auto",)),
        Shard((P("x"), P(), P()), P(), ("all-gather",)),
    ),
    plain=lambda x, index, position: plain(x, index),
    wrt=(0,),
    second=True,
)
CHECKS = [one for one in op_checks.checks([CASE]) if "grad-" not in one.id]


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()


def test_the_gradient_sums_copies_in_float32():
    (index, position), dy = tables(1), normal(1, M, H, dtype=jnp.float32).astype(jnp.bfloat16)
    x = jnp.ones((T, H), jnp.bfloat16)
    (got,) = jax.vjp(functools.partial(lambda i, p, x: move_rows(x, i, p), index, position), x)[1](dy)
    want = np.zeros((T, H), np.float32)
    for slot in range(SLOTS):
        want += taken(dy, position[:, slot]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(want).astype(jnp.bfloat16)))


@pytest.mark.any_version
def test_one_launch():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    shapes = (((64, 7), jnp.bfloat16), ((512,), jnp.int32), ((64, 8), jnp.int32))
    given = [jax.ShapeDtypeStruct(*one) for one in shapes]
    text = jax.jit(move_rows).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_deepgemm_launch(") == 1
    assert "copy 64 rows of 14 bytes to 8 each of 512" in text
    assert "stablehlo.gather" not in text


def native_call(width: int, dtype: str, slots: int, capacity: int, tokens: int = 11) -> NativeCall:
    index, position = tables(2, tokens, slots, 4, capacity)
    x = np.random.default_rng(3).integers(0, 255, (tokens, width), np.uint8).astype(dtype)
    problem = RowsProblem(len(index), tokens, x.itemsize * width, copies=slots)
    operands = {name: Given(i, one.shape) for i, (name, one) in enumerate((("x", x), ("index", index)))}
    plan = FAMILY.plan(problem, H200, operands)
    result = np.full((len(index), width), 77, dtype)
    return NativeCall(sm90.kernel_source(problem), plan, [x, index, position], [result])


@pytest.mark.any_version
def test_the_kernel_on_a_cpu(tmp_path: Path) -> None:
    """Rows of every width of vectors but the widest, of several pieces, more slots and larger shares of the
    result than a warp has lanes."""
    pytest.importorskip("cuda.core")
    forms = [(33, "uint8", 3, 0), (70, "uint16", 8, 0), (513, "uint32", 2, 5), (1100, "uint16", 35, 100)]
    calls = [native_call(*form) for form in forms]
    for call, [got] in zip(calls, native_kernels.run(tmp_path, calls), strict=True):
        x, index, _ = call.operands
        np.testing.assert_array_equal(got, taken(x, index))


@pytest.mark.any_version
@pytest.mark.parametrize("row_bytes", [14336, 24, 7, 1 << 20])
def test_pieces_cover_a_row(row_bytes):
    pytest.importorskip("cuda.core")
    problem = RowsProblem(800, 50, row_bytes, copies=16)
    cut, plan = sm90.cut_of(problem), FAMILY.plan(problem, H200, {})
    [launch] = plan.steps
    assert launch.grid == (7 * cut.pieces, 1, 1)
    assert row_bytes <= cut.pieces * cut.held * 32 * cut.bytes
    assert not launch.kernel.report.problems()
