"""Calls for compute-sanitizer: types, widths and pages, decoding, prompts and both, flags of scores, and
numbers on the device that break the rules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.ops.attention.api import ragged_paged_attention
from jax_deepgemm.ops.paged_append.cache import PagedKVCache

HEADS, KV_HEADS = 12, 4
DECODING = ((1, 700), (1, 1), (1, 0), (3, 130))
PROMPTS = ((300, 301), (1, 90), (40, 40))
"""Rows and keys of sequences."""
FORMS: tuple[tuple[str, int, int, int, tuple[tuple[int, int], ...], dict[str, Any]], ...] = (
    ("bfloat16", 128, 128, 16, DECODING, {}),
    ("bfloat16", 128, 128, 64, PROMPTS, {}),
    ("float16", 64, 64, 32, PROMPTS, {"window": 50}),
    ("float8_e4m3fn", 128, 128, 16, DECODING, {"softcap": 9.0}),
    ("float8_e4m3fn", 80, 96, 16, PROMPTS, {}),
    ("bfloat16", 192, 128, 256, DECODING, {"split": 256}),
    ("bfloat16", 256, 256, 16, PROMPTS, {"causal": False}),
)
"""Type of the cache, widths of keys and values, page, sequences, options."""


def _run(options: dict[str, Any], q: Any, k: Any, v: Any, *rest: Any) -> jax.Array:
    tables, starts, lens, sinks, slopes, layer = rest
    ones = jnp.ones(k.shape[::2][:2], jnp.float32)
    cache = PagedKVCache(k, v, ones, ones, True)
    given = {"sinks": sinks, "alibi_slopes": slopes, "layer": layer, **options}
    out, lse = ragged_paged_attention(q, cache, tables, starts, lens, return_lse=True, **given)
    return jnp.concatenate([out.astype(jnp.float32).reshape(-1), jnp.nan_to_num(lse).reshape(-1)])


def cases() -> Iterator[Case]:
    """Yields each form as it should be, and with starts, lengths and pages that break the rules."""
    for stored, depth, v_depth, page, sequences, options in FORMS:
        rng = np.random.default_rng(0)
        rows, keys = np.array(sequences, np.int32).T
        columns, tokens = -(-int(keys.max()) // page) + 1, int(rows.sum()) + 2
        pages = len(rows) * columns
        tables = rng.permutation(pages).reshape(len(rows), columns).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        shape = (2, pages, KV_HEADS, page)
        dtype = "float16" if stored == "float16" else "bfloat16"
        q = jnp.asarray(rng.standard_normal((tokens, HEADS, depth)), dtype)
        k, v = (jnp.asarray(rng.standard_normal((*shape, d)), jnp.float32) for d in (depth, v_depth))
        sinks, slopes = rng.standard_normal((2, HEADS)).astype(np.float32)
        run = functools.partial(_run, options)
        name = f"attention {stored} {depth} {v_depth} pages of {page} rows {rows.max()}"
        for kind, broken in (("", False), (" broken", True)):
            batch = tables, starts, keys
            if broken:
                batch = (
                    np.where(tables % 3, tables, tables * 2**20 - 7).astype(np.int32),
                    starts * 3 - 5,  # not in another order: rows of two sequences would be either's
                    (keys * 2**12 - 9).astype(np.int32),
                )
            given = (*batch, sinks, np.abs(slopes), np.int32(1))
            yield Case(name + kind, run, (q, k.astype(stored), v.astype(stored), *map(jnp.asarray, given)))
