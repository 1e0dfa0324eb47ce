"""Appending to a cache on a GPU: the reference's numbers, which are computed on the CPU, bits around them
kept, and a donated cache in place.

Run: pytest -m gpu tests/gpu/test_paged_append_gpu.py        (seconds)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.attention import PagedKVCache, paged_append
from jax_deepgemm.ops.paged_append.problem import AppendProblem

E4M3 = "float8_e4m3fn"
PAGES, PAGE, LAYERS, TOKENS = 40, 64, 2, 1001
FORMS = {
    "plain": ("bfloat16", "bfloat16", (8, 8), (128, 128), 0, False),
    "llama": ("bfloat16", "bfloat16", (32, 8), (128, 128), 64, False),
    "llama fp8": ("bfloat16", E4M3, (32, 8), (128, 128), 64, False),
    "gpt-j": ("float16", "float16", (16, 16), (256, 256), 32, True),
    "neox": ("float16", E4M3, (6, 6), (96, 96), 12, False),
    "narrow": ("float32", "bfloat16", (7, 1), (80, 80), 5, False),
    "mla": ("bfloat16", "bfloat16", (5, 5), (192, 128), 32, True),
    "float32 fp8": ("float32", E4M3, (9, 3), (64, 64), 3, True),
}


def kernels() -> Iterator[Any]:
    for dtype, stored, (heads, kv_heads), (d, dv), pairs, interleaved in FORMS.values():
        pool = (LAYERS, PAGES, PAGE)
        queries = heads if pairs else 0
        yield AppendProblem(TOKENS, kv_heads, d, dv, *pool, dtype, stored, pairs, interleaved, queries)


def drawn(form: Any, tokens: int) -> tuple[Any, ...]:
    dtype, stored, (heads, kv_heads), (d, dv), pairs, _ = form
    rng = np.random.default_rng(0)

    def numbers(*shape: int, kind: str = dtype) -> Any:
        return jnp.asarray(rng.standard_normal(shape), kind)

    scales = (
        rng.uniform(0.001, 0.1, (2, LAYERS, kv_heads)) if stored == E4M3 else np.ones((2, LAYERS, kv_heads))
    )
    pools = [rng.standard_normal((LAYERS, PAGES, kv_heads, PAGE, depth)) for depth in (d, dv)]
    for pool in pools:
        pool[:, :3] = np.nan
    pools = [jnp.asarray(pool.astype(jnp.dtype(stored))) for pool in pools]
    cache = PagedKVCache(*pools, *jnp.asarray(scales, jnp.float32), True)
    slots = rng.permutation(PAGES * PAGE)[:tokens]
    slots = np.where(
        rng.random(tokens) < 0.2, rng.choice([-1, PAGES * PAGE, -(2**31), 2**31 - 1], tokens), slots
    )
    positions = rng.choice([0, 1, 77, 4096, 131_071, 1_048_575], tokens)
    freq = (10000.0 ** -(np.arange(pairs) / max(pairs, 1))).astype(np.float32)
    rows = (numbers(tokens, kv_heads, d), numbers(tokens, kv_heads, dv), numbers(tokens, heads, d))
    return cache, *rows, *(jnp.asarray(x, jnp.int32) for x in (slots, positions)), jnp.asarray(freq)


def append(
    form: Any, cache: Any, k: Any, v: Any, q: Any, slots: Any, positions: Any, freq: Any, layer: Any
) -> Any:
    if not form[4]:
        return paged_append(cache, k, v, slots, layer=layer), q
    return paged_append(cache, k, v, slots, q=q, rotary=(positions, freq), interleaved=form[5], layer=layer)


def written(slots: Any, layer: int, heads: int) -> np.ndarray:
    """bool [layers, pages, heads, page]."""
    mask = np.zeros((LAYERS, PAGES, heads, PAGE), bool)
    slots = np.asarray(slots)
    slots = slots[(slots >= 0) & (slots < PAGES * PAGE)]
    if 0 <= layer < LAYERS:
        mask[layer, slots // PAGE, :, slots % PAGE] = True
    return mask


def near(got: Any, want: Any) -> None:
    """Equal, but for roundings of what is nearly between two numbers of the type."""
    got, want = (np.asarray(x) for x in (got, want))
    step = {1: 2**-3, 2: 2**-7, 4: 2e-6}[want.dtype.itemsize]
    got, want = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=step, atol=1e-5)
    assert step < 1e-5 or np.count_nonzero(got != want) <= 0.003 * want.size


@pytest.mark.smoke
@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    form = FORMS[name]
    for tokens, layer in ((TOKENS, 1), (1, 0), (5, -1), (5, LAYERS)):
        given = *drawn(form, tokens), jnp.int32(layer)
        cache, q = jax.jit(append, static_argnums=0)(form, *given)
        with jax.default_device(jax.devices("cpu")[0]):
            host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), given)
            want, want_q = jax.jit(append, static_argnums=0)(form, *host)
        mask = written(given[4], layer, given[1].shape[1])
        for part in ("k", "v"):
            now, then, old = (np.asarray(getattr(x, part)) for x in (cache, want, given[0]))
            np.testing.assert_array_equal(now[~mask].view(np.uint8), old[~mask].view(np.uint8))
            near(now[mask], then[mask])
        near(q, want_q)


def test_a_donated_cache_is_updated_in_place():
    """Alone, and carried by a scan over layers."""
    form = FORMS["llama"]
    cache, *rest = drawn(form, TOKENS)
    run = jax.jit(lambda cache, *given: append(form, cache, *given), donate_argnums=0)
    compiled = run.lower(cache, *rest, jnp.int32(1)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    once = np.asarray(run(jax.tree.map(jnp.copy, cache), *rest, jnp.int32(1))[0].k)
    held, again = jax.tree.map(jnp.copy, cache), None
    where = held.k.unsafe_buffer_pointer()
    for _ in range(5):
        held, again = run(held, *rest, jnp.int32(1))
        assert held.k.unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(np.asarray(held.k).view(np.uint16), once.view(np.uint16))
    assert again is not None

    def layers(cache: Any, *given: Any) -> Any:
        step = lambda cache, layer: (append(form, cache, *given, layer)[0], None)  # noqa: E731
        return jax.lax.scan(step, cache, jnp.arange(LAYERS))[0]

    scan = jax.jit(layers, donate_argnums=0)
    turned = rest[2].nbytes  # q, which nobody wants here
    temporary = scan.lower(cache, *rest).compile().memory_analysis().temp_size_in_bytes
    assert temporary < turned + cache.k.nbytes // 8
    both = scan(jax.tree.map(jnp.copy, cache), *rest)
    np.testing.assert_array_equal(np.asarray(both.k)[1].view(np.uint16), once[1].view(np.uint16))


def test_a_large_pool():
    """More than 2^31 numbers: the last slots of the last layer."""
    pages, page, heads, d = 70_000, 64, 4, 128
    k = jax.random.normal(jax.random.key(0), (3, heads, d), jnp.bfloat16)
    slots = jnp.array([0, pages * page - 1, pages * page])
    cache = PagedKVCache.create(pages, page, heads, d, layers=1)
    new = jax.jit(paged_append, donate_argnums=0)(cache, k, k, slots, layer=0)
    np.testing.assert_array_equal(np.asarray(new.k[0, -1, :, -1], np.float32), np.asarray(k[1], np.float32))
    assert int(jnp.sum(jnp.any(new.v[0, :, 0] != 0, axis=-1))) == 2
