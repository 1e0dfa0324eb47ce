"""Rows of the benchmark: heads with a matrix each, and sums of products, beside jnp.einsum."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BOTH, CLOCK, RATES, Beside, Fields, Row, Table, recorded_rows
from jax_deepgemm.ops.einsum.api import bf16_einsum, fp8_einsum
from jax_deepgemm.ops.einsum.form import parse
from jax_deepgemm.ops.einsum.shapes import shape_of
from jax_deepgemm.ops.gemm.bench_linear import GEMM_PREFIX
from jax_deepgemm.ops.quantize.api import quantize

UP, DOWN, SUM = "bhr,hdr->bhd", "bhd,hdr->bhr", "bmk,bnk->mn"
KEYS = ("type", "expr", "batch", "m", "n", "k")
SHAPES = (
    ("bf16", UP, 128, 4096, 128, 512),
    ("bf16", UP, 128, 128, 128, 512),
    ("bf16", UP, 128, 4, 128, 512),
    ("bf16", DOWN, 128, 4096, 512, 128),
    ("bf16", DOWN, 128, 128, 512, 128),
    ("bf16", UP, 8, 4096, 1024, 4096),
    ("fp8", UP, 8, 4096, 1024, 4096),
    ("fp8", UP, 8, 128, 1024, 4096),
    ("bf16", SUM, 129, 128, 384, 128),
    ("bf16", SUM, 4096, 128, 384, 128),
    ("bf16", SUM, 4096, 256, 256, 256),
)
"""Type, einsum, heads (or products that are added up), and of each m, n, k."""
SMALL = (("bf16", UP, 3, 8, 16, 24), ("fp8", UP, 2, 8, 128, 128), ("bf16", SUM, 3, 8, 16, 24))


def _rows(small: bool) -> Iterator[Row]:
    for values in SMALL if small else SHAPES:
        yield _row(*values)


def _row(kind: str, expr: str, batch: int, m: int, n: int, k: int) -> Row:
    results, size = 1 if expr == SUM else batch, 2 if kind == "bf16" else 1
    function = bf16_einsum if kind == "bf16" else fp8_einsum
    fields = dict(zip(KEYS, (kind, expr, batch, m, n, k), strict=True))
    return Row(
        name=" ".join(["einsum", *(f"{key}={value}" for key, value in fields.items())]),
        fields=fields,
        function=functools.partial(function, expr),
        draw=functools.partial(_draw, kind, expr, batch, m, n, k),
        flops=2 * batch * m * n * k,
        bytes=size * batch * (m + n) * k + 2 * results * m * n,
        operands=lambda drawn: drawn[:2],
        prefix=GEMM_PREFIX,
        baseline=Beside(
            "jnp.einsum, BF16", functools.partial(_plain, expr), operands=lambda drawn: drawn[2:]
        ),
    )


def _plain(expr: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(expr, a, b, preferred_element_type=jnp.bfloat16)


def _draw(kind: str, expr: str, batch: int, m: int, n: int, k: int) -> tuple[Any, ...]:
    """The operands, and those of the baseline."""
    form = parse(expr)
    keys = jax.random.split(jax.random.key(0))
    plain = tuple(
        jax.random.normal(key, shape_of(form, term, batch, m, n, k), jnp.bfloat16)
        for key, term in zip(keys, (form.a, form.b), strict=True)
    )
    if kind == "bf16":
        return *plain, *plain
    return quantize(plain[0]), quantize(plain[1], (128, 128)), *plain


def _recorded(tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    return {tuple(row[key] for key in KEYS): row for row in recorded_rows(tables, "einsum")}


TABLES = {
    "einsum": Table(
        "einsum: heads that have a matrix each, and sums of products; m, n, k of each of the batch",
        KEYS,
        _rows,
        columns=(*RATES, *BESIDE_BOTH, CLOCK),
        baseline="jnp.einsum",
        peer="DeepGEMM",
        recorded=_recorded,
        tuned=True,
    )
}
