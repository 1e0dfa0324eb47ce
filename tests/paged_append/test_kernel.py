"""The kernels that append to a cache without a GPU: their own source on a CPU, registers, plans."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.paged_append import kernels
from jax_deepgemm.ops.paged_append.family import FAMILY
from jax_deepgemm.ops.paged_append.problem import AppendProblem
from tests.shared import attention_oracle as oracle
from tests.shared import native_kernels
from tests.shared.native_kernels import NativeCall

pytestmark = pytest.mark.any_version

E4M3, BF16, F32 = "float8_e4m3fn", "bfloat16", "float32"
DENSE = AppendProblem(5, 6, 32, 32, 2, 3, 16)
PROBLEMS = [
    DENSE,
    dataclasses.replace(DENSE, pairs=16, heads=12),
    dataclasses.replace(DENSE, pairs=8, interleaved=True, dtype=F32, stored=E4M3, heads=6),
    dataclasses.replace(DENSE, v_head_dim=16, pairs=5, stored=E4M3, kv_heads=1, heads=3),
    dataclasses.replace(DENSE, head_dim=48, pairs=9, interleaved=True, kv_heads=1),
]


def drawn(p: AppendProblem) -> dict[str, np.ndarray]:
    """Operands and the cache, which is NaN. Slots and positions are of all sizes."""
    rng = np.random.default_rng(0)
    capacity = p.pages * p.page
    found = {
        "k_new": rng.standard_normal((p.tokens, p.kv_heads, p.head_dim)).astype(jnp.dtype(p.dtype)),
        "v_new": rng.standard_normal((p.tokens, p.kv_heads, p.v_head_dim)).astype(jnp.dtype(p.dtype)),
        "slots": np.array([capacity - 1, -1, 0, capacity, 17], np.int32),
        "k_scale": rng.uniform(0.001, 0.05, (p.layers, p.kv_heads)).astype(np.float32),
        "v_scale": rng.uniform(0.001, 0.05, (p.layers, p.kv_heads)).astype(np.float32),
        "layer": np.array([1], np.int32),
        "positions": np.array([0, 3, 999_983, 2**31 - 1, -5], np.int32),
        "inv_freq": (10000.0 ** -(np.arange(p.pairs) / max(p.pairs, 1))).astype(np.float32),
        "q": rng.standard_normal((p.tokens, p.heads, p.head_dim)).astype(jnp.dtype(p.dtype)),
    }
    pool = (p.layers, p.pages, p.kv_heads, p.page)
    found["k"] = np.full((*pool, p.head_dim), np.nan).astype(jnp.dtype(p.stored))
    found["v"] = np.full((*pool, p.v_head_dim), np.nan).astype(jnp.dtype(p.stored))
    found["turned"] = np.full_like(found["q"], np.nan)
    return found


def expected(p: AppendProblem, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    def turned(x: np.ndarray) -> np.ndarray:
        return oracle.rotary(x, given["positions"], given["inv_freq"], p.interleaved)

    results = []
    for name, rows in (("k", turned(given["k_new"])), ("v", given["v_new"].astype(np.float64))):
        pool, scale = given[name].copy(), given[f"{name}_scale"][1] if p.stored == E4M3 else None
        pool[1] = oracle.append(pool[1], rows, given["slots"], scale)
        results.append(pool)
    return [*results, turned(given["q"]).astype(given["q"].dtype)] if p.heads else results


def close(got: Any, want: Any) -> None:
    """Equal, but for roundings of what is nearly between two numbers of the type."""
    step = {1: 2**-3, 2: 2**-7, 4: 1e-6}[got.dtype.itemsize]
    got, want = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=step, atol=1e-6)
    if step > 1e-6:
        assert np.mean((got != want) & ~np.isnan(want)) < 0.002


def call(p: AppendProblem, given: dict[str, np.ndarray]) -> NativeCall:
    names = ["k_new", "v_new", "slots", "k_scale", "v_scale", "layer"]
    names += ["positions", "inv_freq"] * (p.pairs > 0) + ["q"] * (p.heads > 0)
    results = ["k", "v", *["turned"] * (p.heads > 0)]
    plan = FAMILY.plan(p, H200, {})
    return NativeCall(
        kernels.kernel_source(p), plan, [given[name] for name in names], [given[name] for name in results]
    )


def test_the_kernels_themselves_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    given = [drawn(p) for p in PROBLEMS]
    nowhere = {**given[1], "layer": np.array([2], np.int32)}
    calls = [*map(call, PROBLEMS, given), call(PROBLEMS[1], nowhere)]
    *found, skipped = native_kernels.run(tmp_path, calls)
    for p, operands, results in zip(PROBLEMS, given, found, strict=True):
        for got, want in zip(results, expected(p, operands), strict=True):
            close(got, want)
    assert all(np.isnan(pool.astype(np.float32)).all() for pool in skipped[:2])
    close(skipped[2], expected(PROBLEMS[1], nowhere)[2])


@pytest.mark.parametrize("stored", [BF16, "float16", E4M3])
def test_plans(stored: str) -> None:
    """Each compiles without spills; a block's threads and the grid reach every token and head."""
    pytest.importorskip("cuda.core")
    shapes = {
        BF16: [(128, 128, 64), (64, 64, 0)],
        "float16": [(256, 256, 128), (80, 80, 10)],
        E4M3: [(192, 128, 32), (112, 112, 7)],
    }
    for (d, dv, pairs), tokens in itertools.product(shapes[stored], (1, 1000)):
        dtype = F32 if d > 128 else BF16
        p = AppendProblem(tokens, 5, d, dv, 1, 10, 64, dtype, stored, pairs, heads=35 if pairs else 0)
        *copies, launch = FAMILY.plan(p, H200, {}).steps
        assert [step.num_bytes for step in copies] == [
            10 * 64 * 5 * one * (1 if stored == E4M3 else 2) for one in (d, dv)
        ]
        assert not launch.kernel.report.problems()
        assert launch.kernel.report.registers * launch.block <= 65_536 // 2
        assert launch.block // kernels.lanes_of(p) * launch.grid[0] >= tokens
        assert launch.grid[1] == 2 * 2 + (9 if pairs else 0)


def test_every_gpu_since_ampere_has_them() -> None:
    pytest.importorskip("cuda.core")
    for arch in ("80", "89", "120a"):
        chip = dataclasses.replace(H200, arch=arch)
        for p in PROBLEMS[1:3]:
            assert not FAMILY.plan(p, chip, {}).steps[-1].kernel.report.problems()


def test_what_cannot_run() -> None:
    with pytest.raises(ValueError, match="heads have 272 and 32 numbers, at most 256"):
        FAMILY.choose(dataclasses.replace(DENSE, head_dim=272), H200)
