"""Rows by their index: against NumPy, under every transformation, of every type and any sizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jax_deepgemm import export_checks
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.quantize import QuantizedArray, quantize
from jax_deepgemm.ops.rows import sm90
from jax_deepgemm.ops.rows.api import move_rows, sum_rows, take_quantized
from jax_deepgemm.ops.rows.family import FAMILY
from jax_deepgemm.ops.rows.op import SUMS, TAKE
from jax_deepgemm.ops.rows.problem import RowsProblem
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

T, H, M = 8, 16, 24
OUTSIDE = (-1, T, 2**31 - 1, -(2**31))


def index(seed: int, count: int = M, rows: int = T) -> jax.Array:
    """Every fourth is of no row."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, max(rows, 1), count)
    return jnp.asarray(np.where(np.arange(count) % 4 == 3, rng.choice(OUTSIDE, count), drawn), jnp.int32)


def taken(x: Any, at: Any) -> np.ndarray:
    x, at = np.asarray(x), np.asarray(at)
    exists = (at >= 0) & (at < len(x))
    rows = x[np.where(exists, at, 0)] if len(x) else np.zeros((len(at), *x.shape[1:]), x.dtype)
    return np.where(exists[:, None], rows, np.zeros((), x.dtype))


DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint32", "int8", "bool", "int4")


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(T, H), (T, 7), (0, 4), (3, 0)], ids=str)
def test_rows_of_every_type(dtype, shape):
    x, at = normal(0, *shape, dtype=jnp.float32).astype(dtype), index(1, 9, shape[0])
    got = jax.jit(move_rows)(x, at)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got), taken(x, at))


@pytest.mark.parametrize("shape", [(T,), (T, 2, 3)], ids=str)
def test_other_ranks(shape):
    x, at = normal(0, *shape, dtype=jnp.float32), index(1)
    want = taken(np.asarray(x).reshape(T, -1), at).reshape(M, *shape[1:])
    np.testing.assert_array_equal(move_rows(x, at), want)


@pytest.mark.parametrize("width", [256, 130, 7])
def test_quantized_rows(width):
    x = quantize(normal(0, T, width), (1, 128))
    got = jax.jit(take_quantized)(x, index(1))
    assert got.block == x.block
    for one, other in ((got.values, x.values), (got.scales, x.scales)):
        np.testing.assert_array_equal(np.asarray(one), taken(other, index(1)))


def call(x: jax.Array, at: jax.Array, out_sharding: Any = None) -> jax.Array:
    return TAKE(x, at, dtypes=(np.dtype(x.dtype),), out_sharding=out_sharding)[0]


def plain(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.where(((at >= 0) & (at < T))[:, None], x[jnp.clip(at, 0, T - 1)], 0)


CASE = OpCase(
    "take",
    call,
    lambda seed: [normal(seed, T, H, dtype=jnp.float32), index(seed)],
    nests=(((0, 0),), ((None, 0),), ((1, None),), ((0, None), (None, 0))),
    shards=(
        Shard((P(), P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
        Shard((P(None, "y"), P()), P(None, "y"), modes=("auto", "explicit", "shard_map")),
        Shard((P(None, "y"), P("x")), P("x", "y")),
        Shard((P("x"), P()), P(), ("all-gather",)),
    ),
    plain=plain,
    wrt=(0,),
    second=True,
)


SLOTS = 3


def sums(x: jax.Array, at: jax.Array, out_sharding: Any = None) -> jax.Array:
    return SUMS(x, at, dtype=np.dtype(x.dtype), out_sharding=out_sharding)[0]


SUM_CASE = OpCase(
    "sum",
    sums,
    lambda seed: [normal(seed, T, H, dtype=jnp.float32), index(seed).reshape(-1, SLOTS)],
    nests=(((0, 0),), ((None, 0),), ((0, None),)),
    shards=(
        Shard((P(), P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
        Shard((P(None, "y"), P("x")), P("x", "y")),
        Shard((P("x"), P()), P(), ("all-gather",)),
    ),
    plain=lambda x, at: plain(x, at.reshape(-1)).reshape(-1, SLOTS, H).sum(1),
    wrt=(0,),
    second=True,
)


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32"])
@pytest.mark.parametrize("slots", [1, 3, 9, 0])
def test_sums_of_every_type(dtype, slots):
    """In float32, slot by slot, rounded once."""
    x, at = normal(0, T, 7, dtype=jnp.float32).astype(dtype), index(1, 5 * slots).reshape(5, slots)
    want = np.zeros((5, 7), np.float32)
    for slot in range(slots):
        want += taken(x, at[:, slot]).astype(np.float32)
    got = jax.jit(sum_rows)(x, at)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(want).astype(dtype)))


CHECKS = [one for one in op_checks.checks([CASE, SUM_CASE]) if "grad-" not in one.id]


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()


@pytest.mark.any_version
def test_each_is_one_launch():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    at = jax.ShapeDtypeStruct((32768,), jnp.int32)
    values = jax.ShapeDtypeStruct((4096, 7168), jnp.float8_e4m3fn)
    x = QuantizedArray(values, jax.ShapeDtypeStruct((4096, 56), jnp.float32), (1, 128))
    rows, every = jax.ShapeDtypeStruct((64, 7), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 8), jnp.int32)
    for function, given, wanted in ((take_quantized, x, at), (move_rows, rows, at), (sum_rows, rows, every)):
        text = jax.jit(function).trace(given, wanted).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@jax_deepgemm_launch(") == 1
        assert "stablehlo.gather" not in text


@pytest.mark.any_version
@pytest.mark.parametrize("sizes", [(14336, 0), (7168, 224), (24, 4), (14, 2), (7, 0), (1 << 20, 0)], ids=str)
def test_pieces_cover_a_row(sizes):
    pytest.importorskip("cuda.core")
    problem = RowsProblem(100, 50, *sizes)
    cut, plan = sm90.cut_of(problem), FAMILY.plan(problem, H200, {"x": None, "index": None})
    covered = cut.pieces * cut.held * 32 * cut.bytes
    assert problem.row_bytes <= covered < problem.row_bytes + 32 * cut.bytes * max(cut.pieces, cut.held)
    [launch] = plan.steps
    assert launch.grid == (13, cut.pieces, 1)
    assert not launch.kernel.report.problems()


@pytest.mark.any_version
@pytest.mark.parametrize("slots", [1, 2, 3, 8, 12])
@pytest.mark.parametrize(
    ("row_bytes", "dtype"), [(14336, "bfloat16"), (14, "float16"), (4, "float32"), (40000, "float32")]
)
def test_pieces_cover_a_sum(slots, row_bytes, dtype):
    pytest.importorskip("cuda.core")
    problem = RowsProblem(100, 50, row_bytes, slots=slots, dtype=dtype)
    cut, plan = sm90.cut_of(problem), FAMILY.plan(problem, H200, {})
    covered = cut.pieces * cut.held * 32 * cut.bytes
    assert row_bytes <= covered < row_bytes + 32 * cut.bytes * max(cut.pieces, cut.held)
    assert cut.bytes >= (2 if dtype != "float32" else 4)
    [launch] = plan.steps
    assert launch.grid == (13 * cut.pieces, 1, 1)
    assert not launch.kernel.report.problems()
    assert launch.kernel.report.static_smem_bytes <= 48 * 1024


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="pieces, at most 65535"):
        FAMILY.plan(RowsProblem(1, 1, 1 << 28), H200, {})
    assert sm90.cut_of(RowsProblem(1, 1, 1 << 24)).pieces == 4096


def test_export_with_a_symbolic_number_of_tokens():
    (tokens,) = export.symbolic_shape("t")
    types = jax.ShapeDtypeStruct((tokens, 5), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    for platform in ("cpu", "cuda"):
        exported = export.export(jax.jit(move_rows), platforms=[platform], disabled_checks=export_checks)(
            *types
        )
        assert "jax_deepgemm_launch" not in exported.mlir_module()
        if platform == "cpu":
            x, at = normal(0, 3, 5), jnp.array([2, 3, 0])
            np.testing.assert_array_equal(np.asarray(exported.call(x, at)), taken(x, at))


@pytest.mark.parametrize("nothing", ["rows", "index"])
def test_nothing_to_take(nothing):
    x = jnp.ones((0 if nothing == "rows" else 3, 4))
    at = jnp.zeros((0 if nothing == "index" else 2,), jnp.int32)
    gradient = jax.grad(functools.partial(lambda at, x: move_rows(x, at).sum(), at))(x)
    assert gradient.shape == x.shape
    assert not np.any(np.asarray(move_rows(x, at)))
