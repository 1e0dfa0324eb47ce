"""Sizes of groups as a router draws them, in everything that sums over groups of k, and in the layers.

No size is a multiple of 128: multinomial ones, one group with half or all of the rows, most groups empty, 1
to 2048 groups, dropped copies. What lies outside all groups is NaN.

Run: pytest -m gpu tests/gpu/test_drawn_gpu.py        (about 40 s)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm as jdg
from jax_deepgemm import moe
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.tools.explain import problems
from tests.shared import grouped_products as oracle
from tests.shared import magnitudes, moe_oracle
from tests.shared.gpu_programs import difference, program
from tests.shared.grouped_cases import TAIL, KGrouped
from tests.shared.grouped_products import same
from tests.shared.grouped_programs import BF16_LIMIT, POOL, check, cut, k_grouped, poisoned, pool, where
from tests.shared.moe_oracle import normal

BF16, F32 = jnp.bfloat16, jnp.float32
LINEAR_LIMIT = {"fp8": 1e-3, "bf16": 2e-5}
MLP_LIMIT = {"fp8": 3e-3, "bf16": 1e-4}


def loads(groups: int, rows: int) -> dict[str, np.ndarray]:
    """Sizes of groups over up to `rows` rows.

    >>> [int(sizes.sum()) for sizes in loads(4, 1000).values()]
    [1000, 871, 1000, 1000, 1000, 0]
    """
    rng = np.random.default_rng(groups)
    even = np.full(groups, 1 / groups)
    half = even / 2
    half[groups // 2] += 0.5
    few = np.where(np.arange(groups) % max(groups // 3, 1) == 0, 1.0, 0.0)
    found = {
        "drawn": rng.multinomial(rows, even),
        "drawn, with a tail": rng.multinomial(rows - 129, even),
        "half in one": rng.multinomial(rows, half),
        "all in one": np.where(np.arange(groups) == groups - 1, rows, 0),
        "few": rng.multinomial(rows, few / few.sum()),
        "none": np.zeros(groups, np.int32),
    }
    return {name: sizes.astype(np.int32) for name, sizes in found.items()}


# Sums over groups of k -------------------------------------------------------------------------------------

CALLS = (
    ("fp8_nt", "add", "float32"),
    ("fp8_nt", "", "bfloat16"),
    ("fp8_tn", "", "float32"),
    ("bf16_tn", "add", "float32"),
    ("bf16_tn", "", "bfloat16"),
)
CASES = [
    KGrouped(groups, m, n, k + TAIL, CALLS, k)
    for groups, m, n, k in (
        (1, 264, 128, 3000),
        (8, 512, 1024, 4096),
        (32, 512, 384, 32 * 512),
        (128, 384, 256, 128 * 96),
        (2048, 128, 136, 4096),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k_grouped(case):
    check(case, loads(case.groups, case.most))


def kernels() -> Iterator[GroupedProblem]:
    """What the cases above need (kernels.py)."""
    numbers = jax.ShapeDtypeStruct((POOL,), BF16)
    for case in CASES:
        at = where(case, np.zeros(case.groups, np.int32))
        yield from (problem for problem, _ in problems(functools.partial(k_grouped, case), numbers, at))


CONTRACTION = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


@pytest.mark.parametrize("groups", [1, 32, 300])
def test_contraction_of_ragged_dot(groups):
    rows, m, n = 5000, 256, 392

    @program
    def run(numbers: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
        good = oracle.inside(starts, counts, rows)[:, None]
        a, b = (poisoned(cut(numbers, i, rows, size), good) for i, size in enumerate((m, n)))
        d = jdg.ragged_dot_general(a, b, counts, CONTRACTION, preferred_element_type=F32)
        return difference(d, oracle.k_grouped(a, b, starts, counts, rows))

    for name, sizes in loads(groups, rows).items():
        at = oracle.place(sizes, rows)
        assert float(run(pool(), at.starts, at.counts)) < BF16_LIMIT["float32"], name


# The layers ------------------------------------------------------------------------------------------------

HIDDEN, INNER, TOKENS, TOP_K = 512, 384, 700, 3


def pulled(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(which rows are whose, arguments, gradient of the result) -> value and gradients."""

    def run(routing: jax.Array, arguments: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(lambda *arguments: function(routing, *arguments), *arguments)
        return y, *vjp(dy.astype(y.dtype))

    return program(run)


def close(name: str, got: Any, want: Any, limit: float) -> None:
    found = [float(difference(one, other)) for one, other in zip(got, want, strict=True)]
    assert all(value < limit for value in found), (name, found)


@functools.cache
def weights(experts: int) -> tuple[jax.Array, jax.Array]:
    w13 = normal(2, experts, 2 * INNER, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    return w13, normal(3, experts, HIDDEN, INNER, dtype=F32, scale=INNER**-0.5)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("groups", [1, 8, 200])
def test_grouped_linear(groups, recipe):
    rows, n = 1500, 264
    w = normal(2, groups, n, HIDDEN, dtype=F32, scale=HIDDEN**-0.5)
    layer = pulled(lambda sizes, x, w: jdg.grouped_linear(x, w, sizes, recipe=recipe, out_dtype=F32))

    @program
    def plain(starts: jax.Array, counts: jax.Array, x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, dx = (oracle.m_grouped(left, right, starts, counts, rows) for left, right in ((x, w), (dy, w.mT)))
        return y, dx, oracle.k_grouped(dy, x, starts, counts, rows)

    for name, sizes in loads(groups, rows).items():
        at = oracle.place(sizes, rows)
        good = (at.index >= 0)[:, None]
        x, dy = poisoned(normal(0, rows, HIDDEN), good), poisoned(normal(1, rows, n), good)
        clean = (jnp.where(good, one, 0) for one in (x, dy))
        want = plain(at.starts, at.counts, next(clean), w, next(clean))
        close(name, layer(sizes, (x, w), dy), want, LINEAR_LIMIT[recipe])


def routing(experts: int, sizes: np.ndarray) -> np.ndarray:
    """ids [TOKENS, TOP_K] with these loads in any order; copies that are left over go nowhere."""
    ids = np.repeat(np.arange(experts), sizes)
    ids = np.concatenate([ids, np.full(TOKENS * TOP_K - len(ids), -1)])
    return np.random.default_rng(0).permutation(ids).reshape(TOKENS, TOP_K).astype(np.int32)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("experts", [1, 8, 100])
def test_moe_mlp(experts, recipe):
    x, dy = normal(0, TOKENS, HIDDEN), normal(4, TOKENS, HIDDEN)
    arguments = (x, jax.nn.softmax(normal(1, TOKENS, TOP_K, dtype=F32)), *weights(experts))
    layer = pulled(lambda ids, x, p, w13, w2: moe.moe_mlp(x, ids, p, w13, w2, recipe=recipe))
    plain = pulled(lambda ids, x, p, w13, w2: moe_oracle.moe_plain(x, ids, p, w13, w2))
    for name, sizes in loads(experts, TOKENS * TOP_K).items():
        ids = routing(experts, sizes)
        got = layer(ids, arguments, dy)
        close(name, got, plain(ids, arguments, dy), MLP_LIMIT[recipe])
        empty = sizes == 0
        assert not any(np.asarray(dw)[empty].any() for dw in got[-2:])


@pytest.mark.smoke
@pytest.mark.parametrize("name", magnitudes.NEIGHBOURING)
def test_an_expert_beside_one_whose_tokens_are_a_million_times_larger(name):
    magnitudes.check_neighbours(name)


def test_twenty_runs_give_the_same_bits():
    """With the memory between runs full of NaN."""
    experts = 8
    arguments = (
        normal(0, TOKENS, HIDDEN),
        jax.nn.softmax(normal(1, TOKENS, TOP_K, dtype=F32)),
        *weights(experts),
    )
    layer = pulled(lambda ids, x, p, w13, w2: moe.moe_mlp(x, ids, p, w13, w2))
    ids, dy = (
        routing(experts, loads(experts, TOKENS * TOP_K)["drawn, with a tail"]),
        normal(4, TOKENS, HIDDEN),
    )
    first = layer(ids, arguments, dy)
    assert all(bool(jnp.isfinite(one).all()) for one in first)
    for _ in range(20):
        jax.block_until_ready([jnp.full((1 << 22,), jnp.nan) for _ in range(4)])
        again = layer(ids, arguments, dy)
        assert all(same(one, other) for one, other in zip(again, first, strict=True))
