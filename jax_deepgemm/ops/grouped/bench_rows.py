"""Rows of grouped GEMMs for the benchmark: how operands are drawn, and what is counted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import Row
from jax_deepgemm.ops.gemm.bench import first_rows
from jax_deepgemm.ops.grouped.api import (
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from jax_deepgemm.ops.quantize.api import quantize

Sizes = tuple[int, ...]
UNIT = 128  # rows that DeepGEMM pads groups to


@functools.cache
def draw_sizes(groups: int, expected: int, total: int, unit: int = 1) -> Sizes:
    """Returns sizes of 0.7 to 1.3 times the expected whose sum, each padded to `unit`, is `total`.

    They are those of the first seed that gives this sum, so always the same.

    >>> sizes = draw_sizes(32, 256, 83 * 128, unit=128)
    >>> sum(padded(sizes)) == 83 * 128, all(179 <= size <= 332 for size in sizes)
    (True, True)
    """
    for seed in itertools.count():
        drawn = np.random.default_rng(seed).uniform(0.7, 1.3, groups) * expected
        sizes = tuple(int(size) for size in drawn)
        if sum(padded(sizes, unit)) == total:
            return sizes
    raise AssertionError


def padded(sizes: Sequence[int], unit: int = UNIT) -> Sizes:
    """Returns each size rounded up to a multiple of `unit`."""
    return tuple(-(-size // unit) * unit for size in sizes)


def contiguous(kind: str, how: str, m: int, n: int, k: int, sizes: Sizes) -> Row:
    """Returns a row of M-grouped contiguous products.

    >>> row = contiguous("fp8", "drawn", 100, 256, 512, (90, 110))
    >>> row.name, row.flops
    ('m_grouped fp8 drawn groups=2 m=100 n=256 k=512', 52428800)

    Args:
      kind: "fp8" or "bf16".
      how: "padded" or "drawn", what the sizes are.
      m: rows expected in each group.
      sizes: rows of each group.
    """
    function = m_grouped_fp8_gemm_nt_contiguous if kind == "fp8" else m_grouped_bf16_gemm_nt_contiguous
    total, most = sum(sizes), sum(padded(sizes))  # one program draws for padded and for drawn sizes
    weights = (len(sizes), n, k)

    def operands(drawn: Any) -> tuple[Any, Any]:
        return first_rows(drawn[0], total), drawn[1]

    draw = functools.partial(_draw, kind, (most, k), weights)
    return _row("m_grouped", kind, how, (m, n, k), sizes, function, draw, operands=operands)


def masked(kind: str, m: int, n: int, k: int, sizes: Sizes, capacity: int) -> Row:
    """Returns a row of M-grouped masked products; A has `capacity` rows for each group."""
    function = m_grouped_fp8_gemm_nt_masked if kind == "fp8" else m_grouped_bf16_gemm_nt_masked
    groups = len(sizes)
    draw = functools.partial(_draw, kind, (groups, capacity, k), (groups, n, k))
    run = functools.partial(function, expected_m=m)
    return _row("masked", kind, "drawn", (m, n, k), sizes, run, draw)


def k_grouped(kind: str, m: int, n: int, k: int, sizes: Sizes) -> Row:
    """Returns a row of K-grouped products with C; `k` is expected of each group, `sizes` are what it is."""
    function = k_grouped_fp8_gemm_nt_contiguous if kind == "fp8" else k_grouped_bf16_gemm_tn_contiguous
    draw = functools.partial(_draw_inner, kind, sum(sizes), len(sizes), m, n)

    def run(a: Any, b: Any, c: jax.Array, sizes: jax.Array) -> jax.Array:
        return function(a, b, sizes, c, out_dtype=jnp.float32)

    return _row("k_grouped", kind, "drawn", (m, n, k), sizes, run, draw, carry=2)


def _row(
    table: str,
    kind: str,
    how: str,
    mnk: tuple[int, int, int],
    sizes: Sizes,
    function: Callable[..., Any],
    draw: Callable[[], Any],
    **more: Any,
) -> Row:
    groups, total, operand = len(sizes), sum(sizes), 2 if kind == "bf16" else 1
    m, n, k = mnk
    inner = table == "k_grouped"
    if inner:
        moved = operand * total * (m + n) + 8 * groups * m * n
    else:  # of A, B and D; rows outside all groups and scales not counted
        moved = operand * groups * n * k + total * (operand * k + 2 * n)
    fields = {"type": kind, "sizes": how, "groups": groups, "m": m, "n": n, "k": k}
    return Row(
        name=f"{table} {kind} {how} groups={groups} m={m} n={n} k={k}",
        fields=fields | {"group_sizes": list(sizes)},
        function=function,
        draw=draw,
        flops=2 * total * n * (m if inner else k),
        bytes=moved,
        constants=(np.asarray(sizes, np.int32),),
        session=(groups, *mnk),
        **more,
    )


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=range(3))
def _draw(kind: str, rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Any, Any]:
    """A and B, standard normal."""
    a, b = _normal(0, *rows), _normal(1, *weights)
    return (quantize(a), quantize(b, block=(128, 128))) if kind == "fp8" else (a, b)


@functools.partial(jax.jit, static_argnums=range(5))
def _draw_inner(kind: str, total: int, groups: int, m: int, n: int) -> tuple[Any, Any, jax.Array]:
    """A and B, in FP8 as [rows, k], and C of ones."""
    a, b = _normal(0, total, m), _normal(1, total, n)
    c = jnp.ones((groups, m, n), jnp.float32)
    return (quantize(a.T), quantize(b.T), c) if kind == "fp8" else (a, b, c)
