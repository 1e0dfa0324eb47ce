"""Grouped GEMMs on an H200: the shape tables, edge cases, poison, repeatability, transformations.

Every element of every result is compared with the oracle, group by group in float32 on the GPU: see
grouped_programs.py. The programs of the chosen tests are compiled ahead, in parallel.

Run: pytest -m gpu tests/gpu/test_grouped_gpu.py        (under 150 s, kernels compiled anew)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import fit_stages
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates
from jax_deepgemm.ops.grouped.sm90.source import grouped_source
from jax_deepgemm.tools.explain import problems
from tests.shared import grouped_cases as cases
from tests.shared import grouped_products as oracle
from tests.shared.gpu_programs import C_ELSEWHERE, difference, program, with_c_elsewhere
from tests.shared.grouped_cases import FP8, NN, NT, Contiguous, KGrouped, Masked
from tests.shared.grouped_products import same
from tests.shared.grouped_programs import (
    BF16_LIMIT,
    BLOCK,
    FP8_LIMIT,
    M_FUNCTIONS,
    POOL,
    PROGRAMS,
    ROWS,
    check,
    compiled,
    cut,
    poisoned,
    pool,
    quantised,
    weights,
    where,
)

BF16, F32, E4 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(request: pytest.FixtureRequest) -> None:
    """Compiles what the chosen tests need. A case that fails does so again in its own test."""
    here = (item for item in request.session.items if item.path == request.path)
    params = [item.callspec.params for item in here if hasattr(item, "callspec")]
    chosen = {each["case"] for each in params if "case" in each}

    def attempt(case: Any) -> None:
        with contextlib.suppress(Exception):
            compiled(case)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(attempt, chosen))


TABLES = [
    *(*cases.contiguous_table(), *cases.aligned_table(), *cases.masked_table(), *cases.k_table()),
    *(*cases.contiguous_edges(), *cases.masked_edges(), *cases.k_edges()),
]


# The tables -------------------------------------------------------------------------------------------------


def drawn(case: Any, expected: int) -> dict[str, np.ndarray]:
    sizes = cases.draw(case.groups, expected)
    return {"drawn": sizes, "one empty": cases.without(sizes, case.groups // 3)}


def expected_rows(case: Contiguous) -> int:
    return dict(cases.CONTIGUOUS_TABLE)[case.groups]


@pytest.mark.parametrize("case", list(cases.contiguous_table()), ids=str)
def test_table_contiguous(case):
    check(case, drawn(case, expected_rows(case)))


@pytest.mark.parametrize("case", list(cases.aligned_table()), ids=str)
def test_table_contiguous_aligned(case):
    """The layouts with gaps: an index per row, ends of groups."""
    check(case, drawn(case, expected_rows(case)))


MASKED_TABLE = [
    (case, expected)
    for case, expected in zip(
        cases.masked_table(), np.repeat([e for _, e, _ in cases.MASKED_TABLE], len(cases.NK)), strict=True
    )
]


@pytest.mark.parametrize(("case", "expected"), MASKED_TABLE, ids=str)
def test_table_masked(case, expected):
    check(case, drawn(case, expected))


@pytest.mark.parametrize("case", list(cases.k_table()), ids=str)
def test_table_k_grouped(case):
    check(case, drawn(case, 32768 // case.groups))


# Edge cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(cases.contiguous_edges()), ids=str)
def test_edges_contiguous(case):
    check(case, cases.patterns(case.groups, case.rows))


@pytest.mark.parametrize("case", list(cases.masked_edges()), ids=str)
def test_edges_masked(case):
    check(case, cases.masks(case.groups, case.rows))


@pytest.mark.parametrize("case", list(cases.k_edges()), ids=str)
def test_edges_k_grouped(case):
    check(case, cases.patterns(case.groups, case.k))


OFFSETS = [
    Contiguous(6, 700, 136, 256, ((FP8, "sizes", "float32"),), 700, local=2),
    Contiguous(6, 700, 136, 256, ((NT, "sizes", "float32"), (NN, "index", "bfloat16")), 700, local=2),
]


@pytest.mark.smoke
@pytest.mark.parametrize("case", OFFSETS, ids=str)
def test_group_offset(case):
    """B holds two of six groups; the rows of the others are zero in D, and may be NaN in A."""
    for offset in (0, 3, 4):
        check(case, cases.patterns(case.groups, case.rows), offset)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "case",
    [Contiguous(6, 700, 136, 256, ((FP8, "ends", "bfloat16"), (NT, "ends", "float32")), 700, alignment=64)],
    ids=str,
)
def test_ends_with_gaps(case):
    check(case, cases.patterns(case.groups, case.rows // 2) | {"whole": cases.draw(6, 60)})


@pytest.mark.parametrize("fp8", [True, False], ids=("fp8", "bf16"))
def test_index_in_any_order(fp8):
    """Groups in no order, gaps before, between and behind; and an index of nothing but -1."""
    rows, n, k = 600, 136, 192
    order = [(3, 100), (-1, 7), (0, 129), (5, 1), (-1, 63), (1, 200), (4, 50)]
    index = np.full(rows, -1, np.int32)
    index[20 : 20 + sum(count for _, count in order)] = np.concatenate(
        [np.full(count, group) for group, count in order]
    )
    x, w = cut(pool(), 0, rows, k), cut(pool(), 1, 6, n, k)
    function = M_FUNCTIONS[FP8 if fp8 else NT]

    @program
    def run(x: jax.Array, w: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        good = index[:, None] >= 0
        a, b = quantised(x, ROWS, good) if fp8 else poisoned(x, good), weights(w, FP8 if fp8 else NT)
        d = function(a, b, m_indices=index, out_dtype=F32)
        read = (oracle.dequantised(a), oracle.dequantised(b)) if fp8 else (a, b)
        every = jnp.stack([oracle.dot32(jnp.where(good, read[0], 0), each) for each in read[1]])
        return d, jnp.where(good, every[jnp.maximum(index, 0), jnp.arange(rows)], 0)

    d, want = run(x, w, index)
    assert float(difference(d, want)) < FP8_LIMIT["float32"]
    assert not np.asarray(d)[index < 0].any()
    assert not np.asarray(run(x, w, np.full(rows, -1, np.int32))[0]).any()


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(0, 8, 128), (8, 0, 128), (8, 16, 0), (0, 0, 0)], ids=str)
def test_empty_dimensions(shape):
    """No rows or columns, and sums over nothing: zeros, or C."""
    m, n, k = shape
    x, w, sizes = jnp.ones((m, k), BF16), jnp.ones((2, n, k), BF16), jnp.array([m, 0], jnp.int32)
    deep = jnp.ones((2, m, k), BF16)
    fp8 = jdg.quantize(x), jdg.quantize(w, BLOCK)
    c = jnp.full((2, m, n), 3.0)
    of_k = jnp.array([k, 0], jnp.int32)
    product = np.broadcast_to(np.array([k, 0], np.float32)[:, None, None], (2, m, n))
    k_fp8 = jdg.quantize(x), jdg.quantize(jnp.ones((n, k), BF16))
    for got, want in (
        (jdg.m_grouped_fp8_gemm_nt_contiguous(*fp8, sizes), np.full((m, n), k)),
        (jdg.m_grouped_bf16_gemm_nt_contiguous(x, w, sizes), np.full((m, n), k)),
        (jdg.m_grouped_bf16_gemm_nn_contiguous(x, w.mT, sizes), np.full((m, n), k)),
        (jdg.m_grouped_fp8_gemm_nt_masked(jdg.quantize(deep), fp8[1], sizes, zero_rows=True), None),
        (jdg.m_grouped_bf16_gemm_nt_masked(deep, w, sizes, zero_rows=True), None),
        (jdg.k_grouped_fp8_gemm_nt_contiguous(*k_fp8, of_k, c), product + 3),
        (jdg.k_grouped_bf16_gemm_tn_contiguous(x.T, jnp.ones((k, n), BF16), of_k, c), product + 3),
        (jdg.k_grouped_bf16_gemm_tn_contiguous(x.T, jnp.ones((k, n), BF16), of_k), product),
    ):
        masked_product = np.stack([np.full((m, n), k), np.zeros((m, n))])
        np.testing.assert_array_equal(np.asarray(got, np.float32), masked_product if want is None else want)


BIG = [
    Contiguous(49, 40, 6144, 7168, ((FP8, "sizes", "bfloat16"),), 8),  # B: 2,157,969,408 elements
    Contiguous(3, 300_000, 7168, 128, ((FP8, "sizes", "bfloat16"),), 128_000),  # D: 2,150,400,000
    Contiguous(3, 300_000, 128, 7168, ((NT, "sizes", "bfloat16"),), 128_000),  # A
    Masked(49, 40, 6144, 7168, ((NT, "zero", "bfloat16"),), 40),  # B
    KGrouped(49, 6144, 7168, 128, (("bf16_tn", "add", "bfloat16"),), 40),  # C and D
]


@pytest.mark.alone  # with tens of gigabytes
@pytest.mark.parametrize("case", BIG, ids=("b", "d", "bf16-a", "masked-b", "k-cd"))
def test_more_than_two_to_the_31_elements(case):
    sizes = np.zeros(case.groups, np.int32)
    sizes[[0, case.groups // 2, -1]] = case.most - 3, case.most // 3, case.most
    check(case, {"three": sizes})


# Calls of every op, small -----------------------------------------------------------------------------------

SIZES = np.array([70, 0, 200, 31], np.int32)
M, N, K, G = 320, 264, 448, len(SIZES)


def small_operands(numbers: jax.Array) -> dict[str, tuple[Any, ...]]:
    """Of one call of each op, sizes last."""
    x, w = cut(numbers, 0, M, K), cut(numbers, 1, G, N, K)
    deep = cut(numbers, 2, G, 100, K)
    dy, c = cut(numbers, 3, M, N), cut(numbers, 4, G, K, N).astype(F32)
    q, rows = jdg.quantize(w, BLOCK), jdg.quantize(w, ROWS)
    left, right = jdg.quantize(x.T), jdg.quantize(dy.T)
    sizes, mask = jnp.asarray(SIZES), jnp.asarray(SIZES // 2)
    return {
        "m fp8": (jdg.quantize(x), q, sizes),
        "m fp8 rows": (jdg.quantize(x), rows, sizes),
        "m bf16 nt": (x, w, sizes),
        "m bf16 nn": (x, w.mT, sizes),
        "masked fp8": (jdg.quantize(deep), q, mask),
        "masked bf16": (deep, w, mask),
        "k fp8": (left, right, sizes),
        "k fp8 + c": (left, right, c, sizes),
        "k bf16": (x, dy, sizes),
        "k bf16 + c": (x, dy, c, sizes),
    }


def with_c(k_grouped: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda a, b, c, sizes, **options: k_grouped(a, b, sizes, c, **options)


SMALL = {
    "m fp8": jdg.m_grouped_fp8_gemm_nt_contiguous,
    "m fp8 rows": jdg.m_grouped_fp8_gemm_nt_contiguous,
    "m bf16 nt": jdg.m_grouped_bf16_gemm_nt_contiguous,
    "m bf16 nn": jdg.m_grouped_bf16_gemm_nn_contiguous,
    "masked fp8": functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, zero_rows=True),
    "masked bf16": functools.partial(jdg.m_grouped_bf16_gemm_nt_masked, zero_rows=True),
    "k fp8": jdg.k_grouped_fp8_gemm_nt_contiguous,
    "k fp8 + c": with_c(jdg.k_grouped_fp8_gemm_nt_contiguous),
    "k bf16": jdg.k_grouped_bf16_gemm_tn_contiguous,
    "k bf16 + c": with_c(jdg.k_grouped_bf16_gemm_tn_contiguous),
}


@functools.cache
def small_calls() -> dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]:
    """Name -> (function, operands)."""
    operands = small_operands(pool())
    return {name: (function, operands[name]) for name, function in SMALL.items()}


@pytest.mark.parametrize("name", SMALL)
def test_twenty_runs_give_the_same_bits_also_eagerly_and_into_nan(name):
    """The result takes the place of a donated buffer of NaN: every element of it is written."""
    function, operands = small_calls()[name]
    shape = jax.eval_shape(function, *operands)
    first = function(*operands)
    assert bool(jnp.isfinite(first).all())
    step = program(lambda _, *x: function(*x), donate_argnums=0, keep_unused=True)
    for _ in range(20):
        buffer = jnp.full(shape.shape, jnp.nan, shape.dtype)
        pointer = buffer.unsafe_buffer_pointer()
        again = step(buffer, *operands)
        assert again.unsafe_buffer_pointer() == pointer
        assert same(again, first)


@pytest.mark.parametrize("shared", ["nothing", "b", "sizes"])
@pytest.mark.parametrize("name", ["m fp8", "m bf16 nn", "masked fp8", "masked bf16", "k fp8", "k bf16 + c"])
def test_vmap_is_a_loop(name, shared):
    function, operands = small_calls()[name]
    last = len(operands) - 1
    one = {"nothing": (), "b": (1,), "sizes": (last,)}[shared]

    def other(i: int, x: Any) -> Any:
        """Other numbers of the same kind."""
        return jnp.flip(x, -1) if i == last else jax.tree.map(lambda leaf: jnp.flip(leaf, -2), x)

    pairs = [(x, x if i in one else other(i, x)) for i, x in enumerate(operands)]
    axes = tuple(None if i in one else 0 for i in range(len(operands)))
    stacked = [
        pair[0] if axis is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
        for axis, pair in zip(axes, pairs, strict=True)
    ]
    got = program(jax.vmap(function, axes))(*stacked)
    for z in range(2):
        want = function(*(pair[z] for pair in pairs))
        assert float(difference(got[z], want)) < 1e-6


@pytest.mark.parametrize("where", C_ELSEWHERE)
@pytest.mark.parametrize("name", ["k fp8 + c", "k bf16 + c"])
def test_c_that_lives_on_is_added_and_not_changed(name, where):
    """D of a group without rows is C, bit by bit."""
    function, (a, b, c, sizes) = small_calls()[name]
    d = with_c_elsewhere(where, lambda c, a, b, s: function(a, b, c, s), c, a, b, sizes)
    fp8 = "fp8" in name
    read = [oracle.dequantised(x).T if fp8 else x for x in (a, b)]
    at = oracle.place(SIZES, M)
    product = program(oracle.k_grouped, static_argnums=4)(*read, at.starts, at.counts, int(SIZES.max()))
    assert float(difference(d - c, product)) < (FP8_LIMIT if fp8 else BF16_LIMIT)["float32"]
    assert [same(one, other) for one, other in zip(d, c, strict=True)] == [size == 0 for size in SIZES]


def test_hints_and_fewer_sms():
    """`expected_m` and `num_sms` choose who computes what, never what."""
    for name, options in (
        ("m fp8", [{"expected_m": 1}, {"expected_m": 5000}, {"num_sms": 1}, {"num_sms": 77}]),
        ("masked bf16", [{"expected_m": 1}, {"expected_m": 100}, {"num_sms": 3}]),
        ("k bf16", [{"num_sms": 1}, {"num_sms": 131}]),
    ):
        function, operands = small_calls()[name]

        @program
        def all_of(want: jax.Array, *x: Any, function: Any = function, options: Any = options) -> list[Any]:
            return [difference(function(*x, **option), want) for option in options]

        assert max(map(float, all_of(function(*operands), *operands))) < 1e-5


IN_EVERY_WAY = ("m fp8", "m fp8 rows", "m bf16 nn", "masked bf16", "k fp8", "k bf16 + c")


@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_every_configuration_gives_the_same(name):
    """Also those that the cost model would never choose."""
    function, operands = small_calls()[name]
    [(problem, chip)] = problems(function, *operands)
    configs = list(grouped_candidates(problem, chip))
    assert 1 < len(configs) == len(set(map(str, configs)))

    def all_of(want: jax.Array, *operands: Any) -> dict[str, jax.Array]:
        return {str(c): difference(function(*operands, config=c), want) for c in configs}

    found = program(all_of)(function(*operands), *operands)
    assert all(float(value) < 1e-5 for value in found.values()), found


@pytest.mark.parametrize("n", [1040, 1044, 1043])
@pytest.mark.parametrize("out", [BF16, F32])
def test_last_tiles_in_halves(out, n):
    """Bit by bit what whole tiles give, which are all that one SM has."""
    rows, k, sizes = 1000, 320, jnp.asarray([300, 0, 129, 450, 1], jnp.int32)
    deep = jdg.quantize(cut(pool(), 0, len(sizes), 450, k))
    a, w = jdg.quantize(cut(pool(), 1, rows, k)), jdg.quantize(cut(pool(), 2, len(sizes), n, k), BLOCK)
    counts = (1, 2, 3, 7, 20, 48, 99, 132)
    problem = GemmProblem(rows, n, k, out=jnp.dtype(out).name, table_bytes=2048)
    halved, whole = (fit_stages(problem, GemmConfig(*tile, 0), H200) for tile in ((128, 256), (128, 128)))
    masked = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, zero_rows=True)
    for function, operands in ((jdg.m_grouped_fp8_gemm_nt_contiguous, (a, w)), (masked, (deep, w))):
        run = functools.partial(function, out_dtype=out, config=halved)

        @program
        def all_of(*x: Any, run: Any = run, function: Any = function) -> tuple[list[jax.Array], jax.Array]:
            return [run(*x, num_sms=count) for count in counts], function(*x, out_dtype=out, config=whole)

        (want, *every), other = all_of(*operands, sizes)
        assert float(difference(want, other)) < 1e-5
        for count, got in zip(counts[1:], every, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=f"{count} SMs")


def kernels() -> Iterator[GroupedProblem | KernelSource]:
    """What the tables and the calls of every configuration need (kernels.py)."""
    numbers = jax.ShapeDtypeStruct((POOL,), BF16)
    for case in TABLES:
        at = where(case, np.zeros(case.groups, np.int32))
        calls = problems(functools.partial(PROGRAMS[type(case)], case), numbers, at)
        yield from (problem for problem, _ in calls)
    operands = jax.eval_shape(small_operands, numbers)
    for name in IN_EVERY_WAY:
        [(problem, chip)] = problems(SMALL[name], *operands[name])
        yield from (grouped_source(problem, config) for config in grouped_candidates(problem, chip))


# Transformations --------------------------------------------------------------------------------------------


def on_both(function: Callable[..., Any], *arrays: Any) -> list[tuple[Any, Any]]:
    """Results on the GPU and on the CPU, leaf by leaf."""
    there = jax.jit(function)(*jax.device_put(arrays, jax.devices("cpu")[0]))
    here = program(function)(*arrays)
    return list(zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["m bf16 nt", "m bf16 nn", "masked bf16", "k bf16 + c"])
def test_bf16_gradients_are_those_of_the_reference(name):
    function, (*arrays, sizes) = small_calls()[name]
    constant = np.asarray(sizes)  # on no device

    def loss(*live: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(*live, constant).astype(F32) / 16))

    pairs = on_both(jax.grad(loss, tuple(range(len(arrays)))), *arrays)
    assert len(pairs) == len(arrays)
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert float(difference(np.asarray(one), np.asarray(other))) < 1e-4


# Short sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [BLOCK, ROWS], ids=str)
@pytest.mark.parametrize("k", [128, 256])
def test_short_sums_and_many_tiles(k, scales):
    """Thousands of tiles of one or two blocks of k, most groups empty: again and again the same bits."""
    groups, rows, n = 256, 40_000, 1024
    a = jdg.quantize(cut(pool(), 0, rows, k))
    b = jdg.quantize(cut(pool(), 1, groups, n, k), scales)
    run = jax.jit(functools.partial(jdg.m_grouped_fp8_gemm_nt_contiguous, out_dtype=F32))
    rng = np.random.default_rng(k)
    for full in (3, 40, 256):
        sizes = np.zeros(groups, np.int32)
        sizes[rng.choice(groups, full, replace=False)] = rng.integers(1, 2 * rows // full, full)
        at = oracle.place(sizes, rows)
        most = int(at.counts.max())
        want = program(oracle.m_grouped, static_argnums=4)(
            oracle.dequantised(a), oracle.dequantised(b), at.starts, at.counts, most
        )
        first = run(a, b, sizes)
        assert float(difference(first, want)) < FP8_LIMIT["float32"]
        assert all(bool((run(a, b, sizes) == first).all()) for _ in range(20))
