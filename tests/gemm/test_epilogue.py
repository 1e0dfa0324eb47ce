"""Epilogues of dense GEMMs, and heads with holes: against NumPy in float64, under JAX's transformations, what
is refused, and what is launched."""

from __future__ import annotations

import functools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm import Epilogue
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.launch import Copy, Launch, Result
from jax_deepgemm.ops.gemm import kernel
from jax_deepgemm.ops.gemm.finish import Finish, Heads
from tests.shared import gemm_oracle as oracle
from tests.shared import op_checks
from tests.shared.cases import BLOCK, OUT_DTYPES, ROW, Case
from tests.shared.epilogue_oracle import ACTIVATIONS, with_epilogue
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
SHAPES = {"m": st.integers(1, 70), "n": st.integers(1, 150).map(lambda n: 2 * n), "k": st.integers(1, 300)}


def drawn(case: Case, seed: int = 0) -> tuple[float, np.ndarray]:
    """alpha and bias of sums of standard normal products."""
    rng = np.random.default_rng(seed)
    return 1 / math.sqrt(case.k), rng.standard_normal(case.n).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    **SHAPES,
    out=st.sampled_from(OUT_DTYPES),
    accumulate=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    b_block=st.sampled_from((BLOCK, ROW)),
)
def test_fp8_drawn(m, n, k, out, accumulate, activation, b_block):
    gated = isinstance(activation, Activation) or activation in ("swiglu", "geglu")
    case = Case(m, n, k, out, accumulate and not gated, b_block)
    a, sa, b, sb, *c = oracle.fp8_operands(case)
    alpha, bias = drawn(case)
    epilogue = Epilogue(alpha, jnp.asarray(bias), activation)
    got = jdg.fp8_gemm_nt((a, sa), (b, sb), *c, out_dtype=out, epilogue=epilogue)
    exact = with_epilogue(oracle.fp8_float64(case, a, sa, b, sb), alpha, bias, activation, *c)
    assert got.dtype == out
    oracle.assert_rounded(got, exact, 40 * k)


@settings(max_examples=10, deadline=None)
@given(
    **SHAPES,
    out=st.sampled_from(OUT_DTYPES),
    given_alpha=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_bf16_drawn(m, n, k, out, given_alpha, activation):
    case = Case(m, n, k, out, layout="nn")
    a, b = oracle.bf16_operands(case)
    alpha, bias = (drawn(case)[0], None) if given_alpha else (None, drawn(case)[1])
    got = jdg.bf16_gemm_nn(a, b, out_dtype=out, epilogue=Epilogue(alpha, bias, activation))
    exact = with_epilogue(
        oracle.bf16_float64(case, a, b), alpha or 1.0, 0 if bias is None else bias, activation
    )
    oracle.assert_rounded(got, exact, 40 * k)


def run_fp8(
    a: Any, sa: Any, b: Any, sb: Any, bias: Any, *c: Any, activation: Any, out_sharding: Any = None
) -> jax.Array:
    epilogue = Epilogue(jnp.float32(0.05), bias, activation)
    return jdg.fp8_gemm_nt((a, sa), (b, sb), *c, out_dtype=F32, out_sharding=out_sharding, epilogue=epilogue)


def run_bf16(a: Any, b: Any, alpha: Any, bias: Any, *c: Any, activation: Any, **options: Any) -> jax.Array:
    return jdg.bf16_gemm_nt(a, b, *c, out_dtype=F32, epilogue=Epilogue(alpha, bias, activation), **options)


def plain_bf16(a: Any, b: Any, alpha: Any, bias: Any, *c: Any, activation: Any) -> jax.Array:
    x = alpha * (a.astype(F32) @ b.astype(F32).T) + bias
    if activation == "silu":
        x = jax.nn.silu(x)
    if isinstance(activation, Activation):
        x = jax.nn.silu(x[:, 0::2]) * x[:, 1::2]
    return sum(c, x)


def run_heads(a: Any, sa: Any, b: Any, sb: Any, *d: Any, **options: Any) -> jax.Array:
    return jdg.fp8_gemm_nt_skip_head_mid(
        (a, sa), (b, sb), *d, head_splits=(64, 64, 128), out_dtype=F32, **options
    )


def fp8_args(accumulate: bool, seed: int) -> list[jax.Array]:
    case = Case(16, 576, 704, out="float32", accumulate=accumulate)
    a, sa, b, sb, *c = oracle.fp8_operands(case, seed)
    return [a, sa, b, sb, jnp.asarray(drawn(case, seed)[1]), *c]


def bf16_args(accumulate: bool, seed: int) -> list[jax.Array]:
    case = Case(16, 24, 40, out="float32", accumulate=accumulate)
    a, b, *c = oracle.bf16_operands(case, seed)
    return [a, b, jnp.float32(0.3), jnp.asarray(drawn(case, seed)[1]), *c]


def head_args(held: bool, seed: int) -> list[jax.Array]:
    case = Case(16, 384, 256, out="float32")
    rng = np.random.default_rng(seed)
    d = [jnp.asarray(rng.standard_normal((16, Heads(64, 64, 128).width(384))), F32)] if held else []
    return [*oracle.fp8_operands(case, seed), *d]


NONE = (P(),) * 3
CASES = [
    OpCase(
        "fp8-silu",
        functools.partial(run_fp8, activation="silu"),
        functools.partial(fp8_args, True),
        nests=(((0, 0, None, None, None, 0),), ((None, None, None, None, 0, None),)),
        shards=(
            Shard((P("x"), P("x"), P("y"), P(), P("y"), P("x", "y")), P("x", "y")),
            Shard((P("x"), P("x"), *NONE, P("x")), P("x"), modes=("auto", "explicit", "shard_map")),
        ),
    ),
    OpCase(
        "fp8-swiglu",
        functools.partial(run_fp8, activation=Activation(interleaved=True)),
        functools.partial(fp8_args, False),
        nests=(((0, 0, None, None, 0),),),
        shards=(
            Shard((P("x"), P("x"), *NONE), P("x", "y"), modes=("auto",)),
            Shard((P("x"), P("x"), *NONE), P("x")),
        ),
    ),
    OpCase(
        "bf16-silu-add",
        functools.partial(run_bf16, activation="silu"),
        functools.partial(bf16_args, True),
        nests=(((0, None, 0, None, 0),),),
        plain=functools.partial(plain_bf16, activation="silu"),
        wrt=(0, 1, 2, 3, 4),
        second=True,
        shards=(Shard((P("x"), P("y"), P(), P("y"), P("x", "y")), P("x", "y")),),
        grad_tolerance=2**-6,
    ),
    OpCase(
        "bf16-swiglu",
        functools.partial(run_bf16, activation=Activation(interleaved=True)),
        functools.partial(bf16_args, False),
        plain=functools.partial(plain_bf16, activation=Activation(interleaved=True)),
        wrt=(0, 1, 2, 3),
        grad_tolerance=2**-6,
    ),
    OpCase(
        "heads",
        run_heads,
        functools.partial(head_args, False),
        nests=(((0, 0, None, None),),),
        shards=(Shard((P("x"), P("x"), P(), P()), P("x")),),
    ),
    OpCase(
        "heads-held",
        run_heads,
        functools.partial(head_args, True),
        nests=(((0, 0, None, None, None),), ((None, None, None, None, 0),)),
        shards=(Shard((P("x"), P("x"), P(), P(), P("x")), P("x", "y"), modes=("auto",)),),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.parametrize("splits", [(64, 64, 64), (64, 128, 0), (0, 64, 64), (3, 5, 4), (8, 0, 8)], ids=str)
@pytest.mark.parametrize("held", [False, True])
def test_heads(splits, held):
    heads = Heads(*splits)
    case = Case(5, 3 * heads.taken, 256)
    a, sa, b, sb = oracle.fp8_operands(case)
    d = jnp.full((5, heads.width(case.n)), 7, BF16)
    got = jdg.fp8_gemm_nt_skip_head_mid((a, sa), (b, sb), *([d] if held else []), head_splits=splits)
    want = np.full(d.shape, 7.0 if held else 0.0, np.float32)
    j = np.arange(case.n)
    columns = j + (j + heads.right) // heads.taken * heads.mid
    want[:, columns] = np.asarray(jdg.fp8_gemm_nt((a, sa), (b, sb)), np.float32)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_without_elements():
    x, w = jnp.ones((3, 0), BF16), jnp.ones((4, 0), BF16)
    bias = jnp.arange(4.0)
    got = jdg.bf16_gemm_nt(x, w, epilogue=Epilogue(2.0, bias, "relu2"))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.tile([0.0, 1, 4, 9], (3, 1)))
    assert jdg.bf16_gemm_nt(jnp.ones((0, 8), BF16), jnp.ones((4, 8), BF16), epilogue=Epilogue()).shape == (
        0,
        4,
    )


@pytest.mark.parametrize(
    ("n", "activation"), [(272, "silu"), (264, None), (576, Activation(interleaved=True))]
)
@pytest.mark.parametrize("fp8", [True, False])
def test_quantised_results(n, activation, fp8):
    """The bits of the float32 result, quantised."""
    case = Case(20, n, 256, "float32")
    given = oracle.fp8_operands(case) if fp8 else oracle.bf16_operands(case)
    operands = [tuple(given[:2]), tuple(given[2:])] if fp8 else given
    function = jdg.fp8_gemm_nt if fp8 else jdg.bf16_gemm_nt
    bias = jnp.asarray(drawn(case)[1])
    got = function(*operands, epilogue=Epilogue(None, bias, activation, (1, 128)))
    want = jdg.quantize(function(*operands, out_dtype=F32, epilogue=Epilogue(None, bias, activation)))
    assert got.block == (1, 128)
    np.testing.assert_array_equal(np.asarray(got.values, np.float32), np.asarray(want.values, np.float32))
    np.testing.assert_array_equal(got.scales, want.scales)


# What is refused

X, W = jnp.ones((4, 256), BF16), jnp.ones((8, 256), BF16)
Q = jdg.quantize(X), jdg.quantize(W, BLOCK)
C = jnp.ones((4, 8), BF16)
BAD = {
    "kind": (lambda: jdg.bf16_gemm_nt(X, W, epilogue="silu"), TypeError, "need a jax_deepgemm.Epilogue"),
    "alpha": (lambda: jdg.bf16_gemm_nt(X, W, epilogue=Epilogue(jnp.ones(4))), ValueError, "need a number"),
    "bool": (lambda: jdg.bf16_gemm_nt(X, W, epilogue=Epilogue(True)), ValueError, "alpha is True"),
    "bias": (
        lambda: jdg.bf16_gemm_nt(X, W, epilogue=Epilogue(None, jnp.ones(4))),
        ValueError,
        r"float32 \[8\]",
    ),
    "name": (lambda: jdg.bf16_gemm_nt(X, W, epilogue=Epilogue(activation="tanh")), ValueError, "'geglu'"),
    "odd": (lambda: jdg.bf16_gemm_nt(X, W[:7], epilogue=Epilogue(activation="swiglu")), ValueError, "Pad b"),
    "c": (lambda: jdg.bf16_gemm_nt(X, W, C, epilogue=Epilogue(activation=GPT_OSS)), ValueError, "Add it to"),
    "scales": (
        lambda: jdg.bf16_gemm_nt(X, W, epilogue=Epilogue(out_scales=(128, 128))),
        ValueError,
        "Other blocks",
    ),
    "c of scales": (
        lambda: jdg.bf16_gemm_nt(X, W, C, epilogue=Epilogue(out_scales=(1, 128))),
        ValueError,
        "Add c",
    ),
    "splits": (lambda: jdg.fp8_gemm_nt_skip_head_mid(*Q, head_splits=(4, 4)), TypeError, "three ints"),
    "heads": (lambda: jdg.fp8_gemm_nt_skip_head_mid(*Q, head_splits=(4, 4, 1)), ValueError, "divide them"),
    "d": (
        lambda: jdg.fp8_gemm_nt_skip_head_mid(*Q, C, head_splits=(2, 4, 2)),
        ValueError,
        r"need bfloat16 \[4, 16\]",
    ),
    "gradient": (
        lambda: jax.grad(lambda b: jdg.fp8_gemm_nt(*Q, epilogue=Epilogue(bias=b)).astype(F32).sum())(
            jnp.ones(8)
        ),
        NotImplementedError,
        "fp8_linear",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    call, error, says = BAD[name]
    with pytest.raises(error, match=says):
        call()


# What is launched


def plan_of(one: Any, finish: Finish, shapes: list[Any], out: Any, batch: Any = None, **params: Any) -> Any:
    types = [jax.ShapeDtypeStruct(*x) for x in shapes]
    result = [jax.ShapeDtypeStruct(*out)]
    return one.plan(types, result, batch=batch, chip=H200, finish=finish, **params)


FP8 = jnp.float8_e4m3fn


def fp8_shapes(m: int, n: int, k: int) -> list[Any]:
    return [((m, k), FP8), ((m, k // 128), F32), ((n, k), FP8), ((n // 128, k // 128), F32)]


@pytest.mark.any_version
def test_holes_keep_what_d_holds():
    """D's memory comes in front of the kernel, unless it is the result's already; zeros are the kernel's."""
    pytest.importorskip("cuda.core")
    heads = Heads(128, 64, 128)
    d = ((4096, heads.width(1024)), BF16)
    copy, launch = plan_of(
        kernel.fp8_finished, Finish(heads=heads), [*fp8_shapes(4096, 1024, 512), d], d
    ).steps
    assert isinstance(copy, Copy)
    assert copy.num_bytes == 4096 * 1280 * 2
    assert launch.kernel.name.endswith("heads128_64_128")
    [launch] = plan_of(
        kernel.fp8_finished, Finish(heads=heads, fill=True), fp8_shapes(4096, 1024, 512), d
    ).steps
    assert launch.kernel.name.endswith("heads128_64_128_zeros")


@pytest.mark.any_version
@pytest.mark.parametrize("m", [5, 4096])
def test_parameters_of_a_finished_product(m):
    """Tensor maps, D, C, alpha, bias, integers; a batch moves alpha and bias where they have one."""
    pytest.importorskip("cuda.core")
    finish = Finish(alpha=True, bias=True, activation=Activation("gelu"), each=True)
    shapes = [((2, m, 512), BF16), ((1024, 512), BF16), ((1,), F32), ((2, 1024), F32), ((2, m, 1024), BF16)]
    [launch] = plan_of(
        kernel.bf16_finished,
        finish,
        shapes,
        ((2, m, 1024), BF16),
        (True, False, False, True, True),
        layout="nt",
    ).steps
    assert isinstance(launch, Launch)
    assert "add_alpha_bias_gelu" in launch.kernel.name
    pointers = [p for p in launch.params if type(p).__name__ in ("Operand", "Result")]
    d, *others = pointers
    assert d == Result(0)
    assert [p.index for p in others] == [4, 2, 3]
    assert [p.value for p in launch.params[-2:]] == [0, 1]
