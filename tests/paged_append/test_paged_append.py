"""paged_append: against float64, in every type and form, under every transformation; errors."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.attention import PagedKVCache, paged_append
from jax_deepgemm.ops.paged_append.op import append_op
from tests.shared import attention_oracle as oracle
from tests.shared import op_checks
from tests.shared.arrays import normal
from tests.shared.op_checks import OpCase, Shard

E4M3 = jnp.float8_e4m3fn
PAGES, PAGE, TOKENS, KV_HEADS, DEPTH = 4, 16, 9, 2, 32
SLOTS = np.array([63, 0, -1, 64, 17, -(2**31), 2**31 - 1, 16, 40], np.int32)
POSITIONS = np.array([0, 1, 2, 7, 1000, 99_991, 1_048_575, 31, 32], np.int32)


def filled(dtype: Any, layers: int | None = None, v_head_dim: int = DEPTH) -> PagedKVCache:
    """A cache of any numbers, NaN among them, of which none may change that is not written."""
    cache = PagedKVCache.create(PAGES, PAGE, KV_HEADS, DEPTH, dtype, layers=layers, v_head_dim=v_head_dim)
    rng = np.random.default_rng(7)

    def pool(like: jax.Array) -> jax.Array:
        x = np.where(rng.random(like.shape) < 0.1, np.nan, rng.standard_normal(like.shape))
        return jnp.asarray(x.astype(like.dtype))

    scales = [jnp.ones_like(cache.k_scale)] * 2
    if cache.dtype == np.dtype(E4M3):
        scales = [jnp.asarray(rng.uniform(0.002, 0.05, cache.k_scale.shape), jnp.float32) for _ in range(2)]
    return PagedKVCache(pool(cache.k), pool(cache.v), *scales, cache.stacked)


def check(
    cache: PagedKVCache, dtype: Any, pairs: int, interleaved: bool, layer: int | None, heads: int
) -> None:
    k, v = (
        normal(0, TOKENS, KV_HEADS, DEPTH, dtype=dtype),
        normal(1, TOKENS, KV_HEADS, cache.v_head_dim, dtype=dtype),
    )
    q = normal(2, TOKENS, heads, DEPTH, dtype=dtype) if heads else None
    inv_freq = (10000.0 ** -(np.arange(pairs) / max(pairs, 1))).astype(np.float32)
    rotary = (jnp.asarray(POSITIONS), jnp.asarray(inv_freq)) if pairs else None

    def run(cache: PagedKVCache, k: Any, v: Any, q: Any, layer: Any) -> Any:
        form = {"rotary": rotary, "interleaved": interleaved, "layer": layer}
        return paged_append(cache, k, v, jnp.asarray(SLOTS), q=q, **form)

    at = None if layer is None else jnp.asarray(layer)
    found = jax.jit(run)(cache, k, v, q, at)
    new, turned = found if heads else (found, None)
    keys = oracle.rotary(np.asarray(k), POSITIONS, inv_freq, interleaved)
    for name, rows in (("k", keys), ("v", np.asarray(v, np.float64))):
        old = np.asarray(getattr(cache, name))
        scales = np.asarray(getattr(cache, f"{name}_scale"))
        want, row = old.copy(), layer or 0
        want[row] = oracle.append(old[row], rows, SLOTS, scales[row] if old.dtype == E4M3 else None)
        written = np.zeros(old.shape, bool)
        for slot in SLOTS[(SLOTS >= 0) & (SLOTS < PAGES * PAGE)]:
            written[row, slot // PAGE, :, slot % PAGE] = True
        got = np.asarray(getattr(new, name))
        rest = np.repeat(~written, old.dtype.itemsize, axis=-1)
        np.testing.assert_array_equal(got.view(np.uint8)[rest], want.view(np.uint8)[rest])
        near(got[written], want[written])
    if turned is not None:
        assert turned.dtype == q.dtype
        near(
            np.asarray(turned), oracle.rotary(np.asarray(q), POSITIONS, inv_freq, interleaved).astype(q.dtype)
        )


def same_bits(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (got, want)))


def near(got: np.ndarray, want: np.ndarray) -> None:
    """Equal, but for roundings of what is nearly between two numbers of the type."""
    step = {1: 2**-3, 2: 2**-7, 4: 2e-6}[want.dtype.itemsize]
    got, want = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=step, atol=2e-6)
    assert step < 1e-5 or np.mean(got != want) < 0.003


FORMS = {
    "plain": (jnp.bfloat16, jnp.bfloat16, 0, False, None, 0),
    "turned": (jnp.bfloat16, jnp.bfloat16, DEPTH // 2, False, None, 0),
    "queries": (jnp.bfloat16, jnp.float32, DEPTH // 2, False, None, 6),
    "interleaved": (jnp.float16, jnp.float16, DEPTH // 2, True, None, 2),
    "few pairs": (jnp.float16, jnp.float32, 5, False, None, 8),
    "few interleaved": (jnp.bfloat16, jnp.bfloat16, 3, True, 1, 2),
    "fp8": (E4M3, jnp.float32, DEPTH // 2, False, 2, 2),
    "fp8 plain": (E4M3, jnp.bfloat16, 0, False, None, 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_against_float64(name):
    stored, dtype, pairs, interleaved, layer, heads = FORMS[name]
    cache = filled(stored, None if layer is None else 3, 16)
    check(cache, dtype, pairs, interleaved, layer, heads)


def test_large_numbers_are_held_and_nan_stays():
    cache = PagedKVCache.create(1, 16, 1, 16, E4M3, k_scale=0.5, v_scale=2.0)
    k = jnp.zeros((1, 1, 16)).at[0, 0, :4].set(jnp.array([1e6, -jnp.inf, jnp.nan, 224.0]))
    new = paged_append(cache, k, k, jnp.array([3]))
    got = np.asarray(new.k[0, 0, 0, 3, :4], np.float32)
    np.testing.assert_array_equal(got, np.array([448, -448, np.nan, 448], np.float32))
    np.testing.assert_array_equal(np.asarray(new.v[0, 0, 0, 3, :4], np.float32)[3], 112)


@pytest.mark.parametrize("layer", [-1, 3, 2**31 - 1, -(2**31)])
def test_a_layer_that_is_not_there_is_not_written(layer):
    cache = filled(jnp.bfloat16, 3)
    k, inv_freq = normal(0, TOKENS, KV_HEADS, DEPTH), jnp.ones(4)
    run = jax.jit(functools.partial(paged_append, rotary=(jnp.asarray(POSITIONS), inv_freq)))
    new, q = run(cache, k, k, jnp.asarray(SLOTS), q=k, layer=jnp.int32(layer))
    jax.tree.map(same_bits, new, cache)
    assert not np.array_equal(q, k)


def test_layers_of_a_scan():
    """As a model has them: the cache is carried, and each layer writes its own."""
    cache = filled(jnp.bfloat16, 3)
    rows = normal(0, 3, TOKENS, KV_HEADS, DEPTH)

    def step(cache: PagedKVCache, given: Any) -> Any:
        layer, k = given
        return paged_append(cache, k, k, jnp.asarray(SLOTS), layer=layer), None

    got, _ = jax.jit(lambda cache: jax.lax.scan(step, cache, (jnp.arange(3), rows)))(cache)
    for layer in range(3):
        want = oracle.append(np.asarray(cache.k[layer]), np.asarray(rows[layer]), SLOTS)
        np.testing.assert_array_equal(np.asarray(got.k[layer]).view(np.uint16), want.view(np.uint16))


# In place ---------------------------------------------------------------------------------------------------


def test_a_donated_cache_is_not_copied():
    cache = PagedKVCache.create(64, 64, 8, 64, jnp.float16, layers=2)
    k = normal(0, 4, 8, 64, dtype=jnp.float16)
    run = jax.jit(paged_append, donate_argnums=0)
    compiled = run.lower(cache, k, k, jnp.arange(4), layer=jnp.int32(1)).compile()
    size = cache.k.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * size
    assert compiled.memory_analysis().temp_size_in_bytes < size // 8
    pool = re.escape("f16[2,64,8,64,64]")
    assert not re.search(rf"= {pool}\S* copy\(", compiled.as_text())


@pytest.mark.any_version
def test_each_is_one_launch():
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    cache = jax.eval_shape(lambda: PagedKVCache.create(8, 64, 8, 128, E4M3, layers=4))
    k = jax.ShapeDtypeStruct((5, 8, 128), jnp.bfloat16)
    q, slots = jax.ShapeDtypeStruct((5, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((5,), jnp.int32)

    def run(cache: PagedKVCache, k: Any, q: Any, slots: Any) -> Any:
        return paged_append(cache, k, k, slots, q=q, rotary=(slots, jnp.ones(64)), layer=slots[0])

    text = jax.jit(run).trace(cache, k, q, slots).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_deepgemm_launch(") == 1
    assert "scatter" not in text


# Transformations --------------------------------------------------------------------------------------------

DTYPES = (np.dtype(jnp.bfloat16),) * 2
FORM = {"interleaved": False}


def plain(*arrays: jax.Array, out_sharding: Any = None) -> Any:
    return tuple(append_op()(*arrays, dtypes=DTYPES, out_sharding=out_sharding, **FORM))


def with_queries(*arrays: jax.Array, out_sharding: Any = None) -> Any:
    return tuple(
        append_op("query", 2)(*arrays, dtypes=(*DTYPES, DTYPES[0]), out_sharding=out_sharding, **FORM)
    )


def operands(seed: int) -> list[jax.Array]:
    pool = (2, 4, 4, 16, 32)
    rng = np.random.default_rng(seed)
    slots = jnp.asarray(rng.permutation(64)[:6] - 2, jnp.int32)
    new, pools = normal(seed, 2, 6, 4, 32), normal(seed + 1, 2, *pool)
    scales = jnp.ones((2, 4))
    return [*new, slots, *pools, scales, scales, jnp.asarray([seed % 2], jnp.int32)]


def operands_with_queries(seed: int) -> list[jax.Array]:
    positions = jnp.asarray(np.random.default_rng(seed).integers(0, 99, 6), jnp.int32)
    return [*operands(seed), positions, jnp.ones(4), normal(seed + 2, 6, 8, 32)]


HEADS, POOL = P(None, "y"), P(None, None, "y")
CUT = (HEADS, HEADS, P(), POOL, POOL, HEADS, HEADS, P())
CASES = [
    OpCase(
        "append",
        plain,
        operands,
        nests=(((0,) * 8,),),
        shards=(
            Shard(CUT, (POOL, POOL), modes=("auto", "explicit", "shard_map")),
            Shard((P(), P(), P(), P(None, "x"), P(None, "x"), P(), P(), P()), (P(None, "x"),) * 2),
        ),
    ),
    OpCase(
        "append with queries",
        with_queries,
        operands_with_queries,
        nests=(((0, 0, 0, None, None, None, None, None, 0, None, 0),),),
        shards=(
            Shard((*CUT, P(), P(), HEADS), (POOL, POOL, HEADS), modes=("auto", "explicit", "shard_map")),
        ),
    ),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_heads_over_devices_as_users_write_it(kind):
    """Of q over more devices than the cache has heads, too."""
    want = None
    for size in (1, 4, 8):
        mesh = jax.make_mesh((size,), ("x",), axis_types=(kind,))
        place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: B023, E731
        cut = (None, "x") if size == 4 else ()
        cache = PagedKVCache.create(4, 16, 4, 32, sharding=place(None, *cut))
        assert cache.k_scale.sharding.is_equivalent_to(place(*cut), 2)
        k, q = jax.device_put(normal(0, 6, 4, 32), place(*cut)), normal(1, 6, 8, 32)
        slots, rotary = jnp.arange(6), (jnp.arange(6), jnp.ones(16))
        run = jax.jit(lambda cache, k, q: paged_append(cache, k, k, slots, q=q, rotary=rotary))  # noqa: B023
        q = jax.device_put(q, place(None, "x"))
        hlo = run.lower(cache, k, q).compile().as_text()
        assert not op_checks.collectives(hlo) or size == 8
        assert not re.search(r"16,32\]\S* all-gather", hlo)
        found = run(cache, k, q)
        assert found[0].k.sharding.is_equivalent_to(place(None, *cut), 5)
        want = found if want is None else want
        jax.tree.map(same_bits, found, want)


# Errors -----------------------------------------------------------------------------------------------------

CACHE, STACKED = PagedKVCache.create(2, 16, 2, 32), PagedKVCache.create(2, 16, 2, 32, layers=3)
K, AT = jnp.zeros((4, 2, 32), jnp.bfloat16), jnp.zeros(4, jnp.int32)
FREQ = jnp.ones(16)


def put(cache: PagedKVCache = CACHE, k: Any = K, v: Any = K, slots: Any = AT, **options: Any) -> Any:
    return paged_append(cache, k, v, slots, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: put(k=K.astype(E4M3)), TypeError, "k is float8_e4m3fn .* FP8 is made here"),
        (lambda: put(v=K.astype(jnp.float32)), TypeError, r"v is float32 .*, need bfloat16, as k is. Co"),
        (lambda: put(k=K[None]), ValueError, r"need \[t, kv_heads, head_dim\].* k.reshape"),
        (lambda: put(k=K[:, :1]), ValueError, r"k is bfloat16 \[4, 1, 32\], need \[4, 2, 32\]: to"),
        (lambda: put(v=K[..., :16]), ValueError, "need .* heads and numbers of the cache's v"),
        (lambda: put(slots=AT[1:]), ValueError, r"slots is int32 \[3\], need \[4\]: one of each token"),
        (lambda: put(slots=AT.astype(jnp.float32)), TypeError, r"need integers \[4\]"),
        (lambda: put(layer=0), ValueError, "it is one layer's cache, so leave layer out"),
        (lambda: put(STACKED), ValueError, "need 0 to 2: say layer="),
        (lambda: put(STACKED, layer=3), ValueError, "layer is 3, need 0 to 2"),
        (lambda: put(STACKED, layer="1"), TypeError, "layer is a str"),
        (lambda: put(STACKED, layer=AT), ValueError, r"layer is int32 \[4\], need \[\]"),
        (lambda: put(q=K), ValueError, "rotary is None. Give both, or neither"),
        (lambda: put(rotary=FREQ), TypeError, r"need \(positions \[t\], inv_freq \[r\]\)"),
        (lambda: put(rotary=(AT[1:], FREQ)), ValueError, "positions is int32"),
        (lambda: put(rotary=(AT, jnp.ones(17))), ValueError, "r from 1 to head_dim / 2 = 16"),
        (lambda: put(rotary=(AT, AT)), TypeError, "need float32.*inv_freq.astype"),
        (lambda: put(rotary=(AT, FREQ), q=K[..., :16]), ValueError, r"need .* = \[4, heads, 32\]"),
        (lambda: put(rotary=(AT, FREQ), q=K[:, :1]), ValueError, "q has 1 heads and the cache 2"),
        (lambda: put(rotary=(AT, FREQ), q=K.astype(jnp.float32)), TypeError, "need bfloat16, as k is"),
        (lambda: jax.grad(lambda k: put(k=k).k.sum())(K), NotImplementedError, "for serving; to train"),
        (lambda: PagedKVCache.create(2, 24, 2, 32), ValueError, "page_size is 24, need one of 16, 32"),
        (lambda: PagedKVCache.create(2, 16, 2, 40), ValueError, "Pad heads with zeros, 8 here"),
        (lambda: PagedKVCache.create(0, 16, 2, 32), ValueError, "pages is 0, need a whole number"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, jnp.float32), TypeError, "dtype is float32, need one of"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, None), TypeError, "dtype is None"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, k_scale=2), ValueError, "only float8_e4m3fn has. Leave"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, E4M3, k_scale=0), ValueError, "need positive numbers"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, E4M3, v_scale=FREQ), ValueError, r"need a number, \[2\]"),
        (lambda: PagedKVCache.create(2, 16, 2, 32, sharding="x"), TypeError, "need a NamedSharding"),
        (lambda: CACHE.with_scales(1, 1), ValueError, "Create it with dtype=jnp.float8_e4m3fn"),
        (lambda: PagedKVCache(K, K, FREQ, FREQ).check(), ValueError, "Make it with PagedKVCache.create"),
    ],
)  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_scales_of_a_cache():
    cache = PagedKVCache.create(1, 16, 2, 16, E4M3, layers=3, k_scale=[0.5, 2], v_scale=np.ones((3, 2)) / 4)
    np.testing.assert_array_equal(cache.k_scale, [[0.5, 2]] * 3)
    np.testing.assert_array_equal(cache.v_scale, np.full((3, 2), 0.25))
    other = cache.with_scales(3, [1.0, 2.0])
    assert other.k is cache.k
    np.testing.assert_array_equal(other.k_scale, np.full((3, 2), 3))
