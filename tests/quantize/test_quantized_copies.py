"""Rows quantised once and written to all their copies: as rows taken by the index, and the kernel's own
source on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.family import Given
from jax_deepgemm.ops.quantize.family import FAMILY
from jax_deepgemm.ops.quantize.groups import quantize_rows
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from jax_deepgemm.ops.quantize.sm90 import cut_of, kernel_source
from tests.quantize.test_groups import draw
from tests.rows.test_copies import tables
from tests.shared import native_kernels, op_checks
from tests.shared.native_kernels import NativeCall

TOKENS = 21


def same(got: Any, want: Any) -> None:
    for one, other in ((got.values, want.values), (got.scales, want.scales)):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("capacity", [0, 6])
def test_as_rows_taken_by_the_index(capacity, scale_format):
    x, (index, position) = draw(TOKENS, 136), tables(0, TOKENS, 4, 5, capacity)
    function = jax.jit(functools.partial(quantize_rows, scale_format=scale_format))
    same(function(x, index, position), function(x, index))


def test_vmap_and_results_cut_over_devices():
    x = jnp.stack([jnp.asarray(draw(64, 256, seed=seed)) for seed in range(2)])
    index, position = (jnp.stack(both) for both in zip(tables(0, 64, 2), tables(1, 64, 2), strict=True))
    got = jax.jit(jax.vmap(quantize_rows))(x, index, position)
    same(jax.tree.map(lambda one: one[1], got), quantize_rows(x[1], index[1]))
    mesh = op_checks.make_mesh("auto")
    cut = NamedSharding(mesh, P("x"))
    same(
        jax.jit(quantize_rows, out_shardings=cut)(x[0], index[0], position[0]), quantize_rows(x[0], index[0])
    )


def test_errors_say_what_to_do():
    x, index = jnp.ones((4, 128)), jnp.zeros(8, jnp.int32)
    for position in (jnp.zeros((4, 2)), index, jnp.zeros((3, 2), jnp.int32)):
        with pytest.raises(ValueError, match=r"position is .* and x is \[4, 128\], need int32 \[4, s\]"):
            quantize_rows(x, index, position)
    same(quantize_rows(x, index, jnp.zeros((4, 2), jnp.int32)), quantize_rows(x, index))
    with pytest.raises(NotImplementedError, match="has no derivative"):
        jax.grad(lambda x: quantize_rows(x, index, jnp.zeros((4, 2), jnp.int32)).scales.sum())(x)


def problem(cols: int, x: str = "bfloat16", rows: int = 84, copied: int = TOKENS, **form: Any) -> Any:
    return QuantizeProblem("quantize", rows, cols, x, indexed=True, copied=copied, **form)


PROBLEMS = [
    problem(cols, x, **form)
    for cols in (7168, 1536, 576, 128, 131)
    for x, form in (
        ("bfloat16", {}),
        ("bfloat16", {"ue8m0": True}),
        ("float32", {}),
        ("float16", {"fp8": "float8_e5m2"}),
    )
]


@pytest.mark.any_version
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_ptxas_is_content(problem):
    pytest.importorskip("cuda.core")
    given = {"x": Given(0, (problem.copied, problem.cols)), "position": Given(2, (problem.copied, 4))}
    [launch] = FAMILY.plan(problem, H200, given).steps
    shape = cut_of(problem)
    assert not launch.kernel.report.problems()
    assert launch.kernel.report.registers * shape.threads * shape.blocks_per_sm <= 65_536
    covered = launch.grid[0] * shape.height * shape.across * 128
    assert covered >= problem.copied * problem.cols


def native_call(cols: int, x_dtype: str, slots: int, capacity: int) -> NativeCall:
    index, position = tables(2, TOKENS, slots, 4, capacity)
    x = draw(TOKENS, cols).astype(x_dtype)
    x[3] = 0
    x[4, ::3], x[5, 1] = np.nan, np.inf
    one = problem(cols, x_dtype, rows=len(index))
    given = {"x": Given(0, x.shape), "index": Given(1, index.shape), "position": Given(2, position.shape)}
    results = [
        np.full((len(index), cols), 0x55, np.uint8),
        np.full((len(index), -(-cols // 128)), -1, np.float32),
    ]
    return NativeCall(kernel_source(one), FAMILY.plan(one, H200, given), [x, index, position], results)


@pytest.mark.any_version
def test_the_kernel_on_a_cpu(tmp_path: Path) -> None:
    """Columns of several blocks of threads, of tiles of every height, and not of whole vectors; more slots
    and larger shares of the result than half a warp has lanes; NaN, infinities, zeros."""
    pytest.importorskip("cuda.core")
    forms = [
        (1160, "bfloat16", 3, 0),
        (264, "bfloat16", 18, 0),
        (136, "float32", 4, 90),
        (131, "bfloat16", 2, 5),
    ]
    calls = [native_call(*form) for form in forms]
    for call, (values, scales) in zip(calls, native_kernels.run(tmp_path, calls), strict=True):
        want = quantize_rows(*call.operands[:2])
        np.testing.assert_array_equal(scales, want.scales)
        got = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(got, np.asarray(want.values, np.float32))
