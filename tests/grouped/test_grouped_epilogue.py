"""Epilogues of grouped GEMMs: against NumPy in float64, under JAX's transformations, what is refused, and
what is launched. Their bits on a GPU: tests/gpu/test_grouped_epilogue_gpu.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import Epilogue
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Launch, Operand, Result, TensorMap
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.grouped import kernel
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates
from jax_deepgemm.ops.grouped.sm90.source import grouped_source
from jax_deepgemm.quantization import quantize_fp4
from jax_deepgemm.tools.precompile import compile_many
from tests.shared import grouped_oracle as oracle
from tests.shared import op_checks
from tests.shared.epilogue_oracle import with_epilogue
from tests.shared.gemm_oracle import assert_rounded
from tests.shared.op_checks import OpCase, Shard

BF16, F32, FP8, I32 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.int32
ROW, BLOCK = (1, 128), (128, 128)
PAIRS = Activation(interleaved=True)
G, M, N, K = 4, 32, 144, 200
SIZES = (9, 0, 4, 11)  # eight rows of none


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bias_of(n: int = N) -> jax.Array:
    """NaN of the group without rows."""
    return jnp.asarray(drawn(7, G, n)).at[1].set(jnp.nan)


def of_rows(index: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(index[:, None] < 0, 0, np.nan_to_num(np.asarray(x))[index])


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("kind", "activation", "out"),
    [
        ("fp8", "silu", BF16),
        ("fp8", "swiglu", F32),
        ("row", PAIRS, F32),
        ("nt", GPT_OSS, BF16),
        ("nt", None, F32),
        ("nn", "geglu", BF16),
        ("nn", "relu2", F32),
    ],
    ids=str,
)
def test_contiguous(kind, activation, out):
    """Rows of no group are NaN in A, and zeros in D, whatever the biases are."""
    index = oracle.rows_of(SIZES, M)
    a, b = oracle.random(0, M, K), oracle.random(1, G, N, K)
    a[index < 0] = np.nan
    epilogue = Epilogue(0.1, bias_of(), activation)
    options = {"out_dtype": out, "epilogue": epilogue}
    sizes = jnp.array(SIZES, I32)
    if kind in ("fp8", "row"):
        qa, qb = jdg.quantize(jnp.asarray(a)), jdg.quantize(jnp.asarray(b), BLOCK if kind == "fp8" else ROW)
        got = jdg.m_grouped_fp8_gemm_nt_contiguous(qa, qb, sizes, **options)
        a, b = (np.nan_to_num(np.asarray(jdg.dequantize(x, F32))) for x in (qa, qb))
    else:
        stored = b if kind == "nt" else np.swapaxes(b, 1, 2)
        run = getattr(jdg, f"m_grouped_bf16_gemm_{kind}_contiguous")
        got = run(jnp.asarray(a), jnp.asarray(stored), sizes, **options)
    sums = oracle.m_grouped(np.nan_to_num(oracle.wide(a)), b, index)
    want = with_epilogue(sums, 0.1, of_rows(index, bias_of()), activation)
    want[index < 0] = 0
    assert got.dtype == out
    assert not np.any(np.asarray(got, np.float32)[index < 0])
    assert_rounded(got, want, 40 * K)


@pytest.mark.any_version
@pytest.mark.parametrize(("fp8", "activation"), [(True, "gelu"), (True, PAIRS), (False, "swiglu")], ids=str)
def test_masked(fp8, activation):
    counts = np.array([3, 0, 9, 5])
    a, b = oracle.random(0, G, 9, K), oracle.random(1, G, N, K)
    a[np.arange(9) >= counts[:, None]] = np.nan
    given = [jnp.asarray(a), jnp.asarray(b)]
    if fp8:
        given = [jdg.quantize(given[0]), jdg.quantize(given[1], BLOCK)]
        a, b = (np.asarray(jdg.dequantize(x, F32)) for x in given)
    run = jdg.m_grouped_fp8_gemm_nt_masked if fp8 else jdg.m_grouped_bf16_gemm_nt_masked
    options = {"zero_rows": True, "out_dtype": F32, "epilogue": Epilogue(0.1, bias_of(), activation)}
    got = run(*given, jnp.asarray(counts), **options)
    sums = oracle.masked(np.nan_to_num(oracle.wide(a)), b, counts)
    for group, count in enumerate(counts):
        bias = np.nan_to_num(np.asarray(bias_of()[group]))
        want = with_epilogue(sums[group], 0.1, bias, activation)
        want[count:] = 0
        assert_rounded(got[group], want, 40 * K)


@pytest.mark.any_version
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("n", "activation"), [(272, "silu"), (264, None), (576, PAIRS), (512, "swiglu")])
def test_quantised_results(fp8, n, activation):
    """The bits of the float32 result, quantised; rows of no group are zeros of the least scale."""
    a, b = jnp.asarray(oracle.random(0, M, K)), jnp.asarray(oracle.random(1, G, n, K))
    given = [jdg.quantize(a), jdg.quantize(b, BLOCK)] if fp8 else [a, b]
    run = jdg.m_grouped_fp8_gemm_nt_contiguous if fp8 else jdg.m_grouped_bf16_gemm_nt_contiguous
    sizes, bias = jnp.array(SIZES, I32), bias_of(n)
    got = run(*given, sizes, epilogue=Epilogue(None, bias, activation, ROW))
    d = run(*given, sizes, out_dtype=F32, epilogue=Epilogue(None, bias, activation))
    want = jdg.quantize(d)
    assert got.block == ROW
    np.testing.assert_array_equal(
        np.asarray(got.values).view(np.uint8), np.asarray(want.values).view(np.uint8)
    )
    np.testing.assert_array_equal(got.scales, want.scales)
    assert not np.asarray(got.values)[sum(SIZES) :].view(np.uint8).any()


@pytest.mark.any_version
def test_descriptions_of_groups_and_those_of_other_devices():
    """An index per row, ends, and a part of the groups: the same rows have the same bits."""
    a, b, bias = jnp.asarray(oracle.random(0, M, K)), jnp.asarray(oracle.random(1, G, N, K)), bias_of()
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32)
    want = run(a, b, jnp.array(SIZES), epilogue=Epilogue(0.1, bias, PAIRS))
    index = jnp.asarray(oracle.rows_of(SIZES, M))
    ends = jnp.cumsum(jnp.array(SIZES, I32))
    for description in ({"m_indices": index}, {"ends": ends, "alignment": 1}):
        got = run(a, b, **description, epilogue=Epilogue(0.1, bias, PAIRS))
        np.testing.assert_array_equal(got, want)
    got = run(a, b[1:3], jnp.array(SIZES), group_offset=1, epilogue=Epilogue(0.1, bias[1:3], PAIRS))
    np.testing.assert_array_equal(got, np.where(((index == 1) | (index == 2))[:, None], want, 0))


@pytest.mark.any_version
@pytest.mark.parametrize(("m", "n", "k"), [(0, N, K), (6, 0, K), (6, N, 0)])
def test_without_elements(m, n, k):
    """An empty k leaves what becomes of zeros, in rows that count."""
    bias, sizes = jnp.ones((2, n)), jnp.array([1, 3], I32)
    epilogue = Epilogue(2.0, bias, "relu2")
    a, b = jnp.ones((m, k), BF16), jnp.ones((2, n, k), BF16)
    got = jdg.m_grouped_bf16_gemm_nt_contiguous(a, b, sizes, epilogue=epilogue)
    assert got.shape == (m, n)
    if k == 0:
        np.testing.assert_array_equal(np.asarray(got[:, 0], np.float32), [1, 1, 1, 1, 0, 0])
    qa, qb = jdg.quantize(jnp.stack([a, a])), jdg.quantize(b, BLOCK)
    masked = jdg.m_grouped_fp8_gemm_nt_masked(qa, qb, sizes, zero_rows=True, epilogue=epilogue)
    assert masked.shape == (2, m, n)


# Transformations


def some_sizes(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 9, G), I32)


def fp8_args(seed: int, lead: tuple[int, ...] = (M,), n: int = 320) -> list[Any]:
    pairs = (*oracle.fp8(seed, *lead, 384), *oracle.fp8(seed + 1, G, n, 384, block=BLOCK))
    return [*map(jnp.asarray, pairs), some_sizes(seed), jnp.asarray(drawn(seed, G, n))]


def bf16_args(seed: int, lead: tuple[int, ...] = (M,)) -> list[Any]:
    a, b = jnp.asarray(oracle.random(seed, *lead, 24)), jnp.asarray(oracle.random(seed + 1, G, 16, 24))
    return [a, b, some_sizes(seed), jnp.float32(0.3 + seed), jnp.asarray(drawn(seed, G, 16))]


def run_fp8(a: Any, sa: Any, b: Any, sb: Any, s: Any, bias: Any, *, activation: Any, **options: Any) -> Any:
    epilogue = Epilogue(0.05, bias, activation)
    return jdg.m_grouped_fp8_gemm_nt_contiguous(
        (a, sa), (b, sb), s, out_dtype=F32, epilogue=epilogue, **options
    )


def run_fp8_quantised(a: Any, sa: Any, b: Any, sb: Any, s: Any, bias: Any) -> Any:
    epilogue = Epilogue(None, bias, "silu", ROW)
    got = jdg.m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), s, epilogue=epilogue)
    return got.values, got.scales


def run_fp8_masked(a: Any, sa: Any, b: Any, sb: Any, s: Any, bias: Any, **options: Any) -> Any:
    epilogue = Epilogue(0.05, bias, PAIRS)
    run = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, zero_rows=True, out_dtype=F32)
    return run((a, sa), (b, sb), s, epilogue=epilogue, **options)


def run_bf16(a: Any, b: Any, s: Any, alpha: Any, bias: Any, *, activation: Any, **options: Any) -> Any:
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_contiguous, out_dtype=F32)
    return run(a, b, s, epilogue=Epilogue(alpha, bias, activation), **options)


def run_bf16_masked(a: Any, b: Any, s: Any, alpha: Any, bias: Any, **options: Any) -> Any:
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_masked, zero_rows=True, out_dtype=F32)
    return run(a, b, s, epilogue=Epilogue(alpha, bias, PAIRS), **options)


def plain_bf16(a: Any, b: Any, s: Any, alpha: Any, bias: Any) -> jax.Array:
    index = jnp.searchsorted(jnp.cumsum(s), jnp.arange(a.shape[0]), side="right")
    hot = jax.nn.one_hot(index, b.shape[0])
    x = alpha * jnp.einsum("mg,mk,gnk->mn", hot, a.astype(F32), b.astype(F32)) + hot @ bias
    return jnp.where((index < b.shape[0])[:, None], jax.nn.silu(x), 0)


def plain_bf16_masked(a: Any, b: Any, s: Any, alpha: Any, bias: Any) -> jax.Array:
    x = alpha * jnp.einsum("gmk,gnk->gmn", a.astype(F32), b.astype(F32)) + bias[:, None]
    d = jax.nn.silu(x[..., 0::2]) * x[..., 1::2]
    return jnp.where(jnp.arange(a.shape[1])[:, None] < s[:, None, None], d, 0)


ROWS_CUT = (P("x"), P("x"), P(), P(), P(), P())
COLUMNS_CUT = (P("x"), P("x"), P(None, "y"), P(), P(), P(None, "y"))
CASES = [
    OpCase(
        "fp8-silu",
        functools.partial(run_fp8, activation="silu"),
        fp8_args,
        nests=(((0, 0, None, None, 0, None),), ((None, None, None, None, None, 0), (0, 0, 0, 0, None, None))),
        shards=(
            Shard(COLUMNS_CUT, P("x", "y")),
            Shard((P("x"), P("x"), P("y"), P("y"), P(), P("y")), P("x"), ("all-reduce",)),  # groups
        ),
    ),
    OpCase(
        "fp8-pairs",
        functools.partial(run_fp8, activation=PAIRS),
        fp8_args,
        shards=(
            Shard(ROWS_CUT, P("x"), modes=("explicit",)),
            Shard((P(), P(), P("y"), P("y"), P(), P("y")), P(), ("all-reduce",), modes=("auto",)),
        ),
    ),
    OpCase(
        "fp8-quantised",
        run_fp8_quantised,
        functools.partial(fp8_args, n=512),
        nests=(((None, None, 0, 0, 0, 0),),),
        shards=(
            Shard(ROWS_CUT, (P("x"), P("x")), modes=("auto",)),
            Shard((P("x"), *(P(),) * 5), (P("x", "y"), P("x", "y")), modes=("auto",)),
        ),
        tolerance=2**-3,
    ),
    OpCase(
        "fp8-masked",
        run_fp8_masked,
        functools.partial(fp8_args, lead=(G, 8)),
        nests=(((0, 0, None, None, 0, None),),),
        shards=(Shard((P("x"),) * 6, P("x"), modes=("auto", "shard_map")),),
    ),
    OpCase(
        "bf16-silu",
        functools.partial(run_bf16, activation="silu"),
        bf16_args,
        nests=(((0, None, 0, 0, None),),),
        shards=(Shard((P("x"), P("y"), P(), P(), P("y")), P("x"), ("all-reduce",), modes=("explicit",)),),
        plain=plain_bf16,
        wrt=(0, 1, 3, 4),
        second=True,
        grad_tolerance=2**-6,
    ),
    OpCase(
        "bf16-masked",
        run_bf16_masked,
        functools.partial(bf16_args, lead=(G, 8)),
        plain=plain_bf16_masked,
        wrt=(0, 1, 3, 4),
        grad_tolerance=2**-6,
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_gradients_do_not_read_rows_that_do_not_count():
    """Cotangents of such rows are NaN, and so are these rows of A, and the bias of a group without rows."""
    a, b, _, alpha, bias = bf16_args(0, (G, 8))
    counts = jnp.array([3, 0, 8, 5], I32)
    beyond = jnp.arange(8)[:, None] >= counts[:, None, None]
    bias = bias.at[1].set(jnp.nan)
    run = functools.partial(jdg.m_grouped_bf16_gemm_nt_masked, out_dtype=F32)
    _, pullback = jax.vjp(
        lambda a, b, bias: run(a, b, counts, epilogue=Epilogue(alpha, bias, "gelu")),
        jnp.where(beyond, jnp.nan, a),
        b,
        bias,
    )
    da, db, dbias = pullback(jnp.where(beyond, jnp.nan, jnp.ones((G, 8, 16), F32)))
    assert not np.any(np.asarray(da, np.float32)[np.asarray(beyond[..., 0])])
    for one in (da, db, dbias):
        assert np.all(np.isfinite(np.asarray(one, np.float32)))


def test_there_is_no_derivative_of_quantised_numbers():
    a, b, s, alpha, bias = bf16_args(0)
    with pytest.raises(NotImplementedError, match="Leave out_scales out"):
        jax.grad(
            lambda bias: jdg.m_grouped_bf16_gemm_nt_contiguous(
                a, b, s, epilogue=Epilogue(alpha, bias, None, ROW)
            ).scales.sum()
        )(bias)
    with pytest.raises(NotImplementedError, match="grouped_linear"):
        jax.grad(lambda bias: run_fp8(*fp8_args(0)[:-1], bias, activation=None).sum())(fp8_args(0)[-1])


# What is refused


def test_a_bias_that_is_not_each_groups_is_refused():
    a, b, s, alpha, bias = bf16_args(0)
    run = jdg.m_grouped_bf16_gemm_nt_contiguous
    with pytest.raises(ValueError, match=r"need bfloat16 or float32 \[4, 16\].*of each group.*broadcast_to"):
        run(a, b, s, epilogue=Epilogue(alpha, bias[0]))
    run(a, b, s, epilogue=Epilogue(alpha, jnp.broadcast_to(bias[0], (4, 16))))


def test_weights_in_fp4_have_no_epilogue():
    w = jdg.quantization.prepare_fp4(quantize_fp4(jnp.ones((2, 64, 128))))
    x, sizes = jdg.quantize(jnp.ones((2, 3, 128))), jnp.array([1, 2], I32)
    with pytest.raises(NotImplementedError, match="weight in FP4"):
        jdg.m_grouped_fp8_gemm_nt_masked(x, w, sizes, epilogue=Epilogue(2.0))
    with pytest.raises(NotImplementedError, match="weight in FP4"):
        jdg.m_grouped_fp8_gemm_nt_contiguous(x[0], w, sizes, epilogue=Epilogue(2.0))


# What is launched


@pytest.mark.any_version
@pytest.mark.parametrize("quantized", [False, True])
def test_parameters_of_a_finished_product(quantized):
    """D, or values and scales, alpha, bias, sizes, offset."""
    pytest.importorskip("cuda.core")
    finish = Finish(alpha=True, bias=True, activation=Activation("gelu"), each=True, quantized=quantized)
    shape = jax.ShapeDtypeStruct
    ins = [shape((512, 256), BF16), shape((6, 512, 256), BF16), shape((6,), I32), shape((1,), I32)]
    ins += [shape((1,), F32), shape((6, 512), F32)]
    outs = [shape((512, 512), FP8), shape((512, 4), F32)] if quantized else [shape((512, 512), BF16)]
    plan = kernel.m_grouped_bf16_finished.plan(
        ins, outs, batch=None, chip=H200, rows_format="sizes", layout="nt", finish=finish
    )
    [launch] = plan.steps
    assert isinstance(launch, Launch)
    assert "alpha_bias_gelu" in launch.kernel.name
    buffers = [p for p in launch.params if isinstance(p, Operand | Result)]
    results = [Result(0), Result(1)] if quantized else [Result(0)]
    assert buffers == [*results, Operand(4), Operand(5), Operand(2), Operand(3)]


@pytest.mark.any_version
def test_a_box_has_gate_and_up_of_the_same_features():
    """Of FP8 and its scales; where features do not fill blocks of scales the activation is a second pass."""
    pytest.importorskip("cuda.core")
    shape, finish = jax.ShapeDtypeStruct, Finish(bias=True, activation=Activation(), quantized=True)
    ins = [shape((512, 256), FP8), shape((512, 4), F32), shape((6, 512, 256), FP8), shape((6, 4, 4), F32)]
    ins += [shape((6,), I32), shape((1,), I32), shape((6, 512), F32)]
    outs = [shape((512, 256), FP8), shape((512, 2), F32)]
    one = kernel.m_grouped_fp8_finished
    [launch] = one.plan(ins, outs, batch=None, chip=H200, rows_format="sizes", finish=finish).steps
    assert isinstance(launch, Launch)
    maps = [param for param in launch.params if isinstance(param, TensorMap)]
    assert [m.dims for m in maps] == [(256, 512, 1), (256, 256, 2, 6), (4, 512, 1), (4, 2, 2, 6)]
    assert [m.box[1:] for m in maps[1::2]] == [(128, 2, 1), (1, 2, 1)]
    for n, fused in ((512, True), (320, False)):
        text = str(jax.make_jaxpr(functools.partial(run_fp8, activation="swiglu"))(*fp8_args(0, n=n)))
        assert ("finished_alpha_bias_w" in text) == fused


def problem(grouping: str, finish: Finish, **options: Any) -> GroupedProblem:
    sizes: dict[str, Any] = {"groups": 8, "m": 4096, "n": 4096, "k": 4096, "expected": 512, "segments": 8}
    return GroupedProblem(grouping, **{**sizes, "weights": 8, "finish": finish, **options})


WHOLE = Finish(alpha=True, bias=True)
GELU = WHOLE._replace(activation=Activation("gelu"), each=True)
IN_HALVES = WHOLE._replace(activation=Activation())
OF_PAIRS = WHOLE._replace(activation=GPT_OSS)
BF16_TYPES = {"a": "bf16", "b": "bf16", "b_scales": "none"}


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("p", "tile"),
    [
        (problem("rows", OF_PAIRS), (128, 256)),
        (problem("rows", GELU._replace(quantized=True)), (128, 128)),
        (problem("masked_rows", OF_PAIRS._replace(quantized=True), **BF16_TYPES), (128, 256)),
        (problem("rows", IN_HALVES, gated=True), (64, 256)),
        (problem("masked_rows", IN_HALVES._replace(quantized=True), gated=True), (128, 256)),
    ],
    ids=str,
)
def test_ptxas_is_content(p, tile):
    pytest.importorskip("cuda.core")
    [config, *_] = [c for c in grouped_candidates(p, H200) if (c.block_m, c.block_n) == tile]
    [one] = compile_many([grouped_source(p, config)], progress=False)
    assert (one.report.problems(), one.report.static_smem_bytes) == ((), 0)
