"""Rows of the benchmark: FP8 products with scales for 32 of k beside BF16's, dense and masked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Fields, Row, Table
from jax_deepgemm.ops.gemm.api import bf16_gemm_nt, fp8_gemm_nt
from jax_deepgemm.ops.gemm.bench import SMALL_M, first_rows
from jax_deepgemm.ops.grouped.api import m_grouped_bf16_gemm_nt_masked, m_grouped_fp8_gemm_nt_masked
from jax_deepgemm.ops.grouped.bench_rows import draw_sizes
from jax_deepgemm.ops.quantize.api import quantize

BLOCKS = {"32x32": (32, 32), "1x32": (1, 32)}
DENSE = ((7168, 16384, (1, 64)), (4096, 7168, (16, 64, 4096)), (7168, 2048, (4096,)))
MASKED = ((32, 20, 670, 1024, 6144, 7168), (6, 1024, 6261, 4096, 4096, 4096))
"""Groups, rows expected in each, rows in all, rows of A for each group, n, k."""
BF16 = "BF16"


def _row(
    name: str,
    fields: Fields,
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    draw: Callable[[], Any],
    rows: int,
    groups: int,
    counted: Callable[[Any], Any],
    **more: Any,
) -> Row:
    """functions: that in FP8 and BF16's. rows: those that count. counted: A, of what is drawn of it."""
    n, k, fine = fields["n"], fields["k"], functools.partial(_bytes, fields["scales"])
    ours, bf16 = functions
    return Row(
        name=f"fine {name}",
        fields={"groups": groups, **fields},
        function=ours,
        draw=draw,
        flops=2 * rows * n * k,
        bytes=groups * fine(n, k) + _bytes("1x32", rows, k) + 2 * rows * n,
        operands=lambda drawn: (counted(drawn[0]), drawn[1]),
        baseline=Beside(BF16, bf16, lambda drawn: (counted(drawn[2]), drawn[3]), ours=True, **more),
        read_flush=fields["op"] == "dense" and fields["m"] <= SMALL_M,
        **more,
    )


def _bytes(scales: str, rows: int, k: int) -> int:
    """Of FP8 values and their scales."""
    step = BLOCKS[scales][0]
    return rows * k + 4 * -(-rows // step) * -(-k // 32)


def _first(rows: int, a: Any) -> Any:
    return first_rows(a, rows)


def _all(a: Any) -> Any:
    return a


def _dense(scales: str, n: int, k: int, counts: tuple[int, ...]) -> Iterator[Row]:
    draw = functools.partial(_draw, scales, (max(counts), k), (n, k))
    for m in counts:
        fields = {"op": "dense", "scales": scales, "m": m, "n": n, "k": k}
        functions = fp8_gemm_nt, bf16_gemm_nt
        counted = functools.partial(_first, m)
        yield _row(f"{scales} m={m} n={n} k={k}", fields, functions, draw, m, 1, counted)


def _masked(scales: str, m: int, n: int, k: int, sizes: tuple[int, ...], capacity: int) -> Row:
    groups = len(sizes)
    fields = {"op": "masked", "scales": scales, "m": m, "n": n, "k": k, "group_sizes": list(sizes)}
    fp8, bf16 = m_grouped_fp8_gemm_nt_masked, m_grouped_bf16_gemm_nt_masked
    functions = functools.partial(fp8, expected_m=m), functools.partial(bf16, expected_m=m)
    draw = functools.partial(_draw, scales, (groups, capacity, k), (groups, n, k))
    name = f"{scales} masked groups={groups} m={m} n={n} k={k}"
    counts = (np.asarray(sizes, np.int32),)
    return _row(name, fields, functions, draw, sum(sizes), groups, _all, constants=counts)


@functools.partial(jax.jit, static_argnums=range(3))
def _draw(scales: str, rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Any, ...]:
    """A and B, standard normal, in FP8, then in BF16."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, (rows, weights), strict=True))
    return quantize(a, (1, 32)), quantize(b, BLOCKS[scales]), a, b


def rows(small: bool) -> Iterator[Row]:
    """The table's rows."""
    for scales in BLOCKS:
        for n, k, counts in ((128, 256, (1, 16)),) if small else DENSE:
            yield from _dense(scales, n, k, counts)
        for groups, m, total, capacity, n, k in ((2, 8, 14, 16, 128, 256),) if small else MASKED:
            yield _masked(scales, m, n, k, draw_sizes(groups, m, total), capacity)


def _read_bytes(fields: Fields) -> int | None:
    """Bytes of A, B and their scales, where reading them is most of the work."""
    if fields["op"] != "dense" or fields["m"] > SMALL_M:
        return None
    return _bytes(fields["scales"], fields["n"], fields["k"]) + _bytes("1x32", fields["m"], fields["k"])


TABLE = Table(
    "FP8 with scales for 32 of k: A 1x32, B as it says (1x32: MXFP8), dense and masked (m expected in each"
    " group), beside BF16",
    ("op", "scales", "groups", "m", "n", "k"),
    rows,
    columns=(*RATES, *BESIDE_BASELINE, CLOCK),
    baseline=BF16,
    tuned=True,
    type="fp8",
    reads=_read_bytes,
    part=lambda fields: f"{fields['scales']}, {'m <= 64' if fields['m'] <= SMALL_M else 'm > 64'}",
)
