"""Rows of the benchmark: bfloat16 rows times weights of fewer bits, beside the same weights in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Fields, Row, Table
from jax_deepgemm.ops.grouped.api import m_grouped_bf16_gemm_nt_masked
from jax_deepgemm.ops.quantize import nvfp4_slabs
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.fp4 import BLOCK, NVFP4_BLOCK, dequantize_fp4
from jax_deepgemm.ops.quantize.per_channel import dequantize_per_channel, quantize_per_channel
from jax_deepgemm.ops.quantize.prepared_fp4 import prepare_fp4
from jax_deepgemm.ops.quantize.slabs import BYTES, COLUMNS, ROWS
from jax_deepgemm.ops.ragged_dot.api import ragged_dot

GROUPS, ROWS_OF_A_GROUP = 32, (1, 8, 20, 64, 256)
NK = ((4096, 2048), (6144, 7168))
BF16 = "bfloat16 weights"
SLAB_BYTES = {BLOCK: BYTES, NVFP4_BLOCK: nvfp4_slabs.BYTES}


def _sizes(groups: int, m: int) -> tuple[int, ...]:
    """Rows of each group where every row chooses one at random."""
    drawn = np.random.default_rng(0).multinomial(groups * m, np.full(groups, 1 / groups))
    return tuple(int(size) for size in drawn)


@functools.partial(jax.jit, static_argnums=range(4))
def _draw(rows: int, groups: int, n: int, k: int) -> tuple[Any, Any, Any]:
    """Rows, weights, and the same weights in bfloat16; standard normal."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    w = quantize_per_channel(jax.random.normal(keys[1], (groups, k, n), jnp.bfloat16))
    return x, w, dequantize_per_channel(w, jnp.bfloat16)


def _row(m: int, n: int, k: int, sizes: tuple[int, ...]) -> Row:
    total, groups = sum(sizes), len(sizes)
    fields: Fields = {"type": "bf16", "groups": groups, "m": m, "n": n, "k": k, "group_sizes": list(sizes)}
    product = functools.partial(ragged_dot, expected_m=m)
    constants = (np.asarray(sizes, np.int32),)
    return Row(
        name=f"per channel groups={groups} m={m} n={n} k={k}",
        fields=fields,
        function=product,
        draw=functools.partial(_draw, total, groups, n, k),
        flops=2 * total * n * k,
        bytes=groups * n * k + 2 * total * (k + n),
        operands=lambda drawn: (drawn[0], drawn[1]),
        baseline=Beside(BF16, product, lambda drawn: (drawn[0], drawn[2]), ours=True, constants=constants),
        constants=constants,
    )


@functools.partial(jax.jit, static_argnums=range(5))
def _draw_fp4(block: int, capacity: int, groups: int, n: int, k: int) -> tuple[Any, Any, Any]:
    """Rows, weights, and the same weights in bfloat16; standard normal."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (groups, capacity, k), jnp.bfloat16)
    w: Any = quantize(jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16), (1, block), jnp.float4_e2m1fn)
    return x, prepare_fp4(w), dequantize_fp4(w, jnp.bfloat16)


def _fp4_row(block: int, m: int, n: int, k: int, sizes: tuple[int, ...]) -> Row:
    total, groups = sum(sizes), len(sizes)
    fields: Fields = {"groups": groups, "m": m, "n": n, "k": k, "group_sizes": list(sizes)}
    product = functools.partial(m_grouped_bf16_gemm_nt_masked, expected_m=m)
    constants = (np.asarray(sizes, np.int32),)
    return Row(
        name=f"{'mixed bf16' if block == BLOCK else 'nvfp4'} groups={groups} m={m} n={n} k={k}",
        fields={"type": "bf16", **fields},
        function=product,
        draw=functools.partial(_draw_fp4, block, max(sizes), groups, n, k),
        flops=2 * total * n * k,
        bytes=groups * n // ROWS * -(-k // COLUMNS) * SLAB_BYTES[block] + 2 * total * (k + n),
        operands=lambda drawn: (drawn[0], drawn[1]),
        baseline=Beside(BF16, product, lambda drawn: (drawn[0], drawn[2]), ours=True, constants=constants),
        constants=constants,
    )


def fp4_rows(block: int, small: bool) -> Iterator[Row]:
    """The rows of masked products with FP4 weights that have a scale for so many numbers."""
    if small:
        yield _fp4_row(block, 4, 64, 128, _sizes(3, 4))
        return
    for n, k in NK:
        for m in (1, 20, 64):
            yield _fp4_row(block, m, n, k, _sizes(GROUPS, m))


def rows(small: bool) -> Iterator[Row]:
    """The rows of ragged products with a scale a channel."""
    if small:
        yield _row(4, 64, 128, _sizes(3, 4))
        return
    for n, k in NK:
        for m in ROWS_OF_A_GROUP:
            yield _row(m, n, k, _sizes(GROUPS, m))


def _fp4_table(weights: str, block: int) -> Table:
    return Table(
        f"bfloat16 rows times {weights}, masked (m expected in each group), beside the same weights in"
        " bfloat16",
        ("groups", "m", "n", "k"),
        functools.partial(fp4_rows, block),
        columns=(*RATES, *BESIDE_BASELINE, CLOCK),
        baseline=BF16,
        tuned=True,
        type="bf16",
        part=lambda fields: "m <= 64",
    )


TABLES = {
    "mixed_bf16": _fp4_table("FP4 weights (MXFP4, prepared)", BLOCK),
    "nvfp4": _fp4_table("NVFP4 weights (prepared)", NVFP4_BLOCK),
    "per_channel": Table(
        "bfloat16 rows times int8 weights with a scale a channel (ragged_dot; m rows expected in each group),"
        " beside the same weights in bfloat16",
        ("groups", "m", "n", "k"),
        rows,
        columns=(*RATES, *BESIDE_BASELINE, CLOCK),
        baseline=BF16,
        tuned=True,
        type="bf16",
        part=lambda fields: "m <= 64" if fields["m"] <= 64 else "m = 256",
    ),
}
