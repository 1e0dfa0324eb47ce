"""Calls for compute-sanitizer: types, forms of pairs, widths of loads, slots outside of the cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.paged_append.api import paged_append
from jax_deepgemm.ops.paged_append.cache import PagedKVCache

TOKENS, PAGES, PAGE, KV_HEADS, HEADS = 77, 5, 16, 5, 15


def _run(
    stored: str, depth: int, v_depth: int, interleaved: bool, k: Any, v: Any, q: Any, *at: Any
) -> jax.Array:
    slots, positions, freq, layer = at
    cache = PagedKVCache.create(PAGES, PAGE, KV_HEADS, depth, stored, v_head_dim=v_depth, layers=2)
    rotary = (positions, freq) if freq.size else None
    form: dict[str, Any] = {"rotary": rotary, "interleaved": interleaved, "layer": layer}
    found = paged_append(cache, k, v, slots, q=q if freq.size else None, **form)
    new, turned = found if freq.size else (found, q)
    parts = [x.astype(jnp.float32).reshape(-1) for x in (new.k, new.v, turned)]
    return jnp.concatenate(parts)


def cases() -> Iterator[Case]:
    """Yields forms of each kind of kernel."""
    rng = np.random.default_rng(0)
    slots = jnp.asarray(rng.permutation(PAGES * PAGE + 9)[:TOKENS] - 4, jnp.int32)
    positions = jnp.asarray(rng.integers(-9, 2**31 - 1, TOKENS), jnp.int32)
    forms = (
        ("bfloat16", "bfloat16", 128, 128, 0, False),
        ("bfloat16", "bfloat16", 128, 128, 64, False),
        ("bfloat16", "float8_e4m3fn", 192, 128, 32, True),
        ("float32", "float16", 80, 80, 10, False),
        ("float16", "float8_e4m3fn", 48, 256, 5, False),
    )
    for dtype, stored, depth, v_depth, pairs, interleaved in forms:
        shapes = ((KV_HEADS, depth), (KV_HEADS, v_depth), (HEADS, depth))
        rows = [jnp.asarray(rng.standard_normal((TOKENS, *shape)), dtype) for shape in shapes]
        freq = jnp.asarray(rng.uniform(0, 1, pairs), jnp.float32)
        name = f"paged append {dtype} to {stored} {depth} {v_depth} pairs {pairs}"
        run = functools.partial(_run, stored, depth, v_depth, interleaved)
        yield Case(name, run, (*rows, slots, positions, freq, jnp.int32(1)))
