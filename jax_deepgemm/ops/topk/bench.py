"""Rows of the benchmark: the largest numbers of rows, beside jax.lax.top_k."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Fields, Row, Table
from jax_deepgemm.ops.topk.api import topk

SHAPES = (
    (1, 1 << 20, 2048),
    (8, 1 << 20, 2048),
    (64, 1 << 16, 2048),
    (64, 1 << 16, 8),
    (128, 1 << 15, 512),
    (1024, 1 << 16, 2048),
    (8192, 1 << 13, 2048),
    (8192, 1 << 16, 2048),
    (4096, 1 << 10, 64),
    (4096, 1 << 8, 8),
)
"""Rows, columns, k."""
ORDERS = {"value": "float32", "index": "bfloat16"}
"""Each with a dtype."""


def _draw(rows: int, columns: int, dtype: str) -> tuple[jax.Array]:
    """Drawn as float32: what is drawn in 16 bits has only a few hundred different numbers."""
    return (jax.random.normal(jax.random.key(0), (rows, columns)).astype(dtype),)


def _rows(small: bool) -> Iterator[Row]:
    for rows, columns, k in ((4, 3000, 50),) if small else SHAPES:
        for order, dtype in ORDERS.items():
            size = jnp.dtype(dtype).itemsize
            yield Row(
                name=f"topk rows={rows} columns={columns} k={k} {dtype} by {order}",
                fields={"rows": rows, "columns": columns, "k": k, "dtype": dtype, "by": order},
                function=functools.partial(topk, k=k, order=order),
                draw=functools.partial(_draw, rows, columns, dtype),
                bytes=rows * (columns * size + 4 * k),
                baseline=Beside("jax.lax.top_k", functools.partial(jax.lax.top_k, k=k)),
                read_flush=True,
            )


def _reads(fields: Fields) -> int:
    return int(fields["rows"] * fields["columns"] * jnp.dtype(fields["dtype"]).itemsize)


TABLES = {
    "topk": Table(
        "The k largest numbers of every row, beside jax.lax.top_k",
        ("rows", "columns", "k", "dtype", "by"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="top_k",
        part=lambda fields: "",
        order=2,
        reads=_reads,
    )
}
