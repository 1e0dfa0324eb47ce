"""Epilogues of dense GEMMs, and heads with holes, on an H200: bit for bit a float32 product and then the same
in float32, or, behind an activation, within its fast exponential.

Run: pytest -m gpu tests/gpu/test_epilogue_gpu.py        (under a minute, kernels compiled anew)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import Epilogue
from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.ops.gemm.epilogue import check_epilogue
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.finish import AS_IT_IS, Finish, Heads
from jax_deepgemm.ops.gemm.problem import GemmProblem
from tests.shared import gemm_oracle as oracle
from tests.shared.cases import ROW, Case
from tests.shared.epilogue_oracle import with_epilogue
from tests.shared.gemm_products import problem
from tests.shared.gpu_programs import program

BF16, F32 = jnp.bfloat16, jnp.float32
# One row, few of them (clusters, swap_ab), a tail in every dimension, several tiles for each SM, odd n.
SHAPES = (
    (1, 264, 512),
    (5, 520, 1000),
    (63, 2112, 7168),
    (300, 328, 640),
    (2000, 4096, 384),
    (130, 577, 256),
)


ACTIVATED = ("silu", "gelu", "relu2", "swiglu", Activation(interleaved=True), GPT_OSS)
ACTIVATED_SHAPES = ((SHAPES[1], "bfloat16"), (SHAPES[3], "float32"), (SHAPES[4], "bfloat16"))
HEADS = (
    (1, (128, 64, 128), "bfloat16"),
    (5, (64, 128, 192), "float32"),
    (64, (256, 64, 64), "bfloat16"),
    (200, (128, 64, 128), "float32"),
    (200, (64, 128, 192), "bfloat16"),
    (4100, (128, 64, 128), "bfloat16"),
    (4100, (256, 64, 64), "float32"),
)
QUANTIZED = (
    (5, 272, 512, "silu"),
    (300, 1024, 1000, None),
    (2100, 400, 384, "gelu"),
    (64, 128, 256, "relu2"),
)
KINDS = ("fp8", "fp8 rows", "bf16", "bf16 nn")
ADDED = [(shape, ("bfloat16", "float32")[i % 2], i // 2 % 2 == 0) for i, shape in enumerate(SHAPES * 2)]


def kernels() -> Iterator[GemmProblem]:
    """What the chosen configurations of the tables below need (kernels.py)."""
    scaled = [Finish(alpha=True, bias=True), Finish(bias=True), Finish(alpha=True)]
    for shape, finish in itertools.product(SHAPES, [AS_IT_IS, *scaled]):
        out = "float32" if finish == AS_IT_IS else "bfloat16"
        cases = [
            (Case(*shape, out), True),
            (Case(*shape, out, b_block=ROW), True),
            (Case(*shape, out), False),
        ]
        cases.append((Case(*shape, out, layout="nn"), False))
        yield from (dataclasses.replace(problem(*case), finish=finish) for case in cases)
    for (shape, out), fp8, activation in itertools.product(ACTIVATED_SHAPES, (True, False), ACTIVATED):
        checked = check_epilogue("test", Epilogue(1, jnp.zeros(shape[1]), activation), shape[1], None)
        out = "float32" if checked.halves else out
        yield dataclasses.replace(problem(Case(*shape, out), fp8), finish=checked.finish)
    silu = Finish(True, True, Activation(), each=True)
    for shape, out, fp8 in ADDED:
        yield dataclasses.replace(problem(Case(*shape, out, accumulate=True), fp8), finish=silu)
    for (m, splits, out), fill in itertools.product(HEADS, (True, False)):
        heads = Heads(*splits)
        case = Case(m, 4 * heads.taken, 512, out)
        yield dataclasses.replace(problem(case, True), finish=Finish(heads=heads, fill=fill))


def operands(case: Case, fp8: bool) -> list[Any]:
    if fp8:
        a, sa, b, sb, *c = oracle.fp8_operands(case)
        return [(a, sa), (b, sb), *c]
    return oracle.bf16_operands(case)


def gemm(case: Case, fp8: bool) -> Any:
    function = jdg.fp8_gemm_nt if fp8 else getattr(jdg, f"bf16_gemm_{case.layout}")
    return functools.partial(function, out_dtype=case.out)


def bits(x: Any) -> np.ndarray:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[np.asarray(x).dtype.itemsize])


def bias_of(n: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(n).standard_normal(n), F32)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_and_moved_as_one_by_one(shape, kind):
    """alpha a power of two, so that it does not matter whether its product is rounded."""
    fp8 = kind.startswith("fp8")
    case = Case(
        *shape, layout="nn" if kind == "bf16 nn" else "nt", **({"b_block": ROW} if "rows" in kind else {})
    )
    given, bias = operands(case, fp8), bias_of(case.n)
    run = gemm(case, fp8)
    whole = functools.partial(gemm(case, fp8), out_dtype=F32)

    def both(given: Any, bias: Any) -> Any:
        got = [run(*given, epilogue=Epilogue(0.25, bias)), run(*given, epilogue=Epilogue(bias=bias))]
        got.append(run(*given, epilogue=Epilogue(jnp.float32(3))))
        return got, whole(*given)

    got, sums = program(both)(given, bias)
    want = [sums * 0.25 + bias, sums + bias, sums * 3]
    for one, other in zip(got, want, strict=True):
        other = np.asarray(other.astype(BF16))
        assert_near(one, other)


def assert_near(got: Any, want: Any) -> None:
    """Another configuration may be chosen for float32, whose sums round otherwise."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert (np.abs(got - want) <= 2.0**-7 * np.abs(want) + 1e-5 * np.abs(want).max()).all()


@pytest.mark.parametrize(
    "config",
    [GemmConfig(128, 128, 4, slabs=2), GemmConfig(64, 64, 4, split_k=2)],
    ids=["persistent", "split"],
)
@pytest.mark.parametrize("fp8", [True, False])
def test_one_configuration_gives_the_same_bits(config, fp8):
    """The float32 product of the same tiles, then alpha, bias and one rounding."""
    case = Case(200, 640, 1024)
    given, bias = operands(case, fp8), bias_of(case.n)
    run = gemm(case, fp8)
    plain = GemmConfig(
        config.block_m, config.block_n, 4, split_k=config.split_k, slabs=2 if config.slabs else 0
    )

    def both(given: Any, bias: Any) -> Any:
        got = run(*given, epilogue=Epilogue(0.5, bias), config=config)
        return got, gemm(Case(200, 640, 1024, "float32"), fp8)(*given, config=plain)

    got, sums = program(both)(given, bias)
    want = jnp.asarray(np.asarray(sums) * np.float32(0.5) + np.asarray(bias)).astype(BF16)
    np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("activation", ACTIVATED, ids=str)
@pytest.mark.parametrize(("shape", "out"), ACTIVATED_SHAPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_activations_in_float64(shape, out, activation, fp8):
    case = Case(*shape, out)
    given, bias = operands(case, fp8), bias_of(case.n)
    alpha = 1 / np.sqrt(case.k)
    got = program(lambda given, bias: gemm(case, fp8)(*given, epilogue=Epilogue(alpha, bias, activation)))(
        given, bias
    )
    if fp8:
        (a, sa), (b, sb) = given
        sums = oracle.fp8_float64(case, a, sa, b, sb)
    else:
        sums = oracle.bf16_float64(case, *given)
    before = with_epilogue(sums, np.float32(alpha), bias, None)
    want = with_epilogue(sums, np.float32(alpha), bias, activation)
    once = {"bfloat16": 2.0**-8, "float32": 2.0**-22}[out]
    error = np.abs(np.asarray(got, np.float64) - want)
    of_sums = 3e-4 if fp8 else 2e-5  # FP8 products are summed with 14 bits
    within = steepest(activation, np.abs(before).max()) * of_sums * np.abs(before).max()
    assert np.all(error <= once * np.abs(want) + within), (error.max(), within)


def steepest(activation: Any, largest: float) -> float:
    """A bound of the derivative: products of two numbers grow with them, up to the limit if there is one."""
    if activation in ("silu", "gelu"):
        return 1.2
    limit = getattr(activation, "limit", None)
    return 2.4 * (largest if limit is None else min(largest, limit + 1))


@pytest.mark.parametrize(("shape", "out", "fp8"), ADDED, ids=str)
def test_c_comes_last(shape, out, fp8):
    case = Case(*shape, out, accumulate=True)
    given, bias = operands(case, fp8), bias_of(case.n)
    alpha = 1 / np.sqrt(case.k)
    got = program(lambda given, bias: gemm(case, fp8)(*given, epilogue=Epilogue(alpha, bias, "silu")))(
        given, bias
    )
    *pair, c = given
    sums = oracle.fp8_float64(case, *pair[0], *pair[1]) if fp8 else oracle.bf16_float64(case, *pair)
    oracle.assert_rounded(got, with_epilogue(sums, np.float32(alpha), bias, "silu", c), 400 * case.k)


def test_a_batch_has_its_own_bias_and_alpha():
    case = Case(70, 264, 512)
    a, b = operands(case, False)
    alphas, biases = jnp.array([1.0, 2, -3]), jnp.stack([bias_of(264) * i for i in range(3)])
    run = lambda alpha, bias: jdg.bf16_gemm_nt(a, b, epilogue=Epilogue(alpha, bias, "relu2"))  # noqa: E731
    got = program(jax.vmap(run))(alphas, biases)
    for i in range(3):
        np.testing.assert_array_equal(bits(got[i]), bits(program(run)(alphas[i], biases[i])))


def test_no_row_meets_another_and_reruns_are_equal():
    case = Case(300, 328, 640)
    (a, sa), b = operands(case, True)
    poisoned = (a, sa.at[7].set(jnp.nan))
    gated = functools.partial(Epilogue, 0.1, activation=Activation(interleaved=True))
    run = program(lambda a, b, bias: jdg.fp8_gemm_nt(a, b, epilogue=gated(bias=bias)))
    clean, got = run((a, sa), b, bias_of(328)), run(poisoned, b, bias_of(328))
    assert np.isnan(np.asarray(got, np.float32)[7]).all()
    others = np.arange(300) != 7
    np.testing.assert_array_equal(bits(got)[others], bits(clean)[others])
    for _ in range(20):
        np.testing.assert_array_equal(bits(run((a, sa), b, bias_of(328))), bits(clean))


@pytest.mark.parametrize(("m", "n", "k", "activation"), QUANTIZED, ids=str)
@pytest.mark.parametrize("fp8", [True, False])
def test_quantised_results(m, n, k, activation, fp8):
    """The bits of the float32 result of one configuration, quantised, in buffers of NaN."""
    case = Case(m, n, k)
    given, bias = operands(case, fp8), bias_of(n)
    run = gemm(case, fp8)
    epilogue = functools.partial(Epilogue, 0.5, activation=activation)
    config, plain = GemmConfig(128, 128, 4, slabs=2), GemmConfig(128, 128, 4, slabs=2 if n % 4 == 0 else 0)

    def both(given: Any, bias: Any) -> Any:
        got = run(*given, epilogue=epilogue(bias=bias, out_scales=(1, 128)), config=config)
        d = run(*given, epilogue=epilogue(bias=bias), config=plain, out_dtype=F32)
        return got, jdg.quantize(d)

    got, want = program(both)(given, bias)
    np.testing.assert_array_equal(
        np.asarray(got.values).view(np.uint8), np.asarray(want.values).view(np.uint8)
    )
    np.testing.assert_array_equal(bits(got.scales), bits(want.scales))


@pytest.mark.smoke
@pytest.mark.parametrize(("m", "splits", "out"), HEADS, ids=str)
def test_heads(m, splits, out):
    """Holes keep NaN of d, or become zeros in a buffer of NaN; the rest is the product's."""
    heads = Heads(*splits)
    n = 4 * heads.taken
    case = Case(m, n, 512, out)
    a, b = operands(case, True)
    d = jnp.full((m, heads.width(n)), jnp.nan, out)
    run = functools.partial(jdg.fp8_gemm_nt_skip_head_mid, head_splits=splits, out_dtype=out)
    held = program(lambda d, a, b: run(a, b, d), donate_argnums=0)(d, a, b)
    into = program(lambda _, a, b: run(a, b), donate_argnums=0, keep_unused=True)
    zeros = into(jnp.full(d.shape, jnp.nan, out), a, b)
    product = program(functools.partial(jdg.fp8_gemm_nt, out_dtype=out))(a, b)
    j = np.arange(n)
    columns = j + (j + heads.right) // heads.taken * heads.mid
    holes = np.setdiff1d(np.arange(d.shape[1]), columns)
    held, zeros = np.asarray(held, np.float32), np.asarray(zeros, np.float32)
    assert np.isnan(held[:, holes]).all()
    assert (zeros[:, holes] == 0).all()
    np.testing.assert_array_equal(held[:, columns], zeros[:, columns])
    assert_near(zeros[:, columns], product)
