"""Products with FP4 weights, and with weights of a scale a channel, on a GPU: the bits of the FP8 products
where blocks of k are added in the same order, float64 everywhere, the same bits every time.

Run: pytest -m gpu tests/gpu/test_mixed_gpu.py        (about half a minute)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS
from jax_deepgemm.ops.mixed.problem import E4M3, FP4, FP4_BF16, INT8, NVFP4, MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import MixedConfig
from jax_deepgemm.ops.mixed.sm90.cost import STAGED, fitted
from jax_deepgemm.ops.mixed.sm90.source import mixed_source
from jax_deepgemm.quantization import QuantizedArray, dequantize, dequantize_fp4, expand_fp4
from tests.shared.arrays import normal
from tests.shared.fp4_numbers import BYTES, random, random_nvfp4

F32 = jnp.float32
DENSE = [(1, 64, 32), (5, 192, 384), (16, 4096, 7168), (37, 1088, 2880), (100, 512, 1536), (301, 128, 640)]
"""m, n, k."""
GROUPED = [(4, 24, 256, 512), (7, 61, 320, 160), (16, 33, 1024, 1536)]
"""Groups, rows of a masked one, n, k."""
CUTS = [
    (8, 4, 1, 1, 1),
    (16, 1, 4, 2, 1),
    (32, 2, 2, 1, 1),
    (24, 1, 2, 4, 2),
    (48, 1, 1, 8, 1),
    (96, 2, 1, 1, 1),
    (128, 2, 1, 1, 1),
    (160, 1, 1, 1, 1),
]
"""tokens, across, deep, split_k, blocks_per_sm."""
MANY = [(1, 128, 128), (5, 192, 384), (129, 576, 1536), (300, 1088, 640), (700, 512, 2880)]
MANY_GROUPED = [(4, 300, 256, 512), (3, 640, 192, 1280), (6, 520, 1024, 2048)]
"""Rows, n, k of staged kernels: tiles with one to four parts of 64 rows, half a tile of n, k of less than
a quad of scales."""
CUT_DENSE, CUT_GROUPED = (70, 704, 2176), (5, 90, 448, 1664)
CHANNELS = [(1, 5, 16, 8), (4, 37, 208, 520), (6, 300, 1296, 1032), (3, 64, 4096, 2880)]
"""Groups, rows, n, k."""
TYPES = [(jnp.int8, F32), (jnp.int8, jnp.bfloat16), (jnp.float8_e4m3fn, F32)]


def dense_problem(m: int, n: int, k: int, **more: Any) -> MixedProblem:
    return MixedProblem(m=m, n=n, k=k, out="float32", **more)


def grouped_problem(grouping: str, groups: int, m: int, n: int, k: int, **more: Any) -> MixedProblem:
    weights = groups if grouping == MASKED_ROWS else 1
    return MixedProblem(
        m, n, k, grouping=grouping, groups=groups, expected=m, segments=groups, weights=weights, **more
    )


def cut(problem: MixedProblem, which: tuple[int, ...]) -> MixedConfig | None:
    """The configuration with as many stages as fit, if it can run the problem."""
    tokens, across, deep, split_k, resident = which
    return fitted(problem, MixedConfig(tokens, across, deep, 0, split_k, resident), H200)


def staged(problem: MixedProblem) -> MixedConfig:
    config = fitted(problem, STAGED, H200)
    assert config is not None
    return config


def kernels() -> Iterator[Any]:
    for kind in (FP4, FP4_BF16, NVFP4):
        for shape in DENSE:
            yield dense_problem(*shape, weights_in=kind)
        for groups, m, n, k in GROUPED:
            yield grouped_problem(MASKED_ROWS, groups, m, n, k, out="float32", weights_in=kind)
            yield grouped_problem(ROWS, groups, groups * m, n, k, out="float32", weights_in=kind)
    for out in ("float32", "bfloat16"):
        yield from (staged_of(dense_problem(*shape), out) for shape in MANY)
        for groups, m, n, k in MANY_GROUPED:
            yield staged_of(grouped_problem(MASKED_ROWS, groups, m, n, k), out)
            yield staged_of(grouped_problem(ROWS, groups, groups * m, n, k), out)
    for which in CUTS:
        for kind in (FP4, FP4_BF16, NVFP4, INT8):
            one = dense_problem(*CUT_DENSE, weights_in=kind) if kind != INT8 else None
            groups, m, n, k = CUT_GROUPED
            both = (one, grouped_problem(ROWS, groups, groups * m, n, k, out="float32", weights_in=kind))
            for problem in filter(None, both):
                config = cut(problem, which)
                if config is not None:
                    yield mixed_source(problem, config)


def staged_of(problem: MixedProblem, out: str) -> Any:
    problem = replace(problem, out=out)
    return mixed_source(problem, staged(problem))


def rows(seed: int, *shape: int) -> QuantizedArray:
    return jdg.quantize(normal(seed, *shape))


def weight(seed: int, *shape: int) -> Any:
    return random(seed, *shape, lowest=121, highest=132)


def exact(x: Any) -> np.ndarray:
    return np.asarray(dequantize(x, F32), np.float64)


def close(got: Any, want: np.ndarray, within: float = 1e-3) -> None:
    got = np.asarray(got, np.float64)
    assert np.all(np.isfinite(got))
    assert np.abs(got - want).max() <= within * max(np.abs(want).max(), 1e-6)


def drawn_sizes(seed: int, groups: int, total: int) -> np.ndarray:
    """Of some rows fewer than there are, one of them empty."""
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(total - rng.integers(0, total // 4 + 1), rng.dirichlet(np.ones(groups)))
    sizes[rng.integers(groups)] = 0
    return sizes.astype(np.int32)


def owners(sizes: np.ndarray, total: int) -> np.ndarray:
    """The group of each row, the number of groups for none."""
    groups = len(sizes)
    return np.repeat(np.arange(groups + 1), [*sizes, total - sizes.sum()])


@pytest.mark.smoke
@pytest.mark.parametrize(("m", "n", "k"), DENSE)
def test_dense(m: int, n: int, k: int) -> None:
    a, w = rows(m, m, k), weight(n, n, k)
    got = jdg.fp8_gemm_nt(a, jdg.prepare_fp4(w), out_dtype=F32)
    close(got, exact(a) @ exact(expand_fp4(w)).T)
    rounded = jdg.fp8_gemm_nt(a, jdg.prepare_fp4(w))
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


@pytest.mark.parametrize(("groups", "m", "n", "k"), GROUPED)
def test_masked(groups: int, m: int, n: int, k: int) -> None:
    counts = np.random.default_rng(m).integers(0, m + 1, groups).astype(np.int32)
    counts[0] = 0
    beyond = np.arange(m)[None, :, None] >= counts[:, None, None]
    a, w = rows(m, groups, m, k), weight(n, groups, n, k)
    nan = jnp.asarray(np.nan, jnp.float8_e4m3fn)
    poisoned = QuantizedArray(jnp.where(beyond, nan, a.values), jnp.where(beyond, jnp.nan, a.scales), a.block)
    run = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, poisoned, masked_m=counts, out_dtype=F32)
    got = np.where(beyond, 0, run(jdg.prepare_fp4(w)))
    close(got, np.where(beyond, 0, np.einsum("gmk,gnk->gmn", exact(a), exact(expand_fp4(w)))))
    zeros = run(jdg.prepare_fp4(w), zero_rows=True)
    np.testing.assert_array_equal(zeros, got)


@pytest.mark.smoke
@pytest.mark.parametrize(("m", "n", "k"), MANY)
@pytest.mark.parametrize("out", [F32, jnp.bfloat16])
def test_many_rows(m: int, n: int, k: int, out: Any) -> None:
    """Of kernels that expand weights in shared memory: the order of k is that of few rows' kernels."""
    a, w = rows(m, m, k), jdg.prepare_fp4(weight(n, n, k))
    config = staged(dense_problem(m, n, k))
    got = [jdg.fp8_gemm_nt(a, w, out_dtype=out, config=config) for _ in range(20)]
    assert all(bool(jnp.array_equal(got[0], one)) for one in got)
    few = fitted(dense_problem(m, n, k), MixedConfig(32, 2, 1, 0), H200)
    np.testing.assert_array_equal(got[0], jdg.fp8_gemm_nt(a, w, out_dtype=out, config=few))


@pytest.mark.parametrize(("groups", "m", "n", "k"), MANY_GROUPED)
def test_many_rows_in_groups(groups: int, m: int, n: int, k: int) -> None:
    """NaN beside all groups; empty, full and drawn ones; rows beside them are zeros."""
    sizes = drawn_sizes(m, groups, groups * m)
    nobody = jnp.asarray(owners(sizes, groups * m) == groups)[:, None]
    a, w = rows(m, groups * m, k), jdg.prepare_fp4(weight(n, groups, n, k))
    nan = jnp.asarray(np.nan, jnp.float8_e4m3fn)
    poisoned = QuantizedArray(jnp.where(nobody, nan, a.values), jnp.where(nobody, jnp.nan, a.scales), a.block)

    def contiguous(config: MixedConfig | None) -> jax.Array:
        return jdg.m_grouped_fp8_gemm_nt_contiguous(poisoned, w, sizes, config=config)

    problem = grouped_problem(ROWS, groups, groups * m, n, k)
    few = fitted(problem, MixedConfig(32, 2, 1, 0), H200)
    want = np.where(nobody, 0, contiguous(few).astype(F32))
    for _ in range(20):
        np.testing.assert_array_equal(contiguous(staged(problem)).astype(F32), want)
    counts = np.minimum(sizes, m).astype(np.int32)
    counts[1] = m
    masked = functools.partial(
        jdg.m_grouped_fp8_gemm_nt_masked,
        jax.tree.map(lambda x: x.reshape(groups, m, x.shape[-1]), a),
        w,
        masked_m=counts,
        zero_rows=True,
    )
    problem = grouped_problem(MASKED_ROWS, groups, m, n, k, zero_rows=True)
    few = fitted(problem, MixedConfig(32, 2, 1, 0), H200)
    np.testing.assert_array_equal(masked(config=staged(problem)), masked(config=few))


@pytest.mark.parametrize(("groups", "m", "n", "k"), GROUPED)
def test_contiguous(groups: int, m: int, n: int, k: int) -> None:
    total = groups * m
    sizes = drawn_sizes(m, groups, total)
    owner = owners(sizes, total)
    a, w = rows(m, total, k), weight(n, groups, n, k)
    nobody = jnp.asarray(owner == groups)[:, None]
    values = jnp.where(nobody, jnp.asarray(np.nan, jnp.float8_e4m3fn), a.values)
    poisoned = QuantizedArray(values, jnp.where(nobody, jnp.nan, a.scales), a.block)
    got = jdg.m_grouped_fp8_gemm_nt_contiguous(
        poisoned, jdg.prepare_fp4(w), jnp.asarray(sizes), out_dtype=F32
    )
    matrices = np.concatenate([exact(expand_fp4(w)), np.zeros((1, n, k))])
    close(got, np.stack([row @ matrices[g].T for row, g in zip(exact(a), owner, strict=True)]))
    assert not np.any(np.asarray(got)[owner == groups])


@pytest.mark.parametrize("k", [512, 2048])
def test_bits_are_those_of_expanded_weights(k: int) -> None:
    counts = jnp.array([9, 0, 20, 16], jnp.int32)
    a, w = rows(0, 4, 20, k), weight(1, 4, 384, k)
    inside = np.arange(20)[None, :, None] < np.asarray(counts)[:, None, None]
    problem = grouped_problem(MASKED_ROWS, 4, 20, 384, k, out="float32")
    run = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, a, masked_m=counts, out_dtype=F32)
    got = run(jdg.prepare_fp4(w), config=cut(problem, (24, 2, 1, 1, 1)))
    want = run(expand_fp4(w))
    np.testing.assert_array_equal(np.where(inside, got, 0), np.where(inside, want, 0))


@pytest.mark.parametrize("which", CUTS, ids=str)
def test_every_cut(which: tuple[int, ...]) -> None:
    m, n, k = CUT_DENSE
    config = cut(dense_problem(m, n, k), which)
    assert config is not None
    a, w = rows(0, m, k), weight(1, n, k)
    run = jax.jit(functools.partial(jdg.fp8_gemm_nt, out_dtype=F32, config=config))
    got = run(a, jdg.prepare_fp4(w))
    close(got, exact(a) @ exact(expand_fp4(w)).T)
    for _ in range(20):
        np.testing.assert_array_equal(run(a, jdg.prepare_fp4(w)), got)


def test_the_last_slabs_of_an_operand() -> None:
    """n is odd in slabs of 64, and 128 rows of W are a tile."""
    problem = dense_problem(9, 320, 256)
    config = cut(problem, (16, 2, 1, 1, 1))
    a, w = rows(0, 9, 256), weight(1, 320, 256)
    got = jdg.fp8_gemm_nt(a, jdg.prepare_fp4(w), out_dtype=F32, config=config)
    close(got, exact(a) @ exact(expand_fp4(w)).T)


# bfloat16 rows ----------------------------------------------------------------------------------------------


PLAIN = {FP4_BF16: weight, NVFP4: random_nvfp4}


def plain_case(kind: str, m: int, n: int, k: int, *groups: int) -> tuple[jax.Array, Any, np.ndarray]:
    """Rows, weight, and the weight's numbers."""
    w = PLAIN[kind](n, *groups, n, k)
    return normal(m, *groups, m, k), jdg.prepare_fp4(w), np.asarray(dequantize_fp4(w), np.float64)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("m", "n", "k"), DENSE)
def test_dense_bf16(m: int, n: int, k: int, kind: str) -> None:
    a, w, numbers = plain_case(kind, m, n, k)
    got = jdg.bf16_gemm_nt(a, w, out_dtype=F32)
    close(got, np.asarray(a, np.float64) @ numbers.T, 1e-5)
    np.testing.assert_array_equal(jdg.bf16_gemm_nt(a, w), got.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("groups", "m", "n", "k"), GROUPED)
def test_grouped_bf16(groups: int, m: int, n: int, k: int, kind: str) -> None:
    a, w, numbers = plain_case(kind, m, n, k, groups)
    counts = np.random.default_rng(m).integers(0, m + 1, groups).astype(np.int32)
    beyond = np.arange(m)[None, :, None] >= counts[:, None, None]
    poisoned = jnp.where(beyond, jnp.nan, a)
    got = jdg.m_grouped_bf16_gemm_nt_masked(poisoned, w, counts, out_dtype=F32, zero_rows=True)
    want = np.einsum("gmk,gnk->gmn", np.asarray(a, np.float64), numbers)
    close(got, np.where(beyond, 0, want), 1e-5)
    rows_of_all, sizes = a.reshape(-1, k), drawn_sizes(m, groups, groups * m)
    owner = owners(sizes, groups * m)
    nobody = jnp.asarray(owner == groups)[:, None]
    product = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32)
    got = product(jnp.where(nobody, jnp.nan, rows_of_all), w, jnp.asarray(sizes))
    matrices = np.concatenate([numbers, np.zeros((1, n, k))])
    wide = np.asarray(rows_of_all, np.float64)
    close(got, np.stack([row @ matrices[g].T for row, g in zip(wide, owner, strict=True)]), 1e-5)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("which", CUTS, ids=str)
def test_every_cut_bf16(which: tuple[int, ...], kind: str) -> None:
    m, n, k = CUT_DENSE
    config = cut(dense_problem(m, n, k, weights_in=kind), which)
    assert config is not None
    a, w, numbers = plain_case(kind, m, n, k)
    run = jax.jit(functools.partial(jdg.bf16_gemm_nt, out_dtype=F32, config=config))
    got = run(a, w)
    close(got, np.asarray(a, np.float64) @ numbers.T, 1e-5)
    for _ in range(20):
        np.testing.assert_array_equal(run(a, w), got)


@pytest.mark.parametrize("which", CUTS, ids=str)
def test_nvfp4_is_expanded_exactly(which: tuple[int, ...]) -> None:
    """Every number of e2m1 times every scale of e4m3, NaN too: rows that pick columns give these numbers."""
    values = jnp.tile(jnp.asarray(BYTES), (128, 8))
    bits = np.arange(128 * 16, dtype=np.int64).reshape(128, 16) % 256
    scales = jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint8), jnp.float8_e4m3fn)
    w = jdg.Fp4Array(values, scales, jnp.float32(0.75))
    config = cut(dense_problem(256, 128, 256, weights_in=NVFP4), which)
    run = functools.partial(jdg.bf16_gemm_nt, out_dtype=F32, config=config)
    got = np.asarray(run(jnp.eye(256, dtype=jnp.bfloat16), jdg.prepare_fp4(w))).T
    bad = np.isnan(dequantize_fp4(w, F32)).any(axis=-1)
    assert np.isnan(got[bad]).all()
    assert 0 < bad.sum() < 128
    np.testing.assert_array_equal(got[~bad], dequantize_fp4(w, F32)[~bad])


def test_nvfp4_bits_where_sums_are_exact() -> None:
    """Those of the product in bfloat16 of the expanded weight, times the global scale in float32."""
    rng = np.random.default_rng(0)
    w = random_nvfp4(1, 4, 192, 1024)
    small = jnp.asarray(rng.integers(0x30, 0x41, w.scales.shape), jnp.uint8)  # 1/2 to 2
    w = jdg.Fp4Array(w.values, jax.lax.bitcast_convert_type(small, jnp.float8_e4m3fn), w.global_scale)
    a = jnp.asarray(rng.integers(-4, 5, (4, 40, 1024)), jnp.bfloat16)
    counts = jnp.array([40, 7, 1, 33], jnp.int32)
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_masked, a, masked_m=counts, out_dtype=F32)
    got = run(jdg.prepare_fp4(w), zero_rows=True)
    expanded = dequantize_fp4(jdg.Fp4Array(w.values, w.scales), jnp.bfloat16)
    want = run(expanded, zero_rows=True) * w.global_scale[:, None, None]
    np.testing.assert_array_equal(got, want)


# Weights with a scale a channel -----------------------------------------------------------------------------


def bytes_of(seed: int, kind: Any, *shape: int) -> jax.Array:
    """All numbers of int8, or of e4m3 but its NaN."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    if kind != jnp.int8:
        codes = np.where(codes & 127 == 127, codes & 128, codes)
    return jax.lax.bitcast_convert_type(jnp.asarray(codes), kind)


def channel_case(kind: Any, scale_type: Any, groups: int, total: int, n: int, k: int) -> tuple[Any, ...]:
    """Operands, of which rows that belong to no group are NaN, and the product in float64."""
    sizes = drawn_sizes(total, groups, total) if groups > 1 else np.array([total], np.int32)
    owner = owners(sizes, total)
    x = np.array(normal(total, total, k).astype(F32))
    w = jdg.PerChannelArray(
        bytes_of(n, kind, groups, k, n),
        (0.1 + jax.random.uniform(jax.random.key(k), (groups, n))).astype(scale_type),
    )
    matrices = np.asarray(w.values.astype(F32), np.float64) * np.asarray(w.scales, np.float64)[:, None]
    matrices = np.concatenate([matrices, np.zeros((1, k, n))])
    want = np.stack([row @ matrices[g] for row, g in zip(x.astype(np.float64), owner, strict=True)])
    x[owner == groups] = np.nan
    return jnp.asarray(x).astype(jnp.bfloat16), w, jnp.asarray(sizes), want, owner


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "scale_type"), TYPES)
@pytest.mark.parametrize("shape", CHANNELS)
def test_per_channel(kind: Any, scale_type: Any, shape: tuple[int, ...]) -> None:
    x, w, sizes, want, owner = channel_case(kind, scale_type, *shape)
    got = jdg.ragged_dot(x, w, sizes, preferred_element_type=F32)
    close(got, want, 2e-5)
    assert not np.any(np.asarray(got)[owner == shape[0]])
    rounded = jdg.grouped_linear(x, w, sizes, recipe="bf16", weight_layout="kn")
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


@pytest.mark.parametrize("which", [one for one in CUTS if one[3] == 1], ids=str)
@pytest.mark.parametrize("kind", [INT8, E4M3])
def test_every_cut_per_channel(kind: str, which: tuple[int, ...]) -> None:
    groups, m, n, k = CUT_GROUPED
    total = groups * m
    config = cut(grouped_problem(ROWS, groups, total, n, k, out="float32", weights_in=kind), which)
    assert config is not None
    dtype = jnp.int8 if kind == INT8 else jnp.float8_e4m3fn
    x, w, sizes, want, _ = channel_case(dtype, F32, groups, total, n, k)
    run = jax.jit(functools.partial(jdg.ragged_dot, preferred_element_type=F32, config=config))
    got = run(x, w, sizes)
    close(got, want, 2e-5)
    for _ in range(20):
        np.testing.assert_array_equal(run(x, w, sizes), got)
