"""Rows of the benchmark: a step's tokens into a cache, turned, beside the same in jnp."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.paged_append import reference
from jax_deepgemm.ops.paged_append.api import paged_append
from jax_deepgemm.ops.paged_append.cache import PagedKVCache

TOKENS = (1, 64, 8192)
HEADS, KV_HEADS, DEPTH, PAGE = 32, 8, 128, 64
STORED = ("bfloat16", "float8_e4m3fn")


def _draw(tokens: int, stored: str) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    pages = max(64, -(-2 * tokens // PAGE))
    cache = PagedKVCache.create(pages, PAGE, KV_HEADS, DEPTH, stored)
    k, v = jax.random.normal(keys[0], (2, tokens, KV_HEADS, DEPTH), jnp.bfloat16)
    q = jax.random.normal(keys[1], (tokens, HEADS, DEPTH), jnp.bfloat16)
    slots = jax.random.permutation(keys[2], pages * PAGE)[:tokens].astype(jnp.int32)
    positions = jax.random.randint(keys[3], (tokens,), 0, 100_000)
    freq = 10000.0 ** (-jnp.arange(DEPTH // 2) / (DEPTH // 2))
    return (cache, q), k, v, slots, positions, freq


def _append(carried: Any, k: Any, v: Any, slots: Any, positions: Any, freq: Any) -> Any:
    cache, q = carried
    return paged_append(cache, k, v, slots, q=q, rotary=(positions, freq))


def _plain(carried: Any, k: Any, v: Any, slots: Any, positions: Any, freq: Any) -> Any:
    cache, q = carried
    layer = jnp.zeros(1, jnp.int32)
    given = (k, v, slots, cache.k, cache.v, cache.k_scale, cache.v_scale, layer, positions, freq, q)
    new_k, new_v, turned = reference.append(*given, dtypes=(cache.dtype, cache.dtype), interleaved=False)
    return PagedKVCache(new_k, new_v, cache.k_scale, cache.v_scale), turned


def _rows(small: bool) -> Iterator[Row]:
    for tokens in TOKENS[:1] if small else TOKENS:
        for stored in STORED[:1] if small else STORED:
            width = 2 if stored == "bfloat16" else 1
            moved = 2 * 2 * HEADS + 2 * KV_HEADS * (2 + width)
            yield Row(
                name=f"paged_append tokens={tokens} {stored}",
                fields={"tokens": tokens, "stored": stored},
                function=_append,
                draw=functools.partial(_draw, tokens, stored),
                carry=0,
                bytes=tokens * DEPTH * moved,
                baseline=Beside("jnp, XLA", _plain),
            )


TABLES = {
    "paged_append": Table(
        f"Keys, values and queries of {KV_HEADS} and {HEADS} heads of {DEPTH}, into pages, beside jnp",
        ("tokens", "stored"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="jnp",
        order=2,
    )
}
