"""Rows of groups on an H200: bit for bit the reference, SwiGLU within a tolerance, and the layers that use
them with sizes as routing draws them.

Run: pytest -m gpu tests/gpu/test_groups_gpu.py
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

from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.moe import moe_mlp
from jax_deepgemm.ops.quantize.blocks import ROWS, count_row_blocks, row_blocks
from jax_deepgemm.ops.quantize.groups import quantize_groups, quantize_rows
from jax_deepgemm.ops.quantize.problem import QuantizeProblem
from tests.gpu.test_fused_gpu import assert_bits, draw, near, on_both

CASES = (
    ((130, 0, 7, 128), 300),
    ((0, 0), 5),
    ((3,), 3),
    ((200, 300), 400),
    ((-4, 129, 1, 1, 1), 260),
    ((1000, 37, 0, 515, 4), 1600),
)
COLUMNS = (136, 1024, 131)


def kernels() -> Iterator[QuantizeProblem]:
    """What the tables below need (kernels.py)."""
    for ((sizes, rows), cols), x in itertools.product(
        itertools.product(CASES, COLUMNS), ("bfloat16", "float32")
    ):
        blocks = count_row_blocks(rows, len(sizes))
        for indexed in (True, False):
            yield QuantizeProblem("quantize", rows, cols, x, transposed=True, blocks=blocks, indexed=indexed)
        yield QuantizeProblem("quantize", rows, cols, x, indexed=True)
        for kind, width in (("swiglu", cols), ("swiglu_grad", 2 * cols)):
            yield QuantizeProblem(kind, rows, width, x, transposed=True, weighted=True, blocks=blocks)


def used(sizes: Any, rows: int) -> int:
    """Blocks with rows that count; what others have is undefined."""
    table = np.asarray(row_blocks(jnp.array(sizes, jnp.int32), rows))
    return int((table[:, 2] > 0).sum())


def defined(count: int, parts: Any) -> list[jax.Array]:
    values, scales, values_t, scales_t, *rest = parts
    return [values, scales, values_t[:, : count * ROWS], scales_t[:count], *rest]


@pytest.mark.smoke
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
def test_groups_bit_for_bit(sizes, rows, cols):
    table, count = np.asarray(row_blocks(jnp.array(sizes), rows)), used(sizes, rows)
    end = table[:, 2].sum()
    rng = np.random.default_rng(0)
    index = rng.integers(-2, 60, rows).astype(np.int32)
    for x_dtype in ("bfloat16", "float32"):
        x, source = draw((rows, cols), x_dtype), draw((50, cols), x_dtype, 1)
        x[end:] = np.nan
        groups = lambda *args: defined(count, quantize_groups(*args))  # noqa: E731
        assert_bits(*on_both(groups, x, table))
        assert_bits(*on_both(groups, source, table, index))
        assert_bits(*on_both(lambda *args: jax.tree.leaves(quantize_rows(*args)), source, index))


@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
def test_swiglu(sizes, rows, cols):
    table, count = np.asarray(row_blocks(jnp.array(sizes), rows)), used(sizes, rows)
    end = table[:, 2].sum()
    for x_dtype in ("bfloat16", "float32"):
        h, dact = draw((rows, 2 * cols), x_dtype, spread=0.5), draw((rows, cols), x_dtype, 1, spread=0.5)
        weight = draw((rows,), "float32", 2, spread=0)
        for array in (h, dact, weight):
            array[end:] = np.nan
        near(lambda b, *args: defined(count, swiglu_quantize(*args, blocks=b)), table, h, weight)
        near(lambda b, *args: defined(count, swiglu_grad_quantize(*args, blocks=b)), table, h, weight, dact)


def test_more_tiles_than_blocks_of_threads_and_equal_bits():
    """The gradient's blocks walk; 20 equal reruns between buffers full of NaN."""
    sizes, rows = (1500, 3, 0, 700, 129), 2400
    table, count = row_blocks(jnp.array(sizes), rows), used(sizes, rows)
    h, dact = draw((rows, 4096), spread=0.5), draw((rows, 2048), seed=1, spread=0.5)
    weight = draw((rows,), "float32", 2, spread=0)
    near(lambda b, *args: defined(count, swiglu_grad_quantize(*args, blocks=b)), table, h, weight, dact)
    index = np.random.default_rng(0).integers(0, rows, rows).astype(np.int32)

    @jax.jit
    def step(h: jax.Array, weight: jax.Array, dact: jax.Array) -> list[jax.Array]:
        grouped = defined(count, quantize_groups(h, table, index))
        forward = defined(count, swiglu_quantize(h, weight, blocks=table))
        return [*grouped, *forward, *defined(count, swiglu_grad_quantize(h, weight, dact, blocks=table))]

    first = [np.asarray(part) for part in step(h, weight, dact)]
    for _ in range(20):
        jax.block_until_ready([jnp.full((1 << 22,), jnp.nan) for _ in range(4)])
        assert_bits([np.asarray(part) for part in step(h, weight, dact)], first)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_an_expert_with_tiny_tokens_keeps_its_gradient(recipe):
    """Neighbouring rows of another expert are a million times larger; drawn sizes, dropped ids."""
    rng = np.random.default_rng(0)
    tokens, hidden, inner, experts = 700, 512, 256, 5
    ids = np.repeat(rng.integers(0, experts, tokens)[:, None], 2, axis=1).astype(np.int32)
    ids[:, 1] = -1
    ids[::13, 0] = -1
    size = np.where(ids[:, :1] == 2, 1e-3, 1e3)
    x = jnp.asarray(rng.standard_normal((tokens, hidden)) * size, jnp.bfloat16)
    weights = jnp.full((tokens, 2), 0.5, jnp.float32)
    w13 = jnp.asarray(rng.standard_normal((experts, 2 * inner, hidden)) * hidden**-0.5, jnp.bfloat16)
    w2 = jnp.asarray(rng.standard_normal((experts, hidden, inner)) * inner**-0.5, jnp.bfloat16)
    dy = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="how")
    def gradients(how: str) -> Any:
        layer = lambda w13, w2: moe_mlp(x, ids, weights, w13, w2, recipe=how)  # noqa: E731
        return jax.vjp(layer, w13, w2)[1](dy)

    for got, want in zip(gradients(recipe), gradients("bf16"), strict=True):
        got, want = (np.asarray(one, np.float32) for one in (got, want))
        for expert in range(experts):
            error = np.linalg.norm(got[expert] - want[expert]) / np.linalg.norm(want[expert])
            assert error < 0.2, (expert, error)
