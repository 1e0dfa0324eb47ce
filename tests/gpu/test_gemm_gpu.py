"""Dense GEMMs on an H200: the whole shape table, edge cases, poison, transformations, gradients.

What is compared with what, and how closely: gemm_products.py.

Run: pytest -m gpu tests/gpu/test_gemm_gpu.py        (under 3 minutes, kernels compiled anew)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm import reference
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import tma_store
from tests.shared import cases
from tests.shared import gemm_oracle as oracle
from tests.shared.cases import BLOCK, EDGE_SHAPES, FP8_PAIRS, LAYOUTS, ROW, ZERO_SHAPES, Case
from tests.shared.choosing import ranked
from tests.shared.gemm_products import (
    BF16_LIMIT,
    FP8_LIMIT,
    ORACLE_LIMIT,
    bf16_exact,
    bf16_gemm,
    check,
    check_bf16,
    check_fp8,
    fp8_exact,
    fp8_gemm,
    problem,
)
from tests.shared.gpu_programs import (
    C_ELSEWHERE,
    PIECE,
    chain,
    difference,
    program,
    random_numbers,
    with_c_elsewhere,
)

BF16, F32, E4 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


def dot32(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T in float32."""
    return lax.dot_general(
        a.astype(F32), b.astype(F32), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


FP8_FORWARD, FP8_DGRAD = list(cases.dense_forward_fp8()), list(cases.dense_dgrad_fp8())
FP8_WGRAD, BF16_WGRAD = list(cases.dense_wgrad_fp8()), list(cases.dense_wgrad_bf16())
BF16_FORWARD, BF16_DGRAD = list(cases.dense_forward_bf16()), list(cases.dense_dgrad_bf16())
FP8_KINDS = [(out, add, block) for out in cases.OUT_DTYPES for add in (False, True) for block in (BLOCK, ROW)]
BF16_KINDS = [(out, add, layout) for out in cases.OUT_DTYPES for add in (False, True) for layout in LAYOUTS]


def rotate(kinds: list[Any], index: int, count: int) -> list[Any]:
    """A few of all kinds, others for each index."""
    return [kinds[(index + 3 * i) % len(kinds)] for i in range(count)]


def fp8_edges(index: int) -> list[Case]:
    return [Case(*EDGE_SHAPES[index], o, add, block) for o, add, block in rotate(FP8_KINDS, index, 4)]


def bf16_edges(index: int) -> list[Case]:
    return [
        Case(*EDGE_SHAPES[index], o, add, layout=layout) for o, add, layout in rotate(BF16_KINDS, index, 4)
    ]


def e5m2_cases(pair: tuple[str, str]) -> list[Case]:
    return [Case(m, 576, 1000, a_dtype=pair[0], b_dtype=pair[1]) for m in (3, 200)]


FP8_IN_ANY_LAYOUT = [
    Case(100, 264, 400, out="float32", accumulate=True),
    Case(5, 72, 129, b_block=ROW),
]
POISONED = ((1, 8, 192), (5, 104, 256), (63, 136, 128), (129, 577, 1000), (200, 2112, 7296), (300, 248, 640))


def kernels() -> Iterator[GemmProblem]:
    """What the tables below need (kernels.py)."""
    every = range(len(EDGE_SHAPES))
    fp8 = FP8_FORWARD + FP8_DGRAD + FP8_WGRAD + [c for i in every for c in fp8_edges(i)]
    bf16 = BF16_FORWARD + BF16_DGRAD + BF16_WGRAD + [c for i in every for c in bf16_edges(i)]
    for shape, out in itertools.product(POISONED, cases.OUT_DTYPES):
        both = [Case(*shape, out), Case(*shape, "float32", accumulate=True)]
        fp8, bf16 = fp8 + both, bf16 + both
    fp8 += [case for case_list in (e5m2_cases(pair) for pair in FP8_PAIRS) for case in case_list]
    yield from (problem(case, True) for case in fp8 + FP8_IN_ANY_LAYOUT)
    yield from (problem(case, False) for case in bf16)


@functools.cache
def pool() -> jax.Array:
    """Standard normal numbers that every test cuts its operands from."""
    return random_numbers(129280 * 7168 + PIECE)


def cut(numbers: jax.Array, seed: int, *shape: int) -> jax.Array:
    size, start = math.prod(shape), 1_048_576 * seed
    return lax.slice(numbers, (start,), (start + size,)).reshape(shape)


# The shape table ----------------------------------------------------------------------------------------


def sizes(table: Iterable[Case]) -> list[tuple[int, int, int]]:
    return list(dict.fromkeys((c.m, c.n, c.k) for c in table))


@pytest.mark.parametrize("shape", sizes(FP8_FORWARD + FP8_DGRAD), ids=str)
def test_table_forward_and_dgrad_fp8(shape):
    m, n, k = shape

    def run(numbers: jax.Array) -> dict[str, jax.Array]:
        x, w = cut(numbers, 0, m, k), cut(numbers, 1, n, k)
        qx, qw = jdg.quantize(x), jdg.quantize(w, BLOCK)
        y = jdg.fp8_gemm_nt(qx, qw)
        (want,) = reference.fp8_gemm(qx.values, qx.scales, qw.values, qw.scales, out_dtype=F32)
        return {"unquantised": difference(y, dot32(x, w)), "oracle": difference(y, want)}

    check(program(run)(pool()), {"unquantised": FP8_LIMIT, "oracle": ORACLE_LIMIT["bfloat16"]})


@pytest.mark.parametrize("shape", sizes(FP8_WGRAD), ids=str)
def test_table_wgrad_fp8(shape):
    """float32 accumulation with both operands 1x128 along tokens, and bfloat16 with a 128x128 B."""
    m, n, k = shape

    def run(numbers: jax.Array) -> dict[str, jax.Array]:
        dy, x = cut(numbers, 0, m, k), cut(numbers, 1, n, k)
        c = 32 * cut(numbers, 2, m, n).astype(F32)
        qdy, rows, blocks = jdg.quantize(dy), jdg.quantize(x), jdg.quantize(x, BLOCK)
        grad = jdg.fp8_gemm_nt(qdy, rows, c, out_dtype=F32)
        plain = jdg.fp8_gemm_nt(qdy, rows, out_dtype=F32)
        narrow = jdg.fp8_gemm_nt(qdy, blocks)
        exact = dot32(dy, x)
        (want,) = reference.fp8_gemm(qdy.values, qdy.scales, rows.values, rows.scales, out_dtype=F32)
        (other,) = reference.fp8_gemm(qdy.values, qdy.scales, blocks.values, blocks.scales, out_dtype=F32)
        return {
            "f32+c": difference(grad, exact + c),
            "f32+c oracle": difference(grad - c, want),
            "f32 oracle": difference(plain, want),
            "bf16": difference(narrow, exact),
            "bf16 oracle": difference(narrow, other),
        }

    limits = {
        "f32+c": FP8_LIMIT,
        "f32+c oracle": 1e-6,
        "f32 oracle": 1e-6,
        "bf16": FP8_LIMIT,
        "bf16 oracle": 1e-5,
    }
    check(program(run)(pool()), limits)


@pytest.mark.parametrize("shape", sizes(BF16_FORWARD), ids=str)
def test_table_forward_bf16(shape):
    m, n, k = shape
    kinds = [(c.out, c.accumulate) for c in BF16_FORWARD if (c.m, c.n, c.k) == shape]

    def run(numbers: jax.Array) -> dict[str, jax.Array]:
        x, w = cut(numbers, 0, m, k), cut(numbers, 1, n, k)
        exact, found = dot32(x, w), {}
        for out, add in kinds:
            c = (32 * cut(numbers, 2, m, n)).astype(out) if add else None
            y = jdg.bf16_gemm_nt(x, w, c, out_dtype=out)
            found[f"{out}{'+c' if add else ''}"] = difference(y, exact if c is None else exact + c)
        return found

    check(program(run)(pool()), {f"{o}{'+c' if add else ''}": BF16_LIMIT[o] for o, add in kinds})


@pytest.mark.parametrize("case", BF16_DGRAD, ids=str)
def test_table_dgrad_bf16(case):
    def run(numbers: jax.Array) -> dict[str, jax.Array]:
        dy, w = cut(numbers, 0, case.m, case.k), cut(numbers, 1, case.k, case.n)
        return {"dx": difference(jdg.bf16_gemm_nn(dy, w), dot32(dy, w.T))}

    check(program(run)(pool()), {"dx": BF16_LIMIT["bfloat16"]})


@pytest.mark.parametrize("shape", sizes(BF16_WGRAD), ids=str)
def test_table_wgrad_bf16(shape):
    m, n, k = shape

    def run(numbers: jax.Array) -> dict[str, jax.Array]:
        dy, x = cut(numbers, 0, k, m), cut(numbers, 1, k, n)
        c, exact = 32 * cut(numbers, 2, m, n).astype(F32), dot32(dy.T, x.T)
        accumulated = jdg.bf16_gemm_tn(dy, x, c, out_dtype=F32)
        return {
            "f32+c": difference(accumulated, exact + c),
            "f32+c-c": difference(accumulated - c, exact),
            "bf16": difference(jdg.bf16_gemm_tn(dy, x), exact),
        }

    check(program(run)(pool()), {"f32+c": 1e-8, "f32+c-c": 1e-8, "bf16": 1e-5})


# Edge cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(EDGE_SHAPES)), ids=lambda i: str(EDGE_SHAPES[i]))
def test_edges(index):
    """Odd and small m, n and k; both B scales, all layouts, with and without C, both results."""
    check_fp8(fp8_edges(index))
    check_bf16(bf16_edges(index))


@pytest.mark.smoke
@pytest.mark.parametrize("pair", FP8_PAIRS, ids=str)
def test_e5m2(pair):
    check_fp8(e5m2_cases(pair))


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_layouts(layout):
    def run(case: Case, arrays: list[Any]) -> jax.Array:
        a, sa, b, sb, *c = arrays
        first = (a.T, sa.T) if layout[0] == "t" else (a, sa)
        second = (b.T, sb.T) if layout[1] == "n" else (b, sb)
        return getattr(jdg, f"fp8_gemm_{layout}")(first, second, *c, out_dtype=case.out)

    check_fp8(FP8_IN_ANY_LAYOUT, run)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=str)
def test_empty(shape):
    for add in (False, True):
        case = Case(*shape, accumulate=add)
        for got, want in (
            (fp8_gemm(case, x := oracle.fp8_operands(case)), oracle.fp8_float64(case, *x)),
            (bf16_gemm(case, x := oracle.bf16_operands(case)), oracle.bf16_float64(case, *x)),
        ):
            np.testing.assert_array_equal(np.asarray(got, np.float64), want)


def extremes(case: Case) -> list[Any]:
    """Largest and smallest stored values, scales over many powers of two."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.choice([-448, -1, -(2.0**-9), 0, 2.0**-9, 1, 448], s), E4)  # noqa: E731
    scale = lambda *s: jnp.asarray(np.exp2(rng.integers(-30, 30, s)), F32)  # noqa: E731
    blocks = -(-case.k // 128)
    arrays = [draw(case.m, case.k), scale(case.m, blocks), draw(case.n, case.k)]
    return [*arrays, scale(-(-case.n // 128), blocks)]


@pytest.mark.parametrize("m", [4, 200])
def test_extreme_values_and_scales(m):
    """Each scale block is promoted to float32 on its own: one that is 2^60 smaller does no harm."""
    case = Case(m, 264, 1024, out="float32")
    arrays = extremes(case)
    got, want = fp8_gemm(case, arrays), oracle.fp8_float64(case, *arrays)
    assert np.all(np.isfinite(got))
    row_scale = np.abs(want).max(axis=1, keepdims=True)
    assert np.abs(np.asarray(got) - want).max() <= 1e-3 * row_scale.max()


@pytest.mark.smoke
@pytest.mark.parametrize("m", [4, 200])
def test_a_nan_stays_in_its_row(m):
    case = Case(m, 264, 448, out="float32")
    arrays = oracle.fp8_operands(case)
    arrays[0] = arrays[0].at[1, 200].set(jnp.nan)
    assert np.array_equal(np.isnan(fp8_gemm(case, arrays)).any(axis=1), np.arange(m) == 1)
    a, b = oracle.bf16_operands(case)
    got = jdg.bf16_gemm_nt(a, b.at[7, 3].set(jnp.nan))
    assert np.array_equal(np.isnan(np.asarray(got, np.float32)).any(axis=0), np.arange(264) == 7)


# Poison ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", POISONED, ids=str)
@pytest.mark.parametrize("out", cases.OUT_DTYPES)
def test_result_buffer_full_of_nan(shape, out):
    """The result takes the place of a donated buffer of NaN: every element is written."""
    case = Case(*shape, out=out)
    for run, want, arrays in (
        (fp8_gemm, fp8_exact, oracle.fp8_operands(case)),
        (bf16_gemm, functools.partial(bf16_exact, case), oracle.bf16_operands(case)),
    ):
        poisoned = jnp.full((case.m, case.n), jnp.nan, out)
        place = poisoned.unsafe_buffer_pointer()
        step = program(lambda _, x, run=run: run(case, x), donate_argnums=0, keep_unused=True)
        got = step(poisoned, arrays)
        assert got.unsafe_buffer_pointer() == place
        assert float(difference(got, want(arrays))) < ORACLE_LIMIT[out]


@pytest.mark.parametrize("shape", POISONED, ids=str)
def test_operands_between_nan(shape):
    """In front of and behind every operand lies NaN, in the same buffer: none of it counts."""
    for accumulate in (False, True):
        case = Case(*shape, out="float32", accumulate=accumulate)
        for run, arrays in (
            (fp8_gemm, oracle.fp8_operands(case)),
            (bf16_gemm, oracle.bf16_operands(case)),
        ):
            around = [jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)]) for x in arrays]
            inside = program(lambda stacks, run=run: run(case, [x[1] for x in stacks]))  # noqa: B023
            alone = program(lambda xs, run=run: run(case, xs))  # noqa: B023
            np.testing.assert_array_equal(inside(around), alone(arrays))


# Transformations ------------------------------------------------------------------------------------------


def test_eager_is_jit():
    for case in (Case(3, 130, 200), Case(129, 577, 1000, accumulate=True)):
        for run, arrays in ((fp8_gemm, oracle.fp8_operands(case)), (bf16_gemm, oracle.bf16_operands(case))):
            np.testing.assert_array_equal(run(case, arrays), jax.jit(functools.partial(run, case))(arrays))


@pytest.mark.parametrize("shared", [(), (2, 3), (0, 1), (4,)], ids=("none", "b", "a", "c"))
@pytest.mark.parametrize("shape", [(5, 136, 320), (130, 584, 450)], ids=str)
def test_vmap_fp8(shape, shared):
    batch = 3
    case = Case(*shape, out="float32", accumulate=True)
    each = [oracle.fp8_operands(case, seed) for seed in range(batch)]
    mixed = [each[0][i] if i in shared else jnp.stack([arrays[i] for arrays in each]) for i in range(5)]
    axes = [None if i in shared else 0 for i in range(5)]
    got = program(jax.vmap(lambda *x: fp8_gemm(case, list(x)), axes))(*mixed)
    for z in range(batch):
        want = fp8_exact([each[0 if i in shared else z][i] for i in range(5)])
        assert float(difference(got[z], want)) < ORACLE_LIMIT["float32"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [(), (1,), (0,)], ids=("none", "b", "a"))
def test_vmap_bf16(layout, shared):
    case = Case(72, 130, 100, out="float32", layout=layout)
    each = [oracle.bf16_operands(case, seed) for seed in range(3)]
    mixed = [each[0][i] if i in shared else jnp.stack([arrays[i] for arrays in each]) for i in range(2)]
    axes = [None if i in shared else 0 for i in range(2)]
    got = program(jax.vmap(lambda *x: bf16_gemm(case, list(x)), axes))(*mixed)
    for z in range(3):
        want = bf16_exact(case, [each[0 if i in shared else z][i] for i in range(2)])
        assert float(difference(got[z], want)) < BF16_LIMIT["float32"]


@pytest.mark.smoke
def test_vmap_of_vmap():
    """Two levels, one on each operand: every pair."""
    case = Case(40, 72, 128, out="float32")
    a, b = (jnp.stack([oracle.bf16_operands(case, s)[i] for s in range(2 + i)]) for i in range(2))
    pairs = jax.vmap(jax.vmap(lambda a, b: bf16_gemm(case, [a, b]), (None, 0)), (0, None))
    got = program(pairs)(a, b)
    for i, j in np.ndindex(2, 3):
        assert float(difference(got[i, j], bf16_exact(case, [a[i], b[j]]))) < BF16_LIMIT["float32"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_bf16_with_one_c_for_all(layout):
    """A C that is shared is read by the epilogue, and D leaves through TMA all the same."""
    case = Case(200, 264, 328, out="float32", accumulate=True, layout=layout)
    shared = dataclasses.replace(problem(case, False), batches=3, batched=(True, True, False))
    config = next(config for config, _ in ranked(shared, H200) if tma_store(shared, config))
    each = [oracle.bf16_operands(case, seed) for seed in range(3)]
    a, b = (jnp.stack([arrays[i] for arrays in each]) for i in range(2))
    c = each[0][2]
    before = np.asarray(c)
    buffer = jnp.full((3, case.m, case.n), jnp.nan, F32)
    place = buffer.unsafe_buffer_pointer()
    run = jax.vmap(lambda *x: bf16_gemm(case, list(x), config=config), (0, 0, None))
    got = program(lambda _, *x: run(*x), donate_argnums=0, keep_unused=True)(buffer, a, b, c)
    assert got.unsafe_buffer_pointer() == place
    for z in range(3):
        assert oracle.calc_diff(got[z], oracle.bf16_float64(case, a[z], b[z], c)) < BF16_LIMIT["float32"]
    np.testing.assert_array_equal(c, before)


def step(x: jax.Array, w: Any) -> jax.Array:
    y = jdg.fp8_gemm_nt(jdg.quantize(x), w, out_dtype=F32) + jdg.bf16_gemm_nn(x, x.T @ x, out_dtype=F32)
    return (y / jnp.maximum(jnp.abs(y).max(), 1.0)).astype(BF16)


@pytest.mark.parametrize("scanned", [False, True], ids=("unrolled", "scan"))
def test_many_calls_in_one_program(scanned):
    """Captured by command buffers or not, run again and again with other buffers: always the same bits."""
    w = jdg.quantize(jax.random.normal(jax.random.key(1), (256, 256)), BLOCK)
    many, once = jax.jit(functools.partial(chain, step, steps=8, scanned=scanned)), jax.jit(step)
    for seed in range(4):
        x = jax.random.normal(jax.random.key(seed), (64, 256), BF16)
        got = [many(x + 0, w) for _ in range(3)]
        assert all(np.array_equal(got[0], other) for other in got[1:])
        assert oracle.calc_diff(got[0], chain(once, x, w, steps=8)) < 1e-3


@pytest.mark.smoke
def test_donated_c_is_updated_in_place():
    case = Case(256, 1024, 512, out="float32", accumulate=True)
    *arrays, c = oracle.fp8_operands(case)
    want = oracle.fp8_float64(case, *arrays, c)
    place = c.unsafe_buffer_pointer()
    got = program(lambda c, x: fp8_gemm(case, [*x, c]), donate_argnums=0)(c, arrays)
    assert got.unsafe_buffer_pointer() == place
    assert oracle.calc_diff(got, want) < 1e-8


@pytest.mark.parametrize("where", C_ELSEWHERE)
@pytest.mark.parametrize("shape", [(8, 136, 320), (224, 130, 264), (256, 1024, 512)], ids=str)
def test_c_that_lives_on_is_added_and_not_changed(shape, where):
    case = Case(*shape, out="float32", accumulate=True)
    for run, exact, arrays, limits in (
        (fp8_gemm, oracle.fp8_float64, oracle.fp8_operands(case), ORACLE_LIMIT),
        (bf16_gemm, oracle.bf16_float64, oracle.bf16_operands(case), BF16_LIMIT),
    ):
        *operands, c = arrays
        d = with_c_elsewhere(where, lambda c, *x, run=run: run(case, [*x, c]), c, *operands)
        assert oracle.calc_diff(d, exact(case, *arrays)) < limits["float32"]


# Gradients ------------------------------------------------------------------------------------------------


def on_both(function: Callable[..., Any], *arrays: Any) -> tuple[Any, Any]:
    """Results on the GPU and on the CPU."""
    cpu = jax.devices("cpu")[0]
    there = jax.jit(function)(*jax.device_put(arrays, cpu))
    return program(function)(*arrays), there


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gradients_are_those_of_the_reference(layout):
    case = Case(40, 72, 104, out="float32", layout=layout, accumulate=True)
    arrays = oracle.bf16_operands(case)
    loss = lambda *x: jnp.sum(jnp.sin(bf16_gemm(case, list(x)) / 16))  # noqa: E731
    for one, other in zip(*on_both(jax.grad(loss, (0, 1, 2)), *arrays), strict=True):
        assert oracle.calc_diff(one, other) < 1e-4
    product = lambda *x: jax.jvp(jax.grad(loss), x, x)[1]  # noqa: E731
    assert oracle.calc_diff(*on_both(product, *arrays)) < 1e-3


@pytest.mark.parametrize("shape", [(192, 576, 512), (5, 128, 200), (100, 130, 300)], ids=str)
def test_fp8_linear_is_that_of_the_reference(shape):
    m, n, k = shape
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((m, k), (n, k), (m, n))))
    x, dy = x.astype(BF16), dy.astype(BF16)

    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(jdg.fp8_linear, x, w)
        return y, *vjp(dy)

    exact = program(lambda x, w, dy: (dot32(x, w), dot32(dy, w.T), dot32(dy.T, x.T)))(x, w, dy)
    for one, other, want in zip(*on_both(run, x, w, dy), exact, strict=True):
        assert oracle.calc_diff(one, other) < 1e-5
        assert oracle.calc_diff(one, want) < FP8_LIMIT


def test_fp8_linear_vmapped_and_remat():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((3, 40, 256), (3, 136, 256))))
    policy = jax.checkpoint_policies.save_only_these_names("jdg_linear_out", "jdg_act_fp8")
    layer = jax.checkpoint(lambda x, w: jdg.fp8_linear(x, w, out_dtype=F32), policy=policy)
    loss = lambda x, w: jnp.sum(jnp.sin(jax.vmap(layer)(x, w) / 16))  # noqa: E731
    for one, other in zip(*on_both(jax.grad(loss, (0, 1)), x, w), strict=True):
        assert oracle.calc_diff(one, other) < 1e-4
