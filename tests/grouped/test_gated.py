"""m-grouped FP8 GEMMs fused with SwiGLU and its quantisation: what is computed, refused, and launched.

The kernel's own bits: tests/gpu/test_grouped_swiglu_gpu.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.activation import swiglu_quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Launch, Operand, Result, TensorMap
from jax_deepgemm.jit.report import KernelSource
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.grouped import kernel
from jax_deepgemm.ops.grouped.gated import fits, m_grouped_fp8_gemm_swiglu, m_masked_fp8_gemm_swiglu
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates
from jax_deepgemm.ops.grouped.sm90.rules import broken_rules
from jax_deepgemm.ops.grouped.sm90.source import grouped_name, grouped_source
from jax_deepgemm.quantization import QuantizedArray
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import op_checks
from tests.shared.op_checks import OpCase, Shard

F32, E4, I32 = jnp.float32, jnp.float8_e4m3fn, jnp.int32
M, F, K, G = 32, 256, 384, 4
LEAST = 2.0**-126


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(seed: int = 0, lead: tuple[int, ...] = (M,)) -> tuple[Any, Any, jax.Array]:
    x, w = jnp.asarray(drawn(seed, *lead, K)), jnp.asarray(drawn(seed + 1, G, 2 * F, K)) / 16
    return jdg.quantize(x), jdg.quantize(w, (128, 128)), jnp.asarray(drawn(seed + 2, *lead))


def assert_bits(got: QuantizedArray, values: Any, scales: Any) -> None:
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), np.asarray(values).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(got.scales), np.asarray(scales))


@pytest.mark.any_version
@pytest.mark.parametrize("sizes", [(2, 0, 5, 9), (32, 0, 0, 0), (0, 0, 0, 0), (-3, 50, 7, 1)], ids=str)
def test_contiguous_is_its_parts_in_a_row(sizes):
    a, b, weights = operands()
    s = jnp.array(sizes, I32)
    got = m_grouped_fp8_gemm_swiglu(a, b, s, weights)
    end = jnp.minimum(jnp.maximum(s, 0).sum(), M)[None]
    h = jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, s)
    values, scales = swiglu_quantize(h, weights, end, transposed=False)
    assert_bits(got, values, scales)
    assert got.block == (1, 128)


@pytest.mark.any_version
def test_masked_is_its_parts_in_a_row():
    a, b, weights = operands(lead=(G, 9))
    counts = jnp.array([3, 0, 9, 20], I32)
    got = m_masked_fp8_gemm_swiglu(a, b, counts, weights)
    h = jdg.m_grouped_fp8_gemm_nt_masked(a, b, counts, zero_rows=True)
    values, scales = jax.vmap(functools.partial(swiglu_quantize, transposed=False))(h, weights)
    for group, count in enumerate([3, 0, 9, 9]):
        mine = QuantizedArray(got.values[group, :count], got.scales[group, :count], got.block)
        assert_bits(mine, values[group, :count], scales[group, :count])


@pytest.mark.any_version
def test_rows_of_no_group_here_are_zeros_whatever_they_hold():
    """B holds two of four groups; rows of the others, and their weights, may be NaN."""
    a, b, weights = operands()
    sizes, first = [4, 6, 7, 8], 1
    here = np.arange(4, 17)
    other = np.setdiff1d(np.arange(M), here)
    weights = weights.at[other].set(jnp.nan)
    poisoned = QuantizedArray(a.values, a.scales.at[other].set(jnp.nan), a.block)
    part = jax.tree.map(lambda z: z[first : first + 2], b)
    got = m_grouped_fp8_gemm_swiglu(poisoned, part, jnp.array(sizes, I32), weights, group_offset=first)
    assert not np.asarray(got.values)[other].view(np.uint8).any()
    assert (np.asarray(got.scales)[other] == LEAST).all()
    every = m_grouped_fp8_gemm_swiglu(a, b, jnp.array(sizes, I32), weights)
    mine = QuantizedArray(got.values[here], got.scales[here], got.block)
    assert_bits(mine, every.values[here], every.scales[here])


BIAS = jnp.asarray(drawn(7, G, 2 * F)).at[1].set(jnp.nan)  # of a group without rows


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", [F32, jnp.bfloat16])
def test_a_bias_is_added_to_the_rounded_product_and_rounded_again(dtype):
    a, b, weights = operands()
    sizes, bias = jnp.array([2, 0, 5, 9], I32), BIAS.astype(dtype)
    got = m_grouped_fp8_gemm_swiglu(a, b, sizes, weights, bias=bias)
    h = jdg.m_grouped_fp8_gemm_nt_contiguous(a, b, sizes).astype(F32)
    group = np.repeat([0, 2, 3, 0], [2, 5, 9, M - 16])
    h = (h + bias.astype(F32)[group]).astype(jnp.bfloat16)
    assert_bits(got, *swiglu_quantize(h, weights, jnp.array([16]), transposed=False))

    deep, _, weights = operands(lead=(G, 9))
    counts = jnp.array([3, 0, 9, 4], I32)
    got = m_masked_fp8_gemm_swiglu(deep, b, counts, weights, bias=bias)
    h = jdg.m_grouped_fp8_gemm_nt_masked(deep, b, counts, zero_rows=True).astype(F32)
    h = (h + bias.astype(F32)[:, None]).astype(jnp.bfloat16)
    values, scales = jax.vmap(functools.partial(swiglu_quantize, transposed=False))(h, weights)
    for group, count in enumerate([3, 0, 9, 4]):
        mine = QuantizedArray(got.values[group, :count], got.scales[group, :count], got.block)
        assert_bits(mine, values[group, :count], scales[group, :count])


@pytest.mark.any_version
def test_a_bias_of_the_groups_here():
    a, b, weights = operands()
    sizes, bias = jnp.array([4, 6, 7, 8], I32), jnp.asarray(drawn(7, G, 2 * F))
    every = m_grouped_fp8_gemm_swiglu(a, b, sizes, weights, bias=bias)
    part = jax.tree.map(lambda z: z[1:3], b)
    got = m_grouped_fp8_gemm_swiglu(a, part, sizes, weights, bias=bias[1:3], group_offset=1)
    mine = QuantizedArray(got.values[4:17], got.scales[4:17], got.block)
    assert_bits(mine, every.values[4:17], every.scales[4:17])


def test_empty_dimensions():
    _, b, _ = operands()
    none = jdg.quantize(jnp.zeros((0, K)))
    got = m_grouped_fp8_gemm_swiglu(none, b, jnp.zeros(G, I32), jnp.zeros(0))
    assert (got.values.shape, got.scales.shape) == ((0, F), (0, F // 128))


# Transformations


def run(a: Any, sa: Any, b: Any, sb: Any, weights: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
    got = m_grouped_fp8_gemm_swiglu((a, sa), (b, sb), sizes, weights)
    return got.values, got.scales


def run_masked(a: Any, sa: Any, b: Any, sb: Any, weights: Any, counts: Any) -> tuple[jax.Array, jax.Array]:
    got = m_masked_fp8_gemm_swiglu((a, sa), (b, sb), counts, weights)
    counted = jnp.arange(a.shape[1])[:, None] < counts[:, None, None]
    return jnp.where(counted, got.values.astype(F32), 0), jnp.where(counted, got.scales, 0)


def run_biased(*args: Any) -> tuple[jax.Array, jax.Array]:
    *args, sizes, bias = args
    a, sa, b, sb, weights = args
    got = m_grouped_fp8_gemm_swiglu((a, sa), (b, sb), sizes, weights, bias=bias)
    return got.values, got.scales


def biased_arguments(seed: int) -> list[Any]:
    return [*arguments((M,), 10, seed), jnp.asarray(drawn(seed + 3, G, 2 * F))]


def arguments(lead: tuple[int, ...], most: int, seed: int) -> list[Any]:
    a, b, weights = operands(seed, lead)
    sizes = np.random.default_rng(seed).integers(0, most, G)
    return [a.values, a.scales, b.values, b.scales, weights, jnp.asarray(sizes, I32)]


CASES = [
    OpCase(
        "contiguous",
        run,
        functools.partial(arguments, (M,), 10),
        nests=(((0, 0, None, None, 0, 0),), ((0, 0, 0, 0, None, None),)),
        shards=(
            Shard((P("x"), P("x"), P(), P(), P("x"), P()), (P("x"), P("x")), modes=("auto",)),
            Shard((P(),) * 6, (P(None, "x"), P(None, "x")), modes=("auto",)),  # features, from whole blocks
            Shard((P("x"), P("x"), P(), P(), P("x"), P()), (P("x", "y"), P("x")), modes=("auto",)),  # inside
        ),
    ),
    OpCase(
        "biased",
        run_biased,
        biased_arguments,
        nests=(((0, 0, None, None, 0, 0, None),), ((0, 0, 0, 0, None, None, 0),)),
        shards=(
            Shard((P("x"), P("x"), P(), P(), P("x"), P(), P()), (P("x"), P("x")), modes=("auto",)),
            Shard(
                ((P(),) * 6 + (P(None, "x"),)),  # the bias is gathered
                (P(None, "x"), P(None, "x")),
                ("all-gather",),
                modes=("auto",),
            ),
        ),
    ),
    OpCase(
        "masked",
        run_masked,
        functools.partial(arguments, (G, 8), 9),
        nests=(((0, 0, None, None, 0, 0),),),
        shards=(
            Shard((P("x"),) * 6, (P("x"), P("x")), modes=("auto", "shard_map")),
            Shard(
                (P(None, "y"), P(None, "y"), P(), P(), P(None, "y"), P()),
                (P(None, "y"),) * 2,
                modes=("auto",),
            ),
        ),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_explicit_axes_cut_rows():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    args = arguments((M,), 10, 0)
    placed = [jax.device_put(x, NamedSharding(mesh, P("x") if x.shape[0] == M else P())) for x in args]
    got = jax.jit(run)(*placed)
    assert got[0].sharding.spec[0] == "x"
    op_checks.assert_same(got, run(*args), 0)


def test_there_is_no_derivative():
    a, b, weights = operands()

    def loss(weights: jax.Array) -> jax.Array:
        return m_grouped_fp8_gemm_swiglu(a, b, jnp.array([2, 0, 5, 9]), weights).scales.sum()

    with pytest.raises(NotImplementedError, match=r"moe\.expert_mlp"):
        jax.grad(loss)(weights)


# Errors


def test_features_that_are_no_whole_blocks_are_refused():
    a, _, weights = operands()
    ragged = jdg.quantize(jnp.ones((G, 2 * 192, K)), (128, 128))
    per_row = jdg.quantize(jnp.ones((G, 2 * F, K)), (1, 128))
    sizes = jnp.zeros(G, I32)
    with pytest.raises(
        ValueError, match=r"need f, 192, to be a multiple of 128.*m_grouped_fp8_gemm_nt_contig"
    ):
        m_grouped_fp8_gemm_swiglu(a, ragged, sizes, weights)
    with pytest.raises(
        ValueError, match=r"b has scales of block \(1, 128\), need \(128, 128\)\. Use m_grouped"
    ):
        m_grouped_fp8_gemm_swiglu(a, per_row, sizes, weights)
    assert [fits(w) for w in (ragged, per_row, ragged.values, operands()[1])] == [False] * 3 + [True]


@pytest.mark.parametrize(
    "bad", [None, jnp.ones(M - 1), jnp.ones(M, jnp.bfloat16)], ids=("none", "few", "bf16")
)
def test_weights_that_are_no_factor_for_each_row_are_refused(bad):
    a, b, _ = operands()
    with pytest.raises(ValueError, match=r"row_weights is .*, need float32 \[32\].*jnp\.ones\(\(32,\)\)"):
        m_grouped_fp8_gemm_swiglu(a, b, jnp.zeros(G, I32), bad)
    m_grouped_fp8_gemm_swiglu(a, b, jnp.zeros(G, I32), jnp.ones((M,)))


@pytest.mark.parametrize("bad", [jnp.ones((G, F)), jnp.ones((G, 2 * F), jnp.float16), 1.0], ids=str)
def test_a_bias_that_is_no_number_for_each_row_of_b_is_refused(bad):
    a, b, weights = operands()
    with pytest.raises(ValueError, match=r"bias is .*, need bfloat16 or float32 \[4, 512\].*or None"):
        m_grouped_fp8_gemm_swiglu(a, b, jnp.zeros(G, I32), weights, bias=bad)


# Kernels


def problem(grouping: str = "rows", **options: Any) -> GroupedProblem:
    sizes: dict[str, Any] = {"groups": 8, "m": 4096, "n": 4096, "k": 4096, "expected": 512, "segments": 8}
    return GroupedProblem(grouping, **{**sizes, "weights": 8, "gated": True, **options})


PROBLEMS = (
    problem(),
    problem(segmented=True, expected=1, m=8),
    problem("masked_rows"),
    problem(biased=True, chained=True, m=8, expected=1),
)
PAIRS = [(p, c) for p in PROBLEMS for c in grouped_candidates(p, H200)]


@functools.cache
def sources() -> dict[str, KernelSource]:
    return {grouped_name(p, c): grouped_source(p, c) for p, c in PAIRS}


@pytest.mark.any_version
def test_ptxas_is_content():
    pytest.importorskip("cuda.core")
    assert sorted({(c.block_m, c.block_n) for _, c in PAIRS}) == [(64, 256), (128, 256)]
    for one in compile_many(list(sources().values()), progress=False):
        assert (one.report.problems(), one.report.static_smem_bytes) == ((), 0), one.name


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("p", "c", "rule"),
    [
        (problem(), GemmConfig(128, 256, 4), "gated is for products of which gate and up meet"),
        (
            problem(gated=False),
            GemmConfig(128, 256, 4, slabs=2, gated=True),
            "gated is for products of which",
        ),
        (
            problem(),
            GemmConfig(128, 128, 4, slabs=2, gated=True),
            "gated tiles are 64x256 or 128x256, not 128x128",
        ),
        (problem(), GemmConfig(256, 256, 4, slabs=2, gated=True), "not 256x256"),
    ],
)
def test_each_rule_has_its_message(p, c, rule):
    assert any(rule in message for message in broken_rules(p, c, H200))


@pytest.mark.any_version
def test_a_box_has_gate_and_up_of_the_same_features():
    pytest.importorskip("cuda.core")
    shape = jax.ShapeDtypeStruct
    ins = [shape((512, 256), E4), shape((512, 4), F32), shape((6, 512, 256), E4), shape((6, 4, 4), F32)]
    ins += [shape((512,), F32), shape((24,), I32), shape((1,), I32)]
    outs = [shape((512, 256), E4), shape((512, 2), F32)]
    plan = kernel.m_grouped_fp8_gemm_swiglu.plan(ins, outs, batch=None, chip=H200, rows_format="sizes")
    [launch] = plan.steps
    assert isinstance(launch, Launch)
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert [m.dims for m in maps] == [(256, 512, 1), (256, 256, 2, 6), (4, 512, 1), (4, 2, 2, 6)]
    assert [m.box[1:] for m in maps[1::2]] == [(128, 2, 1), (1, 2, 1)]
    buffers = [p for p in launch.params if isinstance(p, Operand | Result)]
    assert buffers == [Result(0), Result(1), Operand(4), Operand(5), Operand(6)]
