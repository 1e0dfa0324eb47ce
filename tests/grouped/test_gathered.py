"""Grouped GEMMs whose rows an index names: numbers, derivatives, vmap, sharding, errors, launches."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.grouped.problem import ROWS, GroupedProblem
from jax_deepgemm.ops.grouped.sm90.cost import grouped_candidates
from jax_deepgemm.ops.rows.reference import take
from tests.gemm import test_aot
from tests.shared import grouped_oracle as oracle
from tests.shared import op_checks
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
T, M, N, K, G = 16, 32, 16, 24, 4
SIZES = jnp.array([9, 0, 14, 5], jnp.int32)


def index(seed: int, places: int, rows: int = T) -> jax.Array:
    """Rows, some often, -1, and a number behind the last row."""
    drawn = np.random.default_rng(seed).integers(-1, rows + 1, places)
    drawn[:2] = -1, rows
    return jnp.asarray(drawn, jnp.int32)


def m_args(form: str, seed: int) -> list[Any]:
    a, b = jnp.asarray(oracle.random(seed, T, K)), jnp.asarray(oracle.random(seed + 1, G, N, K))
    return [a, b if form == "nt" else b.mT, index(seed, M), SIZES]


def run_m(a: Any, b: Any, rows: Any, s: Any, *, form: str, **options: Any) -> jax.Array:
    function = getattr(jdg, f"m_grouped_bf16_gemm_{form}_gathered")
    return function(a, b, rows, s, out_dtype=F32, **options)


def taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Without `take`: a product with ones."""
    return jax.nn.one_hot(rows, x.shape[0], dtype=F32) @ x.astype(F32)


def groups(s: jax.Array, places: int) -> jax.Array:
    place = jnp.searchsorted(jnp.cumsum(s), jnp.arange(places), side="right")
    return jax.nn.one_hot(place, s.shape[0])


def plain_m(a: jax.Array, b: jax.Array, rows: jax.Array, s: jax.Array, *, form: str) -> jax.Array:
    subscripts = "mg,mk,gnk->mn" if form == "nt" else "mg,mk,gkn->mn"
    return jnp.einsum(subscripts, groups(s, M), taken(a, rows), b.astype(F32))


def m_case(form: str, **fields: Any) -> OpCase:
    return OpCase(
        f"m-bf16-{form}",
        functools.partial(run_m, form=form),
        functools.partial(m_args, form),
        plain=functools.partial(plain_m, form=form),
        wrt=(0, 1),
        grad_tolerance=2**-6,
        **fields,
    )


def fp8_args(seed: int) -> list[Any]:
    pairs = (*oracle.fp8(seed, T, 704), *oracle.fp8(seed + 1, G, 320, 704, block=(128, 128)))
    return [*map(jnp.asarray, pairs), index(seed, M), SIZES]


def run_fp8(a: Any, sa: Any, b: Any, sb: Any, rows: Any, s: Any, **options: Any) -> jax.Array:
    return jdg.m_grouped_fp8_gemm_nt_gathered((a, sa), (b, sb), rows, s, out_dtype=F32, **options)


def k_args(side: str, seed: int) -> list[Any]:
    named, other = jnp.asarray(oracle.random(seed, T, 16)), jnp.asarray(oracle.random(seed + 1, M, 24))
    c = jnp.asarray(oracle.random(seed + 2, G, *((16, 24) if side == "a" else (24, 16))), F32)
    return [*((named, other) if side == "a" else (other, named)), index(seed, M), SIZES, c]


def run_k(a: Any, b: Any, rows: Any, s: Any, c: Any, *, side: str, **options: Any) -> jax.Array:
    return jdg.k_grouped_bf16_gemm_tn_gathered(a, b, s, c, **{f"{side}_rows": rows}, **options)


def plain_k(a: jax.Array, b: jax.Array, rows: jax.Array, s: jax.Array, c: jax.Array, *, side: str) -> Any:
    pair = (taken(a, rows), b.astype(F32)) if side == "a" else (a.astype(F32), taken(b, rows))
    return c + jnp.einsum("kg,km,kn->gmn", groups(s, M), *pair)


def k_case(side: str, **fields: Any) -> OpCase:
    return OpCase(
        f"k-bf16-{side}",
        functools.partial(run_k, side=side),
        functools.partial(k_args, side),
        plain=functools.partial(plain_k, side=side),
        wrt=(0, 1, 4),
        grad_tolerance=2**-6,
        **fields,
    )


def run_k_fp8(a: Any, b: Any, rows: Any, s: Any, c: Any, *, side: str, **options: Any) -> jax.Array:
    return jdg.k_grouped_fp8_gemm_tn_gathered(a, b, s, c, **{f"{side}_rows": rows}, **options)


CASES = [
    m_case(
        "nt",
        shards=(
            Shard((P(), P(None, "y"), P("x"), P()), P("x", "y")),
            Shard((P(), P("y"), P("x"), P()), P("x"), ("all-reduce",)),
        ),
        nests=(((0, None, None, 0),), ((None, 0, None, None), (0, None, 0, None))),
    ),
    m_case("nn", second=True, nests=(((None, None, 0, None),),)),
    OpCase(
        "m-fp8",
        run_fp8,
        fp8_args,
        nests=(((0, 0, None, None, None, 0),), ((None, None, None, None, 0, None),)),
        shards=(
            Shard((P(), P(), P(None, "y"), P(), P("x"), P()), P("x", "y")),
            Shard((P(None, "y"), P(), P(None, None, "y"), P(), P(), P()), P(), ("all-reduce",)),
        ),
    ),
    k_case(
        "a",
        shards=(Shard((P(None, "y"), P("x"), P("x"), P(), P()), P(None, "y"), ("all-reduce",), ("auto",)),),
        nests=(((0, None, None, None, None),), ((None, 0, 0, 0, 0),)),
    ),
    k_case("b", second=True, nests=(((None, 0, None, None, None),),)),
    OpCase(
        "k-fp8",
        functools.partial(run_k_fp8, side="a"),
        functools.partial(k_args, "a"),
        nests=(((0, None, 0, 0, None),),),
        shards=(Shard((P(None, "y"), P("x"), P("x"), P(), P()), P(), ("all-gather",) * 3, ("auto",)),),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("fp8", [True, False], ids=("fp8", "bf16"))
def test_numbers_are_those_of_the_rows_taken_first(fp8: bool) -> None:
    """Bit for bit, whatever the index holds, and also where groups are an index."""
    a, b, rows, s = m_args("nt", 3)
    rows = rows.at[3:6].set(jnp.array([2**31 - 1, -(2**31), T], jnp.int32))
    first = take(a, rows)[0]
    gathered, contiguous = jdg.m_grouped_bf16_gemm_nt_gathered, jdg.m_grouped_bf16_gemm_nt_contiguous
    if fp8:
        gathered, contiguous = jdg.m_grouped_fp8_gemm_nt_gathered, jdg.m_grouped_fp8_gemm_nt_contiguous
        a, b, first = jdg.quantize(a), jdg.quantize(b, (128, 128)), jdg.quantize(first)
    of = jnp.asarray(np.repeat([1, -1, 3, 0], [10, 4, 8, 10]), jnp.int32)
    described: tuple[dict[str, Any], ...] = (
        {"group_sizes": s},
        {"m_indices": of},
        {"group_sizes": jnp.array([3, 4, 9, 9, 2]), "group_offset": 1},
    )
    for form in described[:2] if fp8 else described:
        np.testing.assert_array_equal(gathered(a, b, rows, **form), contiguous(first, b, **form))


@pytest.mark.parametrize("side", ["a", "b"])
def test_fp8_along_k(side: str) -> None:
    """Small integers, which FP8 with powers of two as scales holds exactly: equal to the sums in float64."""
    rng, sizes, places, t, cut = np.random.default_rng(5), [150, 0, 131, 7], 300, 20, slice(1, 4)
    named, other = (rng.integers(-8, 9, shape).astype(np.float64) for shape in ((t, 40), (places, 24)))
    rows = np.asarray(index(7, places, t))
    first = np.where(((rows >= 0) & (rows < t))[:, None], named[rows.clip(0, t - 1)], 0)
    ends = np.cumsum(sizes)
    pairs = [
        (first[end - size : end], other[end - size : end]) for end, size in zip(ends, sizes, strict=True)
    ]
    want = np.stack([x.T @ y if side == "a" else y.T @ x for x, y in pairs])
    other[ends[-1] :] = np.nan
    a, b = (jnp.asarray(x, BF16) for x in ((named, other) if side == "a" else (other, named)))
    run = functools.partial(run_k_fp8, a, b, jnp.asarray(rows), jnp.array(sizes), side=side)
    np.testing.assert_array_equal(run(None, scale_format="ue8m0"), want)
    c = jnp.asarray(rng.integers(-8, 9, want[cut].shape), F32)
    some = {"num_groups": 3, "group_offset": 1, "scale_format": "ue8m0"}
    np.testing.assert_array_equal(run(c, **some), np.asarray(c) + want[cut])


def test_fp8_along_k_has_scales_of_each_group() -> None:
    """A group of tiny numbers beside one of large ones is as exact as alone."""
    size = np.repeat([2.0**-20, 2.0**15], [30, 50])[:, None]
    named, other = (oracle.random(seed, 80, 16).astype(np.float64) * size for seed in (1, 2))
    found = jdg.k_grouped_fp8_gemm_tn_gathered(
        jnp.asarray(named, BF16), jnp.asarray(other, BF16), jnp.array([30, 50]), a_rows=jnp.arange(80)
    )
    for g, of in enumerate((slice(0, 30), slice(30, 80))):
        want = named[of].T @ other[of]
        np.testing.assert_allclose(found[g], want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (4, 0, 8, 8), (4, 4, 0, 8), (4, 4, 8, 0)], ids=str)
def test_empty_dimensions(shape: tuple[int, int, int, int]) -> None:
    t, m, n, k = shape
    a, b, rows, s = (
        jnp.ones((t, k), BF16),
        jnp.ones((2, n, k), BF16),
        jnp.zeros(m, jnp.int32),
        jnp.array([m, 0]),
    )
    found = jdg.m_grouped_bf16_gemm_nt_gathered(a, b, rows, s)
    np.testing.assert_array_equal(found, np.full((m, n), k if t else 0))
    for product in (jdg.k_grouped_bf16_gemm_tn_gathered, jdg.k_grouped_fp8_gemm_tn_gathered):
        inner = product(a, jnp.ones((m, n), BF16), s, a_rows=rows)
        np.testing.assert_array_equal(inner, np.stack([np.full((k, n), m if t else 0), np.zeros((k, n))]))


ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a float index": (
        ValueError,
        r"rows is float32 \[4\], need an int32 array \[m\]\. Convert it: rows\.astype\(jnp\.int32\)",
        lambda: run_m(X, W, jnp.ones(4), S, form="nt"),
    ),
    "an index of two dimensions": (
        ValueError,
        r"rows is int32 \[2, 2\], need int32 \[m\]: a row of a for each row of the product, -1 for none",
        lambda: run_m(X, W, jnp.ones((2, 2), jnp.int32), S, form="nt"),
    ),
    "an index of each row's group": (
        ValueError,
        r"m_indices is int32 \[3\], need int32 \[4\]: the group of each row of the product",
        lambda: jdg.m_grouped_bf16_gemm_nt_gathered(X, W, INDEX, m_indices=INDEX[:3]),
    ),
    "another k": (
        ValueError,
        r"a is \[3, 8\] \[m, k\] and b is \[2, 16, 24\] \[g, n, k\]: k differs \(8 and 24\)",
        lambda: run_m(X[:, :8], W, INDEX, S, form="nt"),
    ),
    "neither": (
        TypeError,
        r"got neither of a_rows and b_rows, need exactly one\. Without any use k_grouped_bf16_gemm_tn_contig",
        lambda: jdg.k_grouped_bf16_gemm_tn_gathered(X, X, S),
    ),
    "both": (
        TypeError,
        r"got both of a_rows and b_rows, need exactly one",
        lambda: jdg.k_grouped_bf16_gemm_tn_gathered(X, X, S, a_rows=INDEX, b_rows=INDEX),
    ),
    "another k of the other operand": (
        ValueError,
        r"a_rows is int32 \[4\] and b is bfloat16 \[3, 24\]: k differs \(4 and 3\)\. Name a row of a for ",
        lambda: jdg.k_grouped_bf16_gemm_tn_gathered(X, X, S, a_rows=INDEX),
    ),
    "neither, along k in FP8": (
        TypeError,
        r"got neither of a_rows and b_rows, need exactly one\. Without any use k_grouped_fp8_gemm_tn_cont",
        lambda: jdg.k_grouped_fp8_gemm_tn_gathered(X, X, S),
    ),
    "rows that are quantised": (
        TypeError,
        r"k_grouped_fp8_gemm_tn_gathered: a is .*QuantizedArray",
        lambda: jdg.k_grouped_fp8_gemm_tn_gathered(jdg.quantize(X), X, S, a_rows=INDEX),
    ),
    "an unknown format of scales": (
        ValueError,
        r"scale_format",
        lambda: run_k_fp8(X, X.repeat(2, 0)[:4], INDEX, S, None, side="a", scale_format="e8"),
    ),
    "a derivative along k in FP8": (
        NotImplementedError,
        r"grouped_linear",
        lambda: jax.grad(lambda x: run_k_fp8(x, X[INDEX], INDEX, S, None, side="a").sum())(X),
    ),
    "a derivative in FP8": (
        NotImplementedError,
        r"grouped_linear",
        lambda: jax.grad(lambda s: jnp.sum(run_fp8(*fp8_args(0)[:1], s, *fp8_args(0)[2:])))(fp8_args(0)[1]),
    ),
}
X, W, S = jnp.ones((3, 24), BF16), jnp.ones((2, 16, 24), BF16), jnp.array([2, 2], jnp.int32)
INDEX = jnp.array([0, 2, 1, -1], jnp.int32)


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    error, says, call = ERRORS[what]
    with pytest.raises(error, match=says):
        call()


@pytest.mark.any_version
@pytest.mark.parametrize("fp8", [True, False], ids=("fp8", "bf16"))
def test_tiles_have_a_warpgroup_that_copies(fp8: bool) -> None:
    types = {} if fp8 else {"a": "bf16", "b": "bf16", "b_scales": "none"}
    sizes = {"groups": 8, "m": 4096, "n": 4096, "k": 4096, "expected": 512, "segments": 8}
    p = GroupedProblem(ROWS, **sizes, **types, by_index="a")
    found = list(grouped_candidates(p, H200))
    assert len(found) > 3
    assert all(c.warpgroups == 2 and c.block_m <= 128 for c in found)


def test_the_kernel_reads_the_rows() -> None:
    """One launch, and no copy of rows, of the index or of sizes in front of it."""
    pytest.importorskip("cuda.core")
    one = jax.sharding.SingleDeviceSharding(test_aot.devices()[0])
    shapes = [((64, 704), BF16), ((G, 576, 704), BF16), ((512,), jnp.int32), ((G,), jnp.int32)]
    types = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in shapes]
    hlo = jax.jit(jdg.m_grouped_bf16_gemm_nt_gathered).lower(*types).compile().as_text()
    assert Counter(op_checks.collectives(hlo)) == Counter()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 1
    assert all(word not in hlo for word in (" fusion(", " copy(", " gather("))
