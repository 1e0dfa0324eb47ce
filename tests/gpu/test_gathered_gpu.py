"""Grouped GEMMs whose rows an index names, on an H200: bit for bit what the rows, taken first, give with the
same configuration, which other tests compare with an oracle.

Rows of the operand that no index of a group names are NaN, and so is what the index names outside all groups.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.grouped.problem import INNER, ROWS, GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates
from jax_deepgemm.ops.rows.reference import take
from tests.shared.gpu_programs import difference, program
from tests.shared.grouped_products import same

BF16, F32, BLOCK, PER_ROW = jnp.bfloat16, jnp.float32, (128, 128), (1, 128)
T, GROUPS = 150, 6
SIZES = {
    "drawn": [150, 0, 33, 257, 1, 90],
    "one": [0, 0, 0, 531, 0, 0],
    "none": [0] * GROUPS,
    "wrong": [-7, 400, -1, 333, 5000, 3],
}
M = 620
KINDS = {
    "bf16 nt": (jdg.m_grouped_bf16_gemm_nt_gathered, jdg.m_grouped_bf16_gemm_nt_contiguous),
    "bf16 nn": (jdg.m_grouped_bf16_gemm_nn_gathered, jdg.m_grouped_bf16_gemm_nn_contiguous),
    "fp8": (jdg.m_grouped_fp8_gemm_nt_gathered, jdg.m_grouped_fp8_gemm_nt_contiguous),
    "fp8 rows": (jdg.m_grouped_fp8_gemm_nt_gathered, jdg.m_grouped_fp8_gemm_nt_contiguous),
}
SHAPES = [(264, 448), (136, 704), (8, 16), (520, 1536)]


def types(kind: str) -> dict[str, Any]:
    if kind.startswith("fp8"):
        return {"b_scales": "vector" if kind == "fp8 rows" else "block"}
    return {"a": "bf16", "b": "bf16", "b_scales": "none", "layout": kind.split()[1]}


def problem(kind: str, n: int, k: int, out: str = "bfloat16") -> GroupedProblem:
    sizes: dict[str, Any] = {"groups": GROUPS, "m": M, "n": n, "k": k, "expected": M // GROUPS}
    return GroupedProblem(ROWS, **sizes, segments=GROUPS, out=out, by_index="a", **types(kind))


def k_problem(side: str, n: int, add: bool) -> GroupedProblem:
    sizes: dict[str, Any] = {"groups": GROUPS, "m": 136, "n": n, "k": M, "expected": M // GROUPS}
    form = {"out": "float32", "add_c": add, "by_index": side}
    return GroupedProblem(INNER, **sizes, segments=GROUPS, **form, **types("bf16 tn"))


def configs(p: GroupedProblem) -> list[GemmConfig]:
    return list(grouped_candidates(p, H200))


def name(x: Any) -> str:
    """Of a parameter, without the slash of a configuration's own."""
    turns = "pp" if getattr(x, "ping_pong", False) else ""
    return f"{x.block_m}x{x.block_n}{turns}" if isinstance(x, GemmConfig) else str(x)


def kernels() -> Iterator[GroupedProblem]:
    for kind in KINDS:
        yield from (problem(kind, n, k) for n, k in SHAPES)
    yield from (k_problem(side, n, add) for side in "ab" for n in (264, 72) for add in (False, True))


def index(seed: int = 0) -> np.ndarray:
    """Of M places: rows of the first half of T, some of them often, and some that are none."""
    drawn = np.random.default_rng(seed).integers(0, T // 2, M).astype(np.int32)
    drawn[::7] = -1
    drawn[[3, 50, 51]] = T, 2**31 - 1, -(2**31)
    return drawn


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def sources(width: int) -> jax.Array:
    """[T, width] of which the second half is NaN."""
    return normal(1, T, width).at[T // 2 :].set(jnp.nan)


def with_nan_outside(rows: np.ndarray, sizes: Any) -> np.ndarray:
    end = min(int(np.clip(np.asarray(sizes, np.int64), 0, None).sum()), M)
    return np.where(np.arange(M) < end, rows, T - 1).astype(np.int32)


def operands(kind: str, n: int, k: int) -> tuple[Any, Any]:
    a, w = sources(k), normal(2, GROUPS, n, k)
    if kind.startswith("fp8"):
        return jdg.quantize(a), jdg.quantize(w, PER_ROW if kind == "fp8 rows" else BLOCK)
    return a, w.mT if kind == "bf16 nn" else w


def taken(a: Any, rows: jax.Array) -> Any:
    if isinstance(a, jdg.QuantizedArray):
        return jdg.QuantizedArray(*take(a.values, a.scales, rows), a.block)
    return take(a, rows)[0]


@functools.cache
def both(kind: str, config: GemmConfig | None, out: str) -> Any:
    """One program of both ways."""
    gathered, contiguous = KINDS[kind]
    options: dict[str, Any] = {"config": config, "out_dtype": out}

    def run(a: Any, b: Any, rows: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            gathered(a, b, rows, sizes, **options),
            contiguous(taken(a, rows), b, sizes, **options),
        )

    return program(run)


def check(kind: str, n: int, k: int, config: GemmConfig | None, out: str = "bfloat16") -> None:
    a, b = operands(kind, n, k)
    for what, sizes in SIZES.items():
        rows = with_nan_outside(index(), sizes)
        found, want = both(kind, config, out)(a, b, rows, np.asarray(sizes, np.int32))
        assert bool(jnp.isfinite(found).all()), what
        assert same(found, want), what


CASES = [(kind, n, k, c) for kind in KINDS for n, k in SHAPES[:1] for c in configs(problem(kind, n, k))]


@pytest.mark.parametrize(("kind", "n", "k", "config"), CASES, ids=name)
def test_every_configuration(kind, n, k, config):
    check(kind, n, k, config)


@pytest.mark.smoke
@pytest.mark.parametrize(("n", "k"), SHAPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_n_and_k(kind, n, k):
    """The smallest ones, those with padded rows, and several rounds of slots."""
    [first, *_] = configs(problem(kind, n, k, "float32"))
    check(kind, n, k, first, "float32")


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_and_ends_of_groups(kind):
    n, k = SHAPES[0]
    gathered, contiguous = KINDS[kind]
    [config, *_] = configs(problem(kind, n, k))
    a, b = operands(kind, n, k)
    of = np.repeat(np.array([2, -1, 0, 5, -1], np.int32), [130, 30, 70, 300, 90])
    rows = np.where(of >= 0, index(3), T - 1).astype(np.int32)
    ends = np.array([90, 192, 300, 300, 500, 600], np.int32)

    @program
    def run(a: Any, b: Any, rows: jax.Array, of: jax.Array, ends: jax.Array) -> Any:
        x, half = taken(a, rows), jnp.where(rows == T - 1, -1, rows)
        form = {"config": config}
        return [
            (
                gathered(a, b, rows, m_indices=of, **form),
                contiguous(x, b, m_indices=of, **form),
            ),
            (
                gathered(a, b, half, ends=ends, alignment=64, **form),
                contiguous(taken(a, half), b, ends=ends, alignment=64, **form),
            ),
        ]

    for found, want in run(a, b, rows, of, ends):
        assert bool(jnp.isfinite(found).all())
        assert same(found, want)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_give_the_same_bits(kind):
    gathered, _ = KINDS[kind]
    a, b = operands(kind, *SHAPES[3])
    run, sizes = program(gathered), np.asarray(SIZES["drawn"], np.int32)
    first = run(a, b, index(), sizes)
    for _ in range(20):
        assert same(run(a, b, index(), sizes), first)


K_CASES = [
    (side, n, add, c)
    for side in "ab"
    for n, add in ((264, True), (72, False))
    for c in configs(k_problem(side, n, add))
]


@pytest.mark.parametrize(("side", "n", "add", "config"), K_CASES, ids=name)
def test_k_grouped(side, n, add, config):
    check_k(side, n, add, config)


@pytest.mark.smoke
@pytest.mark.parametrize("side", ["a", "b"])
def test_k_grouped_with_the_models_choice(side):
    check_k(side, 264, True, configs(k_problem(side, 264, True))[0])


def check_k(side: str, n: int, add: bool, config: GemmConfig) -> None:
    m = 136
    named, other = (sources(m), normal(3, M, n)) if side == "a" else (sources(n), normal(3, M, m))
    c = jnp.ones((GROUPS, m, n), F32) if add else None
    options = {"config": config, "out_dtype": F32}

    @program
    def run(named: jax.Array, other: jax.Array, rows: jax.Array, sizes: jax.Array) -> Any:
        def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (x, other) if side == "a" else (other, x)

        which = {f"{side}_rows": rows}
        found = jdg.k_grouped_bf16_gemm_tn_gathered(*pair(named), sizes, c, **which, **options)
        x = take(named, rows)[0]
        return found, jdg.k_grouped_bf16_gemm_tn_contiguous(*pair(x), sizes, c, **options)

    for what, sizes in SIZES.items():
        end = min(int(np.clip(np.asarray(sizes, np.int64), 0, None).sum()), M)
        poison = other.at[end:].set(jnp.nan)
        found, want = run(named, poison, with_nan_outside(index(), sizes), np.asarray(sizes, np.int32))
        assert bool(jnp.isfinite(found).all()), what
        assert same(found, want), what


@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_gradients(layout):
    """Of a, a sum in the order of a scatter; of b, the product of copies of its rows."""
    gathered, contiguous = KINDS[f"bf16 {layout}"]
    n, k = SHAPES[0]
    a, w, sizes = normal(1, T, k), normal(2, GROUPS, n, k), np.asarray(SIZES["drawn"], np.int32)
    b, rows = w if layout == "nt" else w.mT, jnp.asarray(index())

    def loss(d: jax.Array) -> jax.Array:
        return (d.astype(F32) ** 2).sum()

    found = jax.jit(jax.grad(lambda a, b: loss(gathered(a, b, rows, sizes)), (0, 1)))(a, b)
    want = jax.jit(jax.grad(lambda a, b: loss(contiguous(take(a, rows)[0], b, sizes)), (0, 1)))(a, b)
    for got, expected in zip(found, want, strict=True):
        assert float(difference(got, expected.astype(F32))) < 1e-4


@pytest.mark.parametrize("shared", ["nothing", "a", "b", "rows"])
@pytest.mark.parametrize("kind", ["bf16 nt", "fp8"])
def test_vmap_is_a_loop(kind, shared):
    gathered, _ = KINDS[kind]
    a, b = operands(kind, *SHAPES[0])
    every = [a, b, jnp.asarray(index()), jnp.asarray(SIZES["drawn"], jnp.int32)]
    place = {"nothing": None, "a": 0, "b": 1, "rows": 2}[shared]
    others = [x if i == place else jax.tree.map(lambda z: jnp.flip(z, 0), x) for i, x in enumerate(every)]
    axes = tuple(None if i == place else 0 for i in range(4))
    stacked = [
        x if axis is None else jax.tree.map(lambda *z: jnp.stack(z), x, y)
        for x, y, axis in zip(every, others, axes, strict=True)
    ]
    got = program(jax.vmap(gathered, axes))(*stacked)
    for z, one in enumerate((every, others)):
        want = gathered(*one)
        finite = jnp.isfinite(want)
        assert bool((finite == jnp.isfinite(got[z])).all())
        assert float(difference(jnp.where(finite, got[z], 0), jnp.where(finite, want, 0))) < 1e-6
