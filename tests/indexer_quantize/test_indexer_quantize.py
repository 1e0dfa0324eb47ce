"""An indexer's rows in FP8: against a matrix product in float64, into caches of both formats, under every
transformation; errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.indexer import hadamard, indexer_quantize
from jax_deepgemm.ops.indexer_quantize.family import FAMILY
from jax_deepgemm.ops.indexer_quantize.op import TO_BYTES
from jax_deepgemm.ops.indexer_quantize.problem import DEPTHS, DTYPES, RotateProblem
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

PAGES, PAGE = 6, 16


def matrix(depth: int) -> np.ndarray:
    found = np.ones((1, 1))
    while len(found) < depth:
        found = np.block([[found, found], [found, -found]])
    return found / np.sqrt(depth)


@pytest.mark.any_version
@pytest.mark.parametrize("depth", [1, 2, 32, 128])
def test_rotation(depth):
    x = np.random.default_rng(0).standard_normal((5, depth)).astype(np.float32)
    np.testing.assert_allclose(hadamard(jnp.asarray(x)), x.astype(np.float64) @ matrix(depth), atol=3e-6)
    gradient = jax.grad(lambda x: jnp.sum(hadamard(x)[:, 0]))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.full(x.shape, depth**-0.5), rtol=1e-6)


@pytest.mark.any_version
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_are_quantised_as_quantize_does(depth, dtype):
    x = normal(0, 3, 5, depth, dtype=jnp.dtype(dtype)).at[0, 0].multiply(1e4).at[1].set(0)
    for scale_format in ("f32", "ue8m0"):
        for rotate in (True, False):
            run = functools.partial(indexer_quantize, rotate=rotate, scale_format=scale_format)
            want = quantize(hadamard(x.astype(jnp.float32)) if rotate else x, scale_format=scale_format)
            for got in (jax.jit(run)(x), run(x)):
                assert got.block == want.block
                np.testing.assert_array_equal(got.scales, want.scales)
                np.testing.assert_array_equal(got.values.view(np.uint8), want.values.view(np.uint8))


def test_what_is_no_number_is_its_row_s_alone():
    x = jnp.ones((3, 128)).at[1, 7].set(jnp.inf).at[2, 3].set(jnp.nan)
    values = np.asarray(indexer_quantize(x).values.astype(jnp.float32))
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1:]).all()


# Caches -----------------------------------------------------------------------------------------------------


def slots_of(seed: int, n: int) -> np.ndarray:
    """Each another one, and some outside of the cache."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(PAGES * PAGE)[:n]
    return np.where(
        rng.random(n) < 0.3, rng.choice([-1, PAGES * PAGE, 2**31 - 1, -(2**31)], n), slots
    ).astype(np.int32)


def written(cache: np.ndarray, x: jax.Array, slots: np.ndarray) -> np.ndarray:
    """A loop over keys, of a cache of bytes [pages, page, d + 4]."""
    pages, page, _ = cache.shape
    depth, new = x.shape[1], indexer_quantize(x)
    out = cache.reshape(pages, -1).copy()
    for i, slot in enumerate(slots):
        if 0 <= slot < pages * page:
            at, place = divmod(int(slot), page)
            out[at, place * depth : (place + 1) * depth] = np.asarray(new.values[i]).view(np.uint8)
            where = page * depth + 4 * place
            out[at, where : where + 4] = np.asarray(new.scales[i]).view(np.uint8)
    return out.reshape(cache.shape)


@pytest.mark.parametrize("depth", DEPTHS)
def test_keys_go_to_their_slots(depth):
    x, slots = normal(0, 40, depth), slots_of(0, 40)
    cache = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE, depth + 4), np.uint8)
    want = written(cache, x, slots)
    run = jax.jit(lambda x, slots, cache: indexer_quantize(x, cache=cache, slots=slots))
    np.testing.assert_array_equal(run(x, slots, cache), want)
    np.testing.assert_array_equal(run(x, slots, cache[:, :, None])[:, :, 0], want)
    flat = cache.reshape(PAGES, -1)
    values = flat[:, : PAGE * depth].reshape(PAGES, PAGE, depth).view(jnp.float8_e4m3fn)
    scales = flat[:, PAGE * depth :].reshape(PAGES, PAGE, 4).copy().view(np.float32)[..., 0]
    got = run(x, slots, (values, scales))
    bits = [np.asarray(one).view(np.uint8).reshape(PAGES, -1) for one in got]
    np.testing.assert_array_equal(np.concatenate(bits, axis=1).reshape(cache.shape), want)


def to_bytes(x: jax.Array, slots: jax.Array, cache: jax.Array, out_sharding: Any = None) -> jax.Array:
    form = {"page": PAGE, "rotate": True, "powers": False, "out_sharding": out_sharding}
    return TO_BYTES(x, slots, cache, **form)[0]


def rows(x: jax.Array, out_sharding: Any = None) -> tuple[jax.Array, jax.Array]:
    found = indexer_quantize(x)
    return found.values, found.scales


def operands(seed: int) -> list[jax.Array]:
    cache = np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE * 36), np.uint8)
    return [normal(seed, 12, 32), jnp.asarray(slots_of(seed, 12)), jnp.asarray(cache)]


CASES = [
    OpCase(
        "rows",
        rows,
        lambda seed: [normal(seed, 8, 4, 64)],
        nests=(((0,),), ((1,),)),
        shards=(
            Shard((P("x", "y"),), (P("x", "y"), P("x", "y")), modes=("auto", "explicit", "shard_map")),
            Shard((P("x", None, "y"),), (P("x"), P("x")), ("all-gather",)),
        ),
    ),
    OpCase(
        "cache",
        to_bytes,
        operands,
        nests=(((0, 0, 0),), ((0, 0, None),)),
        shards=(
            Shard((P(), P(), P("x")), P("x"), modes=("auto", "explicit")),
            Shard((P("x"), P("x"), P()), P(), ("all-gather",) * 2),
        ),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.any_version
def test_each_is_one_launch():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    k, slots = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    cache = jax.ShapeDtypeStruct((8, 64, 132), jnp.uint8)
    for run, given in (
        (lambda k: indexer_quantize(k).values, (k,)),
        (lambda k, s, c: indexer_quantize(k, cache=c, slots=s), (k, slots, cache)),
    ):
        text = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@jax_deepgemm_launch(") == 1
        assert "scatter" not in text


@pytest.mark.any_version
@pytest.mark.parametrize("depth", DEPTHS)
def test_plans(depth):
    pytest.importorskip("cuda.core")
    for dtype in DTYPES:
        for cache in ({}, {"pages": 5, "page": 16}, {"pages": 5, "page": 16, "joined": True}):
            plan = FAMILY.plan(RotateProblem(1000, depth, dtype, **cache), H200, {})
            assert not plan.steps[-1].kernel.report.problems()
            assert len(plan.steps) == 1 + (0 if not cache else 1 if "joined" in cache else 2)
            assert plan.steps[-1].grid[0] * 256 * 8 * 4 // depth >= 1000


# Errors -----------------------------------------------------------------------------------------------------

K, SLOTS, CACHE = jnp.zeros((4, 128)), jnp.zeros(4, jnp.int32), jnp.zeros((2, 16, 132), jnp.uint8)


def into(cache: Any, x: jax.Array = K, slots: jax.Array = SLOTS) -> Any:
    return indexer_quantize(x, cache=cache, slots=slots)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: indexer_quantize(K.astype(jnp.int32)), TypeError, "x is int32, need bfloat16"),
        (lambda: indexer_quantize(K[:, :100]), ValueError, r"x is \[4, 100\], need .* with d 32, 64, 128"),
        (lambda: indexer_quantize(K, scale_format="f8"), ValueError, "scale_format is 'f8'"),
        (lambda: indexer_quantize(K, cache=CACHE), ValueError, "go together; got cache alone"),
        (lambda: into(CACHE, x=K[None]), ValueError, "Leave cache out for queries"),
        (lambda: into(CACHE, slots=SLOTS[1:]), ValueError, r"need integers \[4\]"),
        (lambda: into(CACHE[..., 1:]), ValueError, r"need uint8 \[pages, page, 132\]"),
        (lambda: into((CACHE, CACHE)), ValueError, "need values float8_e4m3fn"),
        (lambda: hadamard(K[:, :3]), ValueError, "d a power of two: pad it with zeros"),
        (lambda: jax.grad(lambda x: indexer_quantize(x).scales.sum())(K), NotImplementedError, "bf16_mqa"),
    ],
)  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
