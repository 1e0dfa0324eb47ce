"""Calls of mixed-input products for compute-sanitizer: every kind of configuration, tails of m and k, groups
that start anywhere, sizes that are wrong, NaN outside all groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.sanitize import FEW_SMS, Case, on_few
from jax_deepgemm.ops.gemm.api import bf16_gemm_nt, fp8_gemm_nt
from jax_deepgemm.ops.grouped.api import (
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from jax_deepgemm.ops.grouped.sanitize import BAD, GROUPS, SIZES, USED
from jax_deepgemm.ops.mixed.family import FAMILY
from jax_deepgemm.ops.mixed.problem import FP4_BF16, NVFP4, MixedProblem
from jax_deepgemm.ops.quantize.api import quantize
from jax_deepgemm.ops.quantize.fp4 import quantize_fp4
from jax_deepgemm.ops.quantize.per_channel import quantize_per_channel
from jax_deepgemm.ops.quantize.prepared_fp4 import prepare_fp4
from jax_deepgemm.ops.ragged_dot.api import ragged_dot

ROWS, N, K, CAPACITY = 300, 192, 1056, 100  # tails of m and k, an odd number of slabs


def cases() -> Iterator[Case]:
    """Yields every kind of configuration, then groups."""
    rng = np.random.default_rng(2)

    def normal(*shape: int, good: int | None = None) -> jax.Array:
        drawn = rng.standard_normal(shape)
        drawn[good:] = drawn[good:] if good is None else np.nan
        return jnp.asarray(drawn, jnp.bfloat16)

    master = normal(GROUPS, N, K)
    weights = prepare_fp4(quantize_fp4(master))
    for m in (5, 100):
        a = quantize(normal(m, K))
        for config in kinds_of_config(MixedProblem(m=m, n=N, k=K)):
            few = on_few(fp8_gemm_nt, FEW_SMS if m > 5 else None, config=config)
            yield Case(f"mixed m={m} {config}", few, (a, weights[0]))
    yield Case("mixed to float32", on_few(fp8_gemm_nt, out_dtype=jnp.float32), (a, weights[1]))
    short = quantize(normal(20, K - 20))
    yield Case("mixed k padded", on_few(fp8_gemm_nt), (short, weights[2]))
    sizes, poisoned, whole = (
        jnp.asarray(SIZES),
        quantize(normal(ROWS, K, good=USED)),
        quantize(normal(ROWS, K)),
    )
    grouped = m_grouped_fp8_gemm_nt_contiguous
    yield Case("mixed grouped", on_few(grouped), (poisoned, weights, sizes))
    yield Case("mixed grouped, few rows", on_few(grouped, expected_m=4), (poisoned, weights, sizes // 16))
    staged = on_few(grouped, expected_m=256)
    yield Case("mixed grouped, many rows", staged, (poisoned, weights, sizes))
    alone = jnp.where(jnp.arange(GROUPS) == 1, ROWS, 0)  # rows of two tiles, of four and of one part
    yield Case("mixed grouped, all rows in one", staged, (whole, weights, alone))
    for name, wrong in BAD.items():
        yield Case(f"mixed grouped, many rows, {name}", staged, (whole, weights, jnp.asarray(wrong)))
    for name, wrong in BAD.items():
        yield Case(f"mixed grouped, {name}", on_few(grouped), (whole, weights, jnp.asarray(wrong)))
    nvfp4: Any = quantize(master, (1, 16), jnp.float4_e2m1fn)
    plain = normal(ROWS, K, good=USED), normal(ROWS, K)
    yield from _bf16("bf16", FP4_BF16, *plain, weights)
    yield from _bf16("nvfp4", NVFP4, *plain, prepare_fp4(nvfp4))
    index = jnp.asarray(np.repeat([2, -1, 0, 3, -1], [100, 28, 50, 77, 45]), jnp.int32)
    yield Case("mixed grouped, index", lambda a, w, i: grouped(a, w, m_indices=i), (whole, weights, index))
    deep = normal(GROUPS, CAPACITY, K)
    yield from _masked("masked", m_grouped_fp8_gemm_nt_masked, quantize(deep), weights)
    yield from _masked("bf16 masked", m_grouped_bf16_gemm_nt_masked, deep, weights)
    yield from _masked("nvfp4 masked", m_grouped_bf16_gemm_nt_masked, deep, prepare_fp4(nvfp4))
    yield from _per_channel(normal(ROWS, K, good=USED), normal(ROWS, K), normal(GROUPS, K, N + 16))


def _masked(name: str, masked: Any, a: Any, weights: Any) -> Iterator[Case]:
    counts = jnp.asarray([CAPACITY, 0, 3, 70], jnp.int32)

    def valid(a: Any, w: Any, counts: jax.Array) -> jax.Array:
        """What is outside the groups is not written."""
        d = on_few(masked)(a, w, counts)
        return jnp.where(jnp.arange(CAPACITY)[:, None] < counts[:, None, None], d, 0)

    yield Case(f"mixed {name}", valid, (a, weights, counts))
    zeroing = on_few(masked, zero_rows=True, expected_m=8)
    yield Case(f"mixed {name} zero_rows, few rows", zeroing, (a, weights, counts))
    yield Case(
        f"mixed {name}, many rows", on_few(masked, zero_rows=True, expected_m=256), (a, weights, counts)
    )


def _bf16(name: str, kind: str, poisoned: jax.Array, whole: jax.Array, weights: Any) -> Iterator[Case]:
    """bfloat16 rows."""
    for config in kinds_of_config(MixedProblem(m=5, n=N, k=K, weights_in=kind)):
        yield Case(f"mixed {name} {config}", on_few(bf16_gemm_nt, config=config), (whole[:5], weights[0]))
    grouped, sizes = m_grouped_bf16_gemm_nt_contiguous, jnp.asarray(SIZES)
    yield Case(f"mixed {name} grouped", on_few(grouped), (poisoned, weights, sizes))
    for what, wrong in BAD.items():
        yield Case(f"mixed {name} grouped, {what}", on_few(grouped), (whole, weights, jnp.asarray(wrong)))


def _per_channel(poisoned: jax.Array, whole: jax.Array, master: jax.Array) -> Iterator[Case]:
    """k and n have tails of boxes."""
    sizes = jnp.asarray(SIZES)
    for kind in (jnp.int8, jnp.float8_e4m3fn):
        w = quantize_per_channel(master, kind)
        name = f"per channel {np.dtype(kind).name}"
        yield Case(name, on_few(ragged_dot), (poisoned, w, sizes))
        yield Case(f"{name}, few rows", on_few(ragged_dot, expected_m=4), (poisoned, w, sizes // 16))
        for wrong, bad in BAD.items():
            yield Case(f"{name}, {wrong}", on_few(ragged_dot), (whole, w, jnp.asarray(bad)))


def kinds_of_config(problem: MixedProblem) -> list[Any]:
    """The cheapest configuration of each kind: warpgroups side by side, in turns, cluster, blocks per SM."""
    cheapest: dict[tuple[Any, ...], Any] = {}
    for config, _ in FAMILY.ranked(problem, H200):
        kind = (config.across, config.deep, config.split_k > 1, config.blocks_per_sm, config.staged)
        cheapest.setdefault(kind, config)
    return list(cheapest.values())
