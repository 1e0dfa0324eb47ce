"""Rows of the benchmark: products with FP4 weights beside those with the same weights in FP8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Fields, Row, Table
from jax_deepgemm.ops.gemm.api import fp8_gemm_nt
from jax_deepgemm.ops.gemm.bench import SMALL_M, first_rows
from jax_deepgemm.ops.grouped.api import m_grouped_fp8_gemm_nt_masked
from jax_deepgemm.ops.grouped.bench import MASKED, NK
from jax_deepgemm.ops.grouped.bench_rows import draw_sizes
from jax_deepgemm.ops.mixed import bench_bf16
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.fp4 import quantize_fp4
from jax_deepgemm.ops.quantize.prepared_fp4 import expand_fp4, prepare_fp4
from jax_deepgemm.ops.quantize.slabs import BYTES, COLUMNS, ROWS

ROWS_OF_A = (1, 16, 64)
WEIGHTS = ((7168, 16384), (4096, 7168), (24576, 1536))
DECODING, MANY = (32, 20), (32, 256)
CAPACITY_OF_MANY = 384
FP8 = "FP8 weights"


def _row(
    name: str,
    fields: Fields,
    product: Callable[..., Any],
    draw: Callable[[], Any],
    rows: int,
    groups: int,
    operands: Callable[[Any], tuple[Any, ...]],
    **more: Any,
) -> Row:
    """rows: those that count; drawn are rows, FP4 weights, and the same in FP8."""
    n, k = fields["n"], fields["k"]
    return Row(
        name=f"mixed {name}",
        fields={"type": "fp8", "groups": groups, **fields},
        function=product,
        draw=draw,
        flops=2 * rows * n * k,
        bytes=groups * _slab_bytes(fields) + rows * (k + 2 * n),
        operands=lambda drawn: operands((drawn[0], drawn[1])),
        baseline=Beside(FP8, product, lambda drawn: operands((drawn[0], drawn[2])), ours=True, **more),
        read_flush=fields["op"] == "dense",
        **more,
    )


def _slab_bytes(fields: Fields) -> int:
    return int(fields["n"] // ROWS * -(-fields["k"] // COLUMNS) * BYTES)


def _dense(n: int, k: int, counts: tuple[int, ...]) -> Iterator[Row]:
    draw = functools.partial(_draw, (max(counts), k), (n, k))
    for m in counts:
        fields = {"op": "dense", "m": m, "n": n, "k": k}

        def operands(pair: Any, m: int = m) -> tuple[Any, ...]:
            return first_rows(pair[0], m), pair[1]

        yield _row(f"m={m} n={n} k={k}", fields, fp8_gemm_nt, draw, m, 1, operands)


def _masked(m: int, n: int, k: int, sizes: tuple[int, ...], capacity: int) -> Row:
    groups = len(sizes)
    fields = {"op": "masked", "m": m, "n": n, "k": k, "group_sizes": list(sizes)}
    product = functools.partial(m_grouped_fp8_gemm_nt_masked, expected_m=m)
    draw = functools.partial(_draw, (groups, capacity, k), (groups, n, k))
    name = f"masked groups={groups} m={m} n={n} k={k}"
    counts = (np.asarray(sizes, np.int32),)
    return _row(name, fields, product, draw, sum(sizes), groups, tuple, constants=counts)


@functools.partial(jax.jit, static_argnums=range(2))
def _draw(rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """A and B, standard normal; B in FP4 and, of the same numbers, in FP8."""
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], rows, jnp.bfloat16)
    b = jax.random.normal(keys[1], weights, jnp.bfloat16)
    small = quantize_fp4(b)
    return quantize(a), prepare_fp4(small), expand_fp4(small)


def rows(small: bool) -> Iterator[Row]:
    """The table's rows."""
    if small:
        yield from _dense(128, 256, (1, 16))
        yield _masked(8, 128, 256, draw_sizes(2, 8, 14), 16)
        return
    total, capacity = MASKED[DECODING]
    sizes = draw_sizes(*DECODING, total)
    many = draw_sizes(*MANY, MANY[0] * MANY[1] - MANY[0] // 2)  # the mean of what is drawn: quick
    for n, k in NK:
        yield _masked(DECODING[1], n, k, sizes, capacity)
        yield _masked(MANY[1], n, k, many, CAPACITY_OF_MANY)
    for n, k in WEIGHTS:
        yield from _dense(n, k, ROWS_OF_A)


def _read_bytes(fields: Fields) -> int | None:
    """Bytes of slabs and of A, where reading them is most of the work."""
    if fields["op"] != "dense":
        return None
    return _slab_bytes(fields) + int(fields["m"] * fields["k"])


TABLES = {
    "mixed": Table(
        "FP8 rows times FP4 weights (MXFP4, prepared), dense and masked (m expected in each group), beside"
        " the same weights in FP8",
        ("op", "groups", "m", "n", "k"),
        rows,
        columns=(*RATES, *BESIDE_BASELINE, CLOCK),
        baseline=FP8,
        tuned=True,
        type="fp8",
        reads=_read_bytes,
        part=lambda fields: f"{fields['op']}, {'m <= 64' if fields['m'] <= SMALL_M else 'm = 256'}",
        readme=(("masked", 32, 20, 6144, 7168), ("dense", 1, 16, 4096, 7168)),
    ),
    **bench_bf16.TABLES,
}
