"""The launches of einsums, read as a kernel reads them, in numpy: tensor maps over operands as they are
stored, scalars, blocks of k."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Scalar, TensorMap
from jax_deepgemm.ops.einsum.collapse import bf16_rows
from jax_deepgemm.ops.einsum.form import canonical, oriented, parse
from jax_deepgemm.ops.einsum.op import bf16_op
from jax_deepgemm.ops.gemm.config import GemmConfig
from jax_deepgemm.ops.gemm.sm90 import plan as plans
from jax_deepgemm.ops.gemm.sm90.source import integers
from tests.shared.einsum_cases import PRODUCTS, draw, error, exact
from tests.shared.launch_plans import FakeKernel

pytestmark = pytest.mark.any_version

BF16 = jnp.bfloat16
SIZES = dict(zip("abcdghkmnrvxy", (3, 2, 3, 24, 2, 3, 72, 40, 88, 104, 3, 16, 8), strict=True))
ODD = dict(zip("abcdghkmnrvxy", (3, 2, 3, 24, 2, 3, 70, 40, 88, 99, 3, 16, 8), strict=True))


def seen(array: Any, about: TensorMap) -> np.ndarray:
    """What a map shows of an array, [batch, rows, columns]; writing to it writes to the array."""
    size = about.type.bits // 8
    steps = tuple(stride // size for stride in (*about.strides[::-1], size))
    assert 1 + sum((dim - 1) * step for dim, step in zip(about.dims[::-1], steps, strict=True)) <= array.size
    strides = tuple(step * array.itemsize for step in steps)
    return np.lib.stride_tricks.as_strided(array.reshape(-1), about.dims[::-1], strides)


def written(array: np.ndarray, batches: int, n: int, inside: bool) -> np.ndarray:
    """The same of a result without a map, as `matrix_of` and `row_pitch` of epilogue.cuh address it."""
    stored = array.reshape((-1, batches, n) if inside else (batches, -1, n))
    return stored.swapaxes(0, 1) if inside else stored


def run(expr: str, sizes: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The result as the launch gives it, in float64, and the oracle's."""
    a, b, c = draw(expr, sizes)
    want = exact(expr, a, b)
    form, exchanged = oriented(parse(expr))
    form = canonical(form)
    a, b = bf16_rows(form, *((b, a) if exchanged else (a, b)))
    kernel = bf16_op(form).kernel
    assert kernel is not None
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b, c)]
    problem = kernel.problem(types[:2], types[2:], batch=None)
    config = GemmConfig(64, 64, 4, slabs=0 if problem.n % 8 else 2)
    options = {"batch": None, "chip": H200, "out_dtype": BF16, "config": config}
    with mock.patch.object(plans, "compile_kernel", return_value=FakeKernel()):
        [launch] = kernel.plan(types[:2], types[2:], **options).steps
    maps = [one for one in launch.params if isinstance(one, TensorMap)]
    names = integers(problem)
    numbers = dict(zip(names, (one.value for one in launch.params if isinstance(one, Scalar)), strict=True))
    left, right = (
        seen(np.asarray(x).astype(np.float64), one) for x, one in zip((a, b), maps[:2], strict=True)
    )
    left = left if problem.a_k_major else left.swapaxes(1, 2)
    right = right if problem.b_k_major else right.swapaxes(1, 2)
    d = np.full(c.shape, np.nan)
    inside = problem.batch_axes[2] == 1
    out = seen(d, maps[2]) if len(maps) > 2 else written(d, problem.batches, problem.n, inside)
    for batch in range(numbers["batches"]):
        total = 0
        for block in range(numbers["k_blocks"]):
            run, first = divmod(block, numbers.get("run_blocks", numbers["k_blocks"]))
            place = run if problem.runs > 1 else batch
            columns = slice(first * problem.block_k, (first + 1) * problem.block_k)
            rows = left[place * numbers["batched_a"], :, columns]
            total += rows @ right[place * numbers["batched_b"], :, columns].T
        out[batch] = total[: numbers["m"], : numbers["n"]]
    return d, want


@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=("as they are", "padded"))
@pytest.mark.parametrize("expr", PRODUCTS)
def test_launches(expr: str, sizes: dict[str, int]) -> None:
    got, want = run(expr, sizes)
    assert error(got, want) < 1e-12
