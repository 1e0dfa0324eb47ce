"""Rows of the benchmark: projections of wide rows with the sums of squares, beside DeepGEMM and XLA."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BOTH, CLOCK, RATES, Beside, Fields, Row, Table, recorded_rows
from jax_deepgemm.ops.hc_prenorm.api import hc_prenorm_gemm

TOKENS = (1, 13, 64, 137, 512, 4096, 8192, 16384)
N, K = 24, 4 * 7168
"""Four streams of 7168: 4 + 4 + 16 mixing numbers of each token."""


def _draw(m: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    names = jax.random.split(jax.random.key(0))
    return jax.random.normal(names[0], (m, k), jnp.bfloat16), jax.random.normal(names[1], (n, k))


def _plain(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = a.astype(jnp.float32)
    return jnp.dot(wide, b.T), jnp.sum(wide * wide, axis=-1)


def _rows(small: bool) -> Iterator[Row]:
    for m, n, k in ((4, 8, 200),) if small else ((m, N, K) for m in TOKENS):
        yield Row(
            name=f"hc_prenorm m={m} n={n} k={k}",
            fields={"m": m, "n": n, "k": k},
            function=hc_prenorm_gemm,
            draw=functools.partial(_draw, m, n, k),
            flops=2 * m * n * k,
            bytes=k * (2 * m + 4 * n) + 4 * m * (n + 1),
            baseline=Beside("jnp", _plain),
        )


def _recorded(tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    """DeepGEMM's kernel alone, which leaves 16 splits to be added up."""
    return {(row["m"], row["n"], row["k"]): row for row in recorded_rows(tables, "hc_prenorm")}


TABLES = {
    "hc_prenorm": Table(
        "Projections of hyper-connections with sums of squares, TF32; DeepGEMM's without adding up 16 splits",
        ("m", "n", "k"),
        _rows,
        columns=(*RATES, *BESIDE_BOTH, CLOCK),
        baseline="jnp",
        peer="DeepGEMM",
        recorded=_recorded,
        part=lambda fields: "",
        order=2,
        tuned=True,
    )
}
