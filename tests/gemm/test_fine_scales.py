"""Scales for 32 of k: products against float64, sharding, recipes of deep_gemm, rules, what ptxas says."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import deep_gemm
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import fit_stages, problems_with
from jax_deepgemm.ops.gemm.sm90.source import kernel_name, kernel_source
from jax_deepgemm.quantization import QuantizedArray
from jax_deepgemm.tools.explain import problems
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import op_checks
from tests.shared.fine_scales import ROW, SQUARE, exact, fused, normal, operand
from tests.shared.op_checks import OpCase, Shard

F32 = jnp.float32
BLOCKS = (SQUARE, ROW)
SIZES = (37, 0, 20)


def drawn(
    m: int, n: int, k: int, block: tuple[int, int], *lead: int, seed: int = 0
) -> tuple[QuantizedArray, QuantizedArray]:
    rng = np.random.default_rng((k, seed))
    return normal(rng, (m, k), ROW), normal(rng, (*lead, n, k), block)


def close(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(5, 70, 200), (3, 40, 31), (33, 1, 64)], ids=str)
def test_dense(shape, block):
    a, b = drawn(*shape, block)
    want, run = exact(a, b), functools.partial(jdg.fp8_gemm_nt, out_dtype=F32)
    close(run(a, b), want)
    close(run((a.values, a.scales), (b.values, b.scales)), want)
    close(run((a.values, a.scales), b), want)  # of few elements the scales alone would not tell
    close(run(a, b, jnp.ones(want.shape, F32)), want + 1)
    turned = QuantizedArray(b.values.T, b.scales.T, block[::-1])
    close(jdg.fp8_gemm_nn(a, turned, out_dtype=F32), want)
    close(run(a, b, epilogue=jdg.Epilogue(2.0, jnp.ones(shape[1]))), 2 * want + 1)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_groups(block):
    a, b = drawn(64, 40, 200, block, 3)
    sizes = jnp.asarray(SIZES, jnp.int32)
    starts = np.cumsum((0, *SIZES))
    want = np.zeros((64, 40))
    for g in range(3):
        mine = jax.tree.map(lambda x, g=g: x[starts[g] : starts[g + 1]], a)
        want[starts[g] : starts[g + 1]] = exact(mine, b[g])
    close(jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes, out_dtype=F32), want)
    close(jdg.ragged_dot(a, b, sizes, rhs_layout="gnk", preferred_element_type=F32), want)
    deep = jax.tree.map(lambda x: jnp.stack([x[:40]] * 3), a)
    masked = exact(deep, b) * (np.arange(40)[:, None] < np.asarray(SIZES)[:, None, None])
    close(jdg.m_grouped_fp8_gemm_nt_masked(deep, b, sizes, out_dtype=F32), masked)


@pytest.mark.parametrize(("recipe", "block"), [((1, 32, 32), SQUARE), ((1, 1, 32), ROW)], ids=str)
def test_recipes_of_deep_gemm(recipe, block):
    a, b = drawn(6, 64, 256, block)
    pairs = (a.values, a.scales), (b.values, b.scales)
    halves = {"recipe_a": (1, 32), "recipe_b": recipe[1:]}
    for form in ({"recipe": recipe}, halves):
        close(deep_gemm.fp8_gemm_nt(*pairs, out_dtype=F32, **form), exact(a, b))
    grouped = jax.tree.map(lambda x: x[None], pairs[1])
    layout = np.zeros(6, np.int32)
    for function, left, rows in (
        (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, pairs[0], layout),
        (deep_gemm.m_grouped_fp8_gemm_nt_masked, jax.tree.map(lambda x: x[None], pairs[0]), layout[:1] + 6),
    ):
        extra = (6,) if function is deep_gemm.m_grouped_fp8_gemm_nt_masked else ()
        got = function(left, grouped, None, jnp.asarray(rows), *extra, recipe=recipe, out_dtype=F32)
        close(jnp.reshape(got, (6, 64)), exact(a, b))


def test_quantised_numbers_have_a_smaller_error():
    x = jax.random.normal(jax.random.key(0), (8, 512), F32) * jnp.repeat(10.0 ** jnp.arange(-2, 2), 128)
    w = jax.random.normal(jax.random.key(1), (64, 512), F32)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    error = {
        step: np.abs(
            jdg.fp8_gemm_nt(jdg.quantize(x, (1, step)), jdg.quantize(w, (1, step)), out_dtype=F32) - want
        )
        for step in (32, 128)
    }
    assert error[32].mean() < 0.95 * error[128].mean()


def operands(block: tuple[int, int], k: int, seed: int) -> list[Any]:
    return jax.tree.leaves(drawn(8, 128, k, block, seed=seed))


def run_dense(a: Any, sa: Any, b: Any, sb: Any, **options: Any) -> jax.Array:
    return jdg.fp8_gemm_nt((a, sa), (b, sb), out_dtype=F32, **options)


K_CUT = Shard((P(None, "y"),) * 4, P(), ("all-reduce",))
INSIDE = Shard((P(None, "y"), P(), P(None, "y"), P()), P(), ("all-reduce",))
N_CUT = Shard((P(), P(), P("y"), P("y")), P(None, "y"))
CASES = [
    OpCase(
        "block-32",
        run_dense,
        functools.partial(operands, SQUARE, 640),  # devices begin inside blocks of 128, at the edge of 32
        nests=(((0, 0, None, None),),),
        shards=(K_CUT, N_CUT),
    ),
    OpCase("row-32", run_dense, functools.partial(operands, ROW, 160), shards=(INSIDE,)),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_gradients_are_refused():
    a, b = drawn(4, 32, 64, SQUARE)
    with pytest.raises(NotImplementedError, match="fp8_linear"):
        jax.grad(lambda s: jdg.fp8_gemm_nt((a.values, s), b, out_dtype=F32).sum())(a.scales)


# --- kernels -------------------------------------------------------------------------------------------


def pairs() -> Iterator[tuple[GemmProblem, GemmConfig]]:
    """A configuration of each form of the loop: 4, 2 and 1 products at a time, parts, columns as tokens."""
    for scales in ("block_32", "vector_32"):
        p = GemmProblem(4096, 4096, 4096, b_scales=scales)
        yield from ((p, GemmConfig(*tile, 0)) for tile in ((64, 128), (128, 128), (192, 128), (256, 64)))
        few = GemmProblem(64, 4096, 4096, b_scales=scales, out="float32", add_c=True)
        yield few, GemmConfig(16, 64, 0, True, 4, 2)
        yield few, GemmConfig(64, 128, 0, True, 1, 1)


@pytest.mark.any_version
def test_kernels_do_not_spill():
    pytest.importorskip("cuda.core")
    fitted = [(p, fit_stages(p, c, H200)) for p, c in pairs()]
    assert all(c is not None for _, c in fitted)
    kernels = compile_many([kernel_source(p, c) for p, c in fitted], progress=False)
    assert len({one.name for one in kernels}) == len(fitted)
    assert [one.name for one in kernels if one.report.problems()] == []


@pytest.mark.any_version
def test_rules_and_names():
    p = GemmProblem(512, 512, 512, b_scales="block_32")
    assert "B scales 32x32" in str(p)
    assert "sb32x32" in kernel_name(p, GemmConfig(128, 128, 4, slabs=2))
    assert any("multiple of 32" in line for line in problems_with(p, GemmConfig(128, 80, 4, slabs=2)))
    assert any("no registers" in line for line in problems_with(p, GemmConfig(128, 192, 4, slabs=2)))
    fine, coarse = (GemmProblem(64, 4096, 4096, b_scales=s).bytes_moved for s in ("vector_32", "vector"))
    assert fine - coarse == (64 + 4096) * 4096 // 32 * 4


def test_problems_of_calls():
    for block, name in ((SQUARE, "block_32"), (ROW, "vector_32")):
        a, b = drawn(8, 64, 16, block)  # one scale of 32, or of 128: the blocks tell
        [(found, _)] = problems(jdg.fp8_gemm_nt, a, b)
        assert found.b_scales == name
        grouped = jax.tree.map(lambda x: x[None], b)
        [(found, _)] = problems(jdg.m_grouped_fp8_gemm_nt_contiguous, a, grouped, jnp.array([8], jnp.int32))
        assert found.b_scales == name


def test_the_oracle_of_the_gpu_tests():
    rng = np.random.default_rng(0)
    for splits in (1, 2, 4):
        a, b = operand(rng, (20, 2100), ROW), operand(rng, (40, 2100), SQUARE)
        np.testing.assert_allclose(fused(a, b, splits), exact(a, b), rtol=1e-4, atol=1e-2)
    a, b = operand(rng, (20, 300), ROW, power=True), operand(rng, (40, 300), ROW, power=True)
    assert np.array_equal(fused(a, b), exact(a, b))
