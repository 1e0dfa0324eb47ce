"""attend_with_cache: a prompt and steps are one pass over all; against float64; sharding; errors."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_deepgemm.attention import KVCache, attend_with_cache
from tests.shared import attention_oracle as oracle
from tests.shared.arrays import normal

BATCH, TOKENS, HEADS, KV_HEADS, DEPTH, CAPACITY = 3, 21, 4, 2, 32, 32
INV_FREQ = jnp.asarray(1000.0 ** -(np.arange(8) / 8), jnp.float32)


def drawn() -> tuple[jax.Array, ...]:
    q = normal(0, BATCH, TOKENS, HEADS, DEPTH)
    return q, *normal(1, 2, BATCH, TOKENS, KV_HEADS, DEPTH)


def expected(positions: np.ndarray | None, window: int | None = None) -> np.ndarray:
    """All tokens in one pass, in float64."""
    q, k, v = (np.asarray(x) for x in drawn())
    out = []
    for b in range(BATCH):
        one, keys = q[b], k[b]
        if positions is not None:
            one, keys = (
                oracle.rotary(x, positions[b], np.asarray(INV_FREQ)).astype(jnp.bfloat16) for x in (one, keys)
            )
        pages = [np.moveaxis(x, 0, 1)[None] for x in (keys, v[b])]
        ones, lens = np.ones(KV_HEADS, np.float32), np.array([TOKENS])
        batch = oracle.Batch(one, *pages, ones, ones, np.zeros((1, 1), np.int32), np.array([0, TOKENS]), lens)
        out.append(oracle.attention(batch, window=window)[0])
    return np.stack(out)


def near(got: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2e-2)


@pytest.mark.parametrize("turned", [False, True])
def test_a_prompt_and_steps_are_one_pass(turned):
    q, k, v = drawn()
    form: dict[str, Any] = {"rotary": (None, INV_FREQ)} if turned else {}
    run = jax.jit(functools.partial(attend_with_cache, **form))
    cache, found, done = KVCache.create(BATCH, CAPACITY, KV_HEADS, DEPTH), [], 0
    for end in (16, 20, 21):
        part = slice(done, end)
        out, cache = run(q[:, part], cache, jnp.full(BATCH, done), k[:, part], v[:, part])
        found.append(out)
        done = end
    positions = np.tile(np.arange(TOKENS), (BATCH, 1)) if turned else None
    near(jnp.concatenate(found, axis=1), expected(positions))
    if not turned:
        again, same = attend_with_cache(q, cache, TOKENS)
        near(again, expected(None))
        assert same.paged.k is cache.paged.k


def test_sequences_of_different_lengths():
    """Prompts of 21, 8 and 0 tokens, padded; then the others, in one call."""
    q, k, v = drawn()
    counts = jnp.array([21, 8, 0])
    cache = KVCache.create(BATCH, CAPACITY, KV_HEADS, DEPTH)
    there = jnp.arange(TOKENS)[:, None, None] < counts[:, None, None, None]
    poison = jnp.where(there, 0, jnp.nan).astype(k.dtype)
    out, cache = attend_with_cache(q, cache, 0, k + poison, v + poison, counts=counts)
    want = expected(None)
    near(out[0], want[0])
    near(out[1, :8], want[1, :8])
    assert not np.any(out[1, 8:])
    assert not np.any(out[2])
    rest = jax.vmap(lambda x, n: jnp.roll(x, -n, axis=0))
    later = [rest(x, counts) for x in (q, k, v)]
    out, cache = attend_with_cache(later[0], cache, counts, *later[1:], counts=TOKENS - counts)
    near(out[1, :13], want[1, 8:])
    near(out[2], want[2])
    assert not np.any(out[0])


def test_positions_and_layers_and_options():
    q, k, v = drawn()
    positions = np.random.default_rng(0).integers(0, 1000, (BATCH, TOKENS))
    cache = KVCache.create(BATCH, CAPACITY, KV_HEADS, DEPTH, layers=2)

    def step(cache: KVCache, layer: jax.Array) -> Any:
        form = {"rotary": (positions, INV_FREQ), "window": 5, "layer": layer}
        out, cache = attend_with_cache(q, cache, 0, k, v, **form)
        return cache, out

    cache, out = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(2)))(cache)
    for one in out:
        near(one, expected(positions, window=5))


def test_a_batch_over_devices():
    """shard_map: each device has its sequences and their cache. jit: heads."""
    q, k, v = (x[:2] for x in drawn())
    want = expected(None)[:2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    cache = KVCache.create(2, CAPACITY, KV_HEADS, DEPTH)
    spec = jax.tree.map(lambda x: P(None, "x") if x.ndim == 5 else P(), cache)
    run = jax.shard_map(
        lambda q, cache, k, v: attend_with_cache(q, cache, 0, k, v),
        mesh=mesh,
        in_specs=(P("x"), spec, P("x"), P("x")),
        out_specs=(P("x"), spec),
    )
    near(jax.jit(run)(q, cache, k, v)[0], want)
    heads = jax.sharding.NamedSharding(mesh, P(None, None, "x"))
    cache = KVCache.create(2, CAPACITY, KV_HEADS, DEPTH, sharding=heads)
    out, cache = jax.jit(attend_with_cache)(*jax.device_put((q,), heads), cache, 0, k, v)
    near(out, want)
    assert cache.paged.k.sharding.is_equivalent_to(heads, 5)


def test_a_donated_cache_is_not_copied():
    cache = KVCache.create(4, 2048, 4, 64, jnp.float16)
    q, k = (normal(0, 4, 1, heads, 64, dtype=jnp.float16) for heads in (8, 4))
    run = jax.jit(attend_with_cache, donate_argnums=1)
    compiled = run.lower(q, cache, jnp.zeros(4, jnp.int32), k, k).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * cache.paged.k.nbytes
    pool = re.escape(f"f16[{','.join(map(str, cache.paged.k.shape))}]")
    assert re.search(pool, compiled.as_text())
    assert not re.search(rf"= {pool}\S* copy\(", compiled.as_text())


CACHE = KVCache.create(2, 32, 2, 32)
Q, K = jnp.zeros((2, 3, 4, 32), jnp.bfloat16), jnp.zeros((2, 3, 2, 32), jnp.bfloat16)


def attend(q: Any = Q, lengths: Any = 0, k: Any = K, v: Any = K, **options: Any) -> Any:
    return attend_with_cache(q, CACHE, lengths, k, v, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: attend(q=Q[0]), ValueError, r"need \[b, s, heads, head_dim\]"),
        (lambda: attend(q=Q[:1]), ValueError, "q has 1 sequences and the cache 2"),
        (lambda: attend(lengths=jnp.zeros(3, int)), ValueError, r"lengths is int32 \[3\], need \[2\]"),
        (lambda: attend(lengths=1.0), TypeError, "lengths is a float"),
        (lambda: attend(lengths=30), ValueError, "at most capacity = 32 together. Create the"),
        (lambda: attend(lengths=np.array([0, 30])), ValueError, "lengths are up to 30, and 3 tokens are new"),
        (lambda: attend(v=None), ValueError, "go together; got k alone"),
        (lambda: attend(k=K[:, :2]), TypeError, r"k is bfloat16 .* need \[2, 3, kv_heads, ..\]"),
        (lambda: attend(counts=jnp.zeros(3, int)), ValueError, "counts is int32"),
        (lambda: attend(rotary=INV_FREQ), TypeError, "rotary is float32"),
        (lambda: attend(rotary=(jnp.zeros(3, int), INV_FREQ)), ValueError, r"need \[2, 3\]: one of"),
        (lambda: attend(k=None, v=None, rotary=(None, INV_FREQ)), ValueError, "keys in the cache are turned"),
        (lambda: KVCache.create(2, 0, 2, 32), ValueError, "capacity is 0"),
        (lambda: KVCache.create(0, 16, 2, 32), ValueError, "batch is 0"),
    ],
)  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
