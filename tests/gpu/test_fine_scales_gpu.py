"""FP8 products with scales for 32 of k on an H200: bits where sums have an order, else float64;
groups, batches, poison, equal reruns.

Run: pytest -m gpu tests/gpu/test_fine_scales_gpu.py        (seconds, besides compiling)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm as jdg
from jax_deepgemm import deep_gemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import fit_stages
from jax_deepgemm.ops.gemm.sm90.cost import _PER_BLOCK, persistent_tiles
from jax_deepgemm.ops.gemm.sm90.source import kernel_source
from jax_deepgemm.quantization import QuantizedArray
from tests.shared.fine_scales import ROW, SQUARE, exact, fused, normal, operand
from tests.shared.gemm_oracle import calc_diff
from tests.shared.gemm_products import ORACLE_LIMIT
from tests.shared.gpu_programs import program

F32 = jnp.float32
BLOCKS = {"block_32": SQUARE, "vector_32": ROW}
SHAPES = ((5, 64, 256), (1, 8, 31), (200, 584, 1184), (130, 515, 1088), (300, 1032, 2064))
DIFFERENT = ((264, 392, 400), (17, 264, 1536))  # of other operand types
GROUPS, ROWS, N, K = 4, 160, 264, 336
SIZES = (37, 0, 100, 3)
COUNTS = (160, 0, 17, 64)
PLAIN, NARROW = GemmConfig(128, 128, 4, slabs=2), GemmConfig(128, 64, 4, slabs=2)


def problem(shape: tuple[int, int, int], b_scales: str, **options: Any) -> GemmProblem:
    return GemmProblem(*shape, b_scales=b_scales, batched=(), **options)


def tiles(p: GemmProblem) -> list[GemmConfig]:
    """One of each kind of configuration, with as many stages as fit."""
    found = [*persistent_tiles(_PER_BLOCK, p), *(GemmConfig(rows, 64, 0) for rows in (192, 256))]
    if p.m <= 200:
        found += [
            GemmConfig(tokens, weights, 0, True, split, resident)
            for tokens, weights, split, resident in (
                (8, 64, 1, 2),
                (16, 128, 1, 1),
                (32, 64, 4, 2),
                (64, 64, 2, 1),
                (64, 128, 1, 1),
                (128, 64, 1, 1),
            )
        ]
        found += [GemmConfig(64, 32, 0, split_k=2), GemmConfig(128, 64, 0, split_k=4)]
    fitted = [fit_stages(p, one, H200) for one in found]
    assert any(fitted)
    return [one for one in fitted if one is not None]


def kernels() -> Iterator[KernelSource]:
    """What the tests of this file need (kernels.py)."""
    for shape in SHAPES:
        for b_scales in BLOCKS:
            p = problem(shape, b_scales, out="float32")
            yield from (kernel_source(p, config) for config in tiles(p))


@pytest.mark.smoke
@pytest.mark.parametrize("b_scales", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_each_configuration(shape, b_scales):
    m, n, k = shape
    rng = np.random.default_rng(m)
    a, b = operand(rng, (m, k), ROW), operand(rng, (n, k), BLOCKS[b_scales])
    configs = tiles(problem(shape, b_scales, out="float32"))
    wanted = functools.cache(functools.partial(fused, a, b))

    def all_of(a: Any, b: Any) -> list[jax.Array]:
        return [jdg.fp8_gemm_nt(a, b, out_dtype=F32, config=config) for config in configs]

    for config, got in zip(configs, program(all_of)(a, b), strict=True):
        want = wanted(config.split_k)
        wrong = np.argwhere(np.asarray(got) != want)
        assert not wrong.size, f"{config}: {len(wrong)} of {want.size}, the first at {wrong[0]}"


@pytest.mark.smoke
@pytest.mark.parametrize("b_scales", BLOCKS)
def test_float64_with_c_and_other_types(b_scales):
    block, rng = BLOCKS[b_scales], np.random.default_rng(1)
    for m, n, k in (*SHAPES, *DIFFERENT):
        types = (jnp.float8_e5m2, None) if (m, n, k) in DIFFERENT else (None, None)
        a, b = normal(rng, (m, k), ROW, types[0]), normal(rng, (n, k), block, types[1])
        for out in ("bfloat16", "float32"):
            c = jnp.asarray(rng.standard_normal((m, n)), out)
            run = program(functools.partial(jdg.fp8_gemm_nt, out_dtype=out))
            want = exact(a, b)
            assert calc_diff(run(a, b), want) < ORACLE_LIMIT[out]
            assert calc_diff(run(a, b, c), want + np.asarray(c).astype(np.float64)) < ORACLE_LIMIT[out]


@pytest.mark.parametrize("b_scales", BLOCKS)
def test_batches_layouts_and_epilogues_have_the_bits_of_products(b_scales):
    block, rng = BLOCKS[b_scales], np.random.default_rng(2)
    a, b = operand(rng, (3, 70, 400), ROW), operand(rng, (264, 400), block)
    options = {"out_dtype": F32, "config": PLAIN}

    def all_of(a: Any, b: Any) -> tuple[jax.Array, ...]:
        turned = QuantizedArray(b.values.T, b.scales.T, block[::-1])
        run = functools.partial(jdg.fp8_gemm_nt, **options)
        each = jnp.stack([run(a[i], b) for i in range(3)])
        batch = jax.vmap(run, in_axes=(0, None))(a, b)
        nn = jdg.fp8_gemm_nn(a[0], turned, **options)
        ends = {"epilogue": jdg.Epilogue(2.0, jnp.ones(264, F32)), "config": NARROW}
        doubled = jdg.fp8_gemm_nt(a[0], b, out_dtype=F32, **ends)
        return each, batch, nn, doubled

    each, batch, nn, doubled = map(np.asarray, program(all_of)(a, b))
    assert np.array_equal(each[0], fused(a[0], b))
    assert np.array_equal(batch, each)
    assert np.array_equal(nn, each[0])
    assert np.array_equal(doubled, 2 * each[0] + 1)


def poisoned(a: QuantizedArray, counts: np.ndarray) -> QuantizedArray:
    """NaN in values and scales of rows that do not count."""
    mask = jnp.asarray(counts)[..., None]
    nan = jnp.asarray(jnp.nan, a.values.dtype)
    return QuantizedArray(jnp.where(mask, a.values, nan), jnp.where(mask, a.scales, jnp.nan), a.block)


@pytest.mark.smoke
@pytest.mark.parametrize("b_scales", BLOCKS)
def test_groups_have_the_bits_of_products(b_scales):
    block, rng = BLOCKS[b_scales], np.random.default_rng(3)
    b = operand(rng, (GROUPS, N, K), block)
    group = np.repeat(np.arange(GROUPS), SIZES)
    rows = poisoned(operand(rng, (ROWS, K), ROW), np.arange(ROWS) < len(group))
    masked = operand(rng, (GROUPS, ROWS, K), ROW)
    masked = poisoned(masked, np.arange(ROWS)[None] < np.asarray(COUNTS)[:, None])
    sizes, counts = jnp.asarray(SIZES, jnp.int32), jnp.asarray(COUNTS, jnp.int32)

    starts = np.cumsum((0, *SIZES))
    for tile in (None, PLAIN, GemmConfig(64, 64, 6, slabs=2), GemmConfig(64, 128, 4, slabs=2)):
        contiguous = functools.partial(jdg.m_grouped_fp8_gemm_nt_contiguous, out_dtype=F32, config=tile)
        of_masked = functools.partial(
            jdg.m_grouped_fp8_gemm_nt_masked, out_dtype=F32, config=tile, zero_rows=True
        )
        got, got_masked = (
            np.asarray(program(contiguous)(rows, b, sizes)),
            program(of_masked)(masked, b, counts),
        )
        for g in range(GROUPS):
            mine = jax.tree.map(lambda x, g=g: x[starts[g] : starts[g + 1]], rows)
            assert np.array_equal(got[starts[g] : starts[g + 1]], fused(mine, b[g])), (tile, g)
            first = jax.tree.map(lambda x, g=g: x[g, : COUNTS[g]], masked)
            assert np.array_equal(np.asarray(got_masked)[g, : COUNTS[g]], fused(first, b[g])), (tile, g)
            assert not np.asarray(got_masked)[g, COUNTS[g] :].any()
        assert not got[len(group) :].any()


@pytest.mark.parametrize("b_scales", BLOCKS)
def test_twenty_runs_give_the_same_bits(b_scales):
    block, rng = BLOCKS[b_scales], np.random.default_rng(4)
    for m, n, k in ((1, 2112, 7168), (64, 576, 7168), (1000, 1032, 4096)):
        a, b = normal(rng, (m, k), ROW), normal(rng, (n, k), block)
        step = program(
            lambda a, b: lax.bitcast_convert_type(jdg.fp8_gemm_nt(a, b, out_dtype=F32), jnp.uint32)
        )
        first = step(a, b)
        assert all(bool(jnp.array_equal(step(a, b), first)) for _ in range(20))


def test_powers_of_two_are_no_special_case():
    rng = np.random.default_rng(5)
    a, b = operand(rng, (100, 512), ROW, power=True), operand(rng, (128, 512), ROW, power=True)
    got = program(functools.partial(jdg.fp8_gemm_nt, out_dtype=F32))(a, b)
    assert np.array_equal(np.asarray(got), exact(a, b).astype(np.float32))


def test_deep_gemm_recipes():
    rng = np.random.default_rng(6)
    a = operand(rng, (40, 512), ROW)
    for recipe, block in (((1, 32, 32), SQUARE), ((1, 1, 32), ROW)):
        b = operand(rng, (96, 512), block)
        pairs = [(q.values, q.scales) for q in (a, b)]
        got = deep_gemm.fp8_gemm_nt(*pairs, recipe=recipe, out_dtype=F32)
        assert np.array_equal(np.asarray(got), fused(a, b))
