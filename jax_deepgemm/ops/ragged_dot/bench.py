"""Rows of the benchmark: `ragged_dot` in BF16 beside JAX's own, which computes every row with every group."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.bench import (
    BESIDE_BOTH,
    CLOCK,
    RATES,
    Beside,
    Fields,
    Row,
    Table,
    every_row,
    recorded_rows,
)
from jax_deepgemm.ops.grouped import bench_drawn
from jax_deepgemm.ops.grouped.bench import GROUPED_KEYS, draw_sizes
from jax_deepgemm.ops.ragged_dot.api import ragged_dot, ragged_dot_general

SIZES = (
    (4, 8192, 6144, 7168),
    (8, 4096, 4096, 4096),
    (8, 4096, 7168, 3072),
    (32, 256, 7168, 3072),
    (32, 20, 6144, 7168),
)
"""Groups, rows expected in each, n, k."""
CALLS = 3  # of jax.lax.ragged_dot, 14 ms each
MOST_BYTES = 40 << 30  # of what it holds


def _rows(small: bool) -> Iterator[Row]:
    for groups, m, n, k in ((2, 16, 128, 64),) if small else SIZES:
        yield _row(groups, m, n, k)


def _row(groups: int, m: int, n: int, k: int) -> Row:
    sizes = draw_sizes(groups, m, groups * m)
    total = sum(sizes)
    given = (np.asarray(sizes, np.int32),)
    needed = groups * total * (2 * k + 4 * n)
    fields = {"type": "bf16", "sizes": "drawn", "groups": groups, "m": m, "n": n, "k": k}
    return Row(
        name=f"ragged_dot bf16 drawn groups={groups} m={m} n={n} k={k}",
        fields=fields | {"group_sizes": list(sizes)},
        function=ragged_dot,
        draw=functools.partial(_draw, total, groups, n, k),
        flops=2 * total * n * k,
        bytes=2 * groups * n * k + total * (2 * k + 2 * n),
        constants=given,
        baseline=Beside(
            "jax.lax.ragged_dot",
            lax.ragged_dot,
            constants=given,
            calls=CALLS,
            skipped=f"would need about {needed >> 30} GiB" if needed > MOST_BYTES else "",
        ),
    )


CONTRACTION = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
"""The weight gradient of a ragged_dot: sums over the rows of each group."""


def _contraction(a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
    return ragged_dot_general(a, b, sizes, CONTRACTION)


def _k_drawn(small: bool) -> Iterator[Row]:
    for groups, m, n, k in (bench_drawn.SMALL,) if small else bench_drawn.SIZES[:1]:
        fields = {"type": "bf16 ragged", "groups": groups, "m": m, "n": n, "k": k}
        sizes = bench_drawn.drawn_sizes(groups, groups * k)
        draw = functools.partial(bench_drawn.draw, "bf16", groups * k, m, n)
        yield bench_drawn.beside_even("k_drawn", fields, sizes, _contraction, draw)


def _draw(total: int, groups: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    lhs = jax.random.normal(jax.random.key(0), (total, k), jnp.bfloat16)
    return lhs, jax.random.normal(jax.random.key(1), (groups, k, n), jnp.bfloat16)


def _recorded(tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    rows = recorded_rows(tables, "ragged_dot")
    return {("bf16", *(row[key] for key in GROUPED_KEYS[1:])): {"us": row["tokamax_us"]} for row in rows}


TABLES = {
    "ragged_dot": Table(
        "jax_deepgemm.ragged_dot, BF16, m rows expected in each group",
        GROUPED_KEYS,
        _rows,
        columns=(*RATES, *BESIDE_BOTH, CLOCK),
        baseline="jax.lax.ragged_dot",
        peer="tokamax",
        recorded=_recorded,
        tuned=True,
        plotted=every_row,
        readme=(
            ("bf16", 4, 8192, 6144, 7168),
            ("bf16", 8, 4096, 4096, 4096),
            ("bf16", 32, 256, 7168, 3072),
        ),
    ),
    "k_drawn": replace(bench_drawn.TABLE, rows=_k_drawn),
}
